// Scores of listed blocks set to +infinity, one thread per entry; workgroups of (64 entries, list, sequence).

struct Params {
    rows_per_seq: u32,
    // Room of a list, and tokens of a block.
    k: u32,
    unit: u32,
    stride: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> blocks: array<u32>;
@group(0) @binding(3) var<storage, read> block_counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> scores: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.z * META_WORDS + META_KV_LEN];
    let row = group.z * p.rows_per_seq + group.y;
    let n = min(block_counts[row], p.k);
    let there = (kv_len + p.unit - 1u) / p.unit;
    for (var i = group.x * 64u + lane; i < n; i += groups.x * 64u) {
        let b = blocks[row * p.k + i];
        if b < there {
            scores[row * p.stride + b] = PLUS_INF;
        }
    }
}
