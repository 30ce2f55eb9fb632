// Partial logits of one decode query per sequence on few key dimensions. Workgroups of (page, KV head,
// sequence), one thread per token; the group's queries sit in workgroup memory, scaled and gathered.

struct Params {
    heads: u32,
    kv_heads: u32,
    n_pages: u32,
    stride: u32,
    slots: u32,
    // Width of the int8 copy.
    int8_dims: u32,
    // Tokens of a slot of the compact slice.
    capacity: u32,
    // N and HEAD_DIM, for loops that are not to be unrolled.
    n: u32,
    head_dim: u32,
}

@group(0) @binding(6) var<storage, read> key_scale: array<f32>;

// Eight numbers of 4 bits.
fn eight_of(word: u32) -> Eight {
    var v: Eight;
    for (var j = 0u; j < 4u; j += 1u) {
        v.a[j] = f32(bitcast<i32>(word << (28u - 4u * j)) >> 28u);
        v.b[j] = f32(bitcast<i32>(word << (12u - 4u * j)) >> 28u);
    }
    return v;
}

// Eight key values from dimension `i` on (a multiple of 8); `base` is the offset of the token's tile (K pages)
// or of its row (copies).
fn key8(base: u32, row: u32, slot_head: u32, i: u32) -> Eight {
    if SOURCE == 1u || SOURCE == 4u {
        let at = (base + i) / 8u;
        let both = keys[at / 2u];
        let words = select(both.xy, both.zw, (at & 1u) == 1u);
        return Eight(vec4<f32>(unpack4xI8(words.x)), vec4<f32>(unpack4xI8(words.y)));
    }
    if SOURCE == 5u {
        let word = (base + i) / 8u;
        return eight_of(keys[word / 4u][word % 4u]);
    }
    if SOURCE == 3u {
        return gathered8(base, row, slot_head, i);
    }
    var at = base + i;
    if SOURCE == 0u {
        at = base + k_offset(LEAD, HEAD_DIM, row, i);
    }
    return keys8(at);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z;
    let head = group.y;
    let record = sequence * META_WORDS;
    let q_len = sequences[record + META_Q_LEN];
    let kv_len = sequences[record + META_KV_LEN];
    let page_list = sequences[record + META_PAGES];
    let slot = sequences[record + META_SLOT];
    if q_len == 0u || (SOURCE >= 2u && slot >= p.slots) {
        return;
    }
    let slot_head = slot * p.kv_heads + head;
    let q_base = (sequences[record + META_Q_START] * p.heads + head * GROUP) * HEAD_DIM;
    if lane < GROUP {
        q_scale[lane] = logit_scale(q_base + lane * HEAD_DIM, slot_head);
    }
    workgroupBarrier();
    if CHUNK >= N {
        load_queries(q_base, slot_head, 0u, lane);
        workgroupBarrier();
    }
    for (var first = group.x * PAGE; first < kv_len; first += groups.x * PAGE) {
        let page = pages[page_list + first / PAGE];
        let tile = min(page, p.n_pages - 1u) * p.kv_heads + head;
        var base = tile * PAGE * HEAD_DIM;
        if SOURCE == 1u {
            base = (tile * PAGE + lane) * p.int8_dims;
        } else if SOURCE == 2u || SOURCE >= 4u {
            base = (slot_head * p.capacity + min(first + lane, kv_len - 1u)) * N;
        }
        var acc = array<f32, 16>();
        for (var c = 0u; c < N; c += CHUNK) {
            if CHUNK < N {
                workgroupBarrier();
                load_queries(q_base, slot_head, c, lane);
                workgroupBarrier();
            }
            for (var i = 0u; i < min(CHUNK, p.n - c); i += 8u) {
                let key = key8(base, lane, slot_head, c + i);
                for (var r = 0u; r < ROWS; r += 1u) {
                    let at = (r * CHUNK + i) / 4u;
                    acc[r] += dot(key.a, q_tile[at]) + dot(key.b, q_tile[at + 1u]);
                }
            }
        }
        var scale = 1.0;
        if SOURCE == 1u {
            scale = key_scale[tile * PAGE + lane];
        } else if SOURCE >= 4u {
            scale = key_scale[slot_head * p.capacity + min(first + lane, kv_len - 1u)];
        }
        let t = first + lane;
        if t < kv_len {
            for (var r = 0u; r < ROWS; r += 1u) {
                acc[r] *= scale;
            }
            write_scores(acc, sequence * p.heads + head * GROUP, sequence * p.kv_heads + head, t);
        }
    }
}
