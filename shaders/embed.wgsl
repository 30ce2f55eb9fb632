// out[r, :] = scale * table[tokens[r], :]; the dispatch sees rows first..first+count of the table.

struct Params {
    rows: u32,
    cols: u32,
    vocab: u32,
    first: u32,
    count: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let e = flat_group(group, groups) * 64u + lane;
    if e >= p.rows * p.cols {
        return;
    }
    let token = tokens[e / p.cols];
    if token >= p.vocab {
        out[e] = 0.0;
        return;
    }
    if token < p.first || token - p.first >= p.count {
        return;
    }
    let i = (token - p.first) * p.cols + e % p.cols;
    out[e] = element(table[word_of(i)], i) * p.scale;
}
