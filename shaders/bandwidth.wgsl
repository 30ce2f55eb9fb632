// Reads the whole buffer; the measured ceiling of the memory-bound ops. Sums keep the reads alive.

struct Params {
    // Number of vec4 words.
    length: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> data: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    var sum = vec4<u32>();
    let step = groups.x * 256u;
    for (var i = group.x * 256u + lane; i < p.length; i += step) {
        sum += data[i];
    }
    sums[group.x * 256u + lane] = sum.x + sum.y + sum.z + sum.w;
}
