// Sets the scores of the first `sinks` and the last `recent` tokens to +infinity, in place: of all tokens (`main`),
// or of those on a list (`listed`).

struct Params {
    rows_per_seq: u32,
    stride: u32,
    sinks: u32,
    recent: u32,
    // Room of a list.
    k: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read_write> scores: array<u32>;
@group(0) @binding(3) var<storage, read> indices: array<u32>;
@group(0) @binding(4) var<storage, read> counts: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.z * META_WORDS + META_KV_LEN];
    let base = (group.z * p.rows_per_seq + group.y) * p.stride;
    for (var i = group.x * 64u + lane; i < p.sinks + p.recent; i += groups.x * 64u) {
        // Counting the recent tokens from the end wraps past zero for a short sequence: then it is too large.
        let t = select(kv_len - 1u - (i - p.sinks), i, i < p.sinks);
        if t < kv_len {
            scores[base + t] = PLUS_INF;
        }
    }
}

@compute @workgroup_size(64)
fn listed(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.z * META_WORDS + META_KV_LEN];
    let row = group.z * p.rows_per_seq + group.y;
    let count = min(counts[row], p.k);
    for (var i = group.x * 64u + lane; i < count; i += groups.x * 64u) {
        let t = indices[row * p.k + i];
        if t < kv_len && (t < p.sinks || kv_len - t <= p.recent) {
            scores[row * p.stride + i] = PLUS_INF;
        }
    }
}
