// Partial logits of one decode query per sequence on few key dimensions of listed tokens. Workgroups of (64 entries,
// query heads that share a KV head and a list, sequence), one thread per entry.

struct Params {
    heads: u32,
    kv_heads: u32,
    n_pages: u32,
    stride: u32,
    slots: u32,
    // N and HEAD_DIM, for loops that are not to be unrolled.
    n: u32,
    head_dim: u32,
    // Lists of a sequence, and room of one.
    lists: u32,
    k: u32,
}

@group(0) @binding(6) var<storage, read> indices: array<u32>;
@group(0) @binding(8) var<storage, read> counts: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z;
    let head = group.y * GROUP;
    let kv_head = head / (p.heads / p.kv_heads);
    let record = sequence * META_WORDS;
    let q_len = sequences[record + META_Q_LEN];
    let kv_len = sequences[record + META_KV_LEN];
    let page_list = sequences[record + META_PAGES];
    let slot = sequences[record + META_SLOT];
    if q_len == 0u || (SOURCE >= 2u && slot >= p.slots) {
        return;
    }
    let list = sequence * p.lists + head / (p.heads / p.lists);
    let count = min(counts[list], p.k);
    let slot_head = slot * p.kv_heads + kv_head;
    let q_base = (sequences[record + META_Q_START] * p.heads + head) * HEAD_DIM;
    if lane < GROUP {
        q_scale[lane] = logit_scale(q_base + lane * HEAD_DIM, slot_head);
    }
    workgroupBarrier();
    if CHUNK >= N {
        load_queries(q_base, slot_head, 0u, lane);
        workgroupBarrier();
    }
    for (var first = group.x * 64u; first < count; first += groups.x * 64u) {
        let entry = first + lane;
        var token = kv_len;
        if entry < count {
            token = indices[list * p.k + entry];
        }
        // Lanes without a token repeat token 0; what they find is not written, or is -infinity.
        let there = token < kv_len;
        let t = select(0u, token, there);
        let page = pages[page_list + t / PAGE];
        let base = (min(page, p.n_pages - 1u) * p.kv_heads + kv_head) * PAGE * HEAD_DIM;
        var acc = array<f32, 16>();
        for (var c = 0u; c < N; c += CHUNK) {
            if CHUNK < N {
                workgroupBarrier();
                load_queries(q_base, slot_head, c, lane);
                workgroupBarrier();
            }
            for (var i = 0u; i < min(CHUNK, p.n - c); i += 8u) {
                var key: Eight;
                if SOURCE == 3u {
                    key = gathered8(base, t % PAGE, slot_head, c + i);
                } else {
                    key = keys8(base + k_offset(LEAD, HEAD_DIM, t % PAGE, c + i));
                }
                for (var r = 0u; r < ROWS; r += 1u) {
                    let at = (r * CHUNK + i) / 4u;
                    acc[r] += dot(key.a, q_tile[at]) + dot(key.b, q_tile[at + 1u]);
                }
            }
        }
        if !there {
            for (var r = 0u; r < ROWS; r += 1u) {
                acc[r] = LOWEST;
            }
        }
        if entry < count {
            write_scores(acc, sequence * p.heads + head, sequence * p.kv_heads + kv_head, entry);
        }
    }
}
