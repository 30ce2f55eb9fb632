// out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight, one workgroup per row.

struct Params {
    rows: u32,
    cols: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = flat_group(group, groups);
    let live = row < p.rows;
    let base = row * p.cols;
    var sum = 0.0;
    if live {
        for (var i = lane; i < p.cols; i += 64u) {
            let v = x[base + i];
            sum += v * v;
        }
    }
    partial[lane] = sum;
    workgroupBarrier();
    if !live {
        return;
    }
    // Every thread adds the 64 partial sums itself: one barrier instead of a tree of six.
    var total = 0.0;
    for (var i = 0u; i < 64u; i += 1u) {
        total += partial[i];
    }
    let scale = 1.0 / sqrt(total / f32(p.cols) + p.eps);
    for (var i = lane; i < p.cols; i += 64u) {
        out[base + i] = x[base + i] * scale * weight[i];
    }
}
