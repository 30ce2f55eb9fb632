// Tokens of listed blocks, one thread per token; workgroups of (64 tokens, list, sequence).

struct Params {
    rows_per_seq: u32,
    // Room of a block list.
    k: u32,
    unit: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> blocks: array<u32>;
@group(0) @binding(3) var<storage, read> block_counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> indices: array<u32>;
@group(0) @binding(5) var<storage, read_write> counts: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.z * META_WORDS + META_KV_LEN];
    let row = group.z * p.rows_per_seq + group.y;
    let n = min(block_counts[row], p.k);
    var tokens = 0u;
    if n > 0u {
        // Only the last block of an ascending list can reach behind the sequence.
        let last = min(blocks[row * p.k + n - 1u] * p.unit, kv_len);
        tokens = (n - 1u) * p.unit + min(p.unit, kv_len - last);
    }
    if group.x == 0u && lane == 0u {
        counts[row] = tokens;
    }
    for (var i = group.x * 64u + lane; i < tokens; i += groups.x * 64u) {
        indices[row * p.k * p.unit + i] = blocks[row * p.k + i / p.unit] * p.unit + i % p.unit;
    }
}
