// Partial logits of one decode query per sequence on few key dimensions. Workgroups of (page, KV head,
// sequence), one thread per token; the group's queries sit in workgroup memory, scaled and gathered.

// 0 leading dimensions of the K tiles, 1 int8 copy, 2 compact slice, 3 listed dimensions of the K tiles.
override SOURCE: u32 = 0u;
// 0 sum over the group, 1 maximum, 2 one row per query head.
override POOL: u32 = 2u;
override COVERAGE: bool = false;
override HEAD_DIM: u32 = 64u;
override LEAD: u32 = 64u;
// Query heads per KV head, and query rows held (1 for the sum, which is linear).
override GROUP: u32 = 1u;
override ROWS: u32 = 1u;
// Dimensions read, and how many of them the query tile holds at a time.
override N: u32 = 64u;
override CHUNK: u32 = 64u;
// ROWS * CHUNK / 4.
override TILE: u32 = 16u;

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

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> sequences: array<u32>;
@group(0) @binding(3) var<storage, read> pages: array<u32>;
// K pages, int8 copy or compact slice.
@group(0) @binding(4) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> dims: array<u32>;
@group(0) @binding(6) var<storage, read> key_scale: array<f32>;
@group(0) @binding(7) var<storage, read_write> scores: array<u32>;

var<workgroup> q_tile: array<vec4<f32>, TILE>;
var<workgroup> q_scale: array<f32, 16>;

// The i-th dimension read.
fn dim_at(slot_head: u32, i: u32) -> u32 {
    if SOURCE < 2u {
        return i;
    }
    return min(dims[slot_head * N + i], HEAD_DIM - 1u);
}

// Logit scale of the query head whose vector starts at `base`.
fn logit_scale(base: u32, slot_head: u32) -> f32 {
    let plain = 1.0 / sqrt(f32(HEAD_DIM));
    if !COVERAGE {
        return plain;
    }
    var part = 0.0;
    var all = 0.0;
    for (var i = 0u; i < p.n; i += 1u) {
        part += abs(q[base + dim_at(slot_head, i)]);
    }
    for (var i = 0u; i < p.head_dim; i += 1u) {
        all += abs(q[base + i]);
    }
    // Where the query has nothing on the chosen dimensions every logit is zero.
    if part <= 0.0 {
        return 0.0;
    }
    return plain * sqrt(all / part);
}

// Query value of held row `r` at the i-th dimension.
fn q_value(base: u32, slot_head: u32, r: u32, i: u32) -> f32 {
    let dim = dim_at(slot_head, i);
    if POOL != 0u {
        return q_scale[r] * q[base + r * HEAD_DIM + dim];
    }
    var sum = 0.0;
    for (var h = 0u; h < GROUP; h += 1u) {
        sum += q_scale[h] * q[base + h * HEAD_DIM + dim];
    }
    return sum;
}

fn load_queries(base: u32, slot_head: u32, first: u32, lane: u32) {
    for (var e = lane; e < TILE; e += 64u) {
        let r = e / (CHUNK / 4u);
        let i = first + (e % (CHUNK / 4u)) * 4u;
        if i < N {
            q_tile[e] = vec4<f32>(
                q_value(base, slot_head, r, i),
                q_value(base, slot_head, r, i + 1u),
                q_value(base, slot_head, r, i + 2u),
                q_value(base, slot_head, r, i + 3u),
            );
        }
    }
}

// One element of the K pages.
fn key_element(at: u32) -> f32 {
    let word = word_of(at);
    return element(keys[word / 4u][word % 4u], at);
}

// Eight key values from dimension `i` on (a multiple of 8); `base` is the offset of the token's tile (K pages)
// or of its row (copies).
fn key8(base: u32, row: u32, slot_head: u32, i: u32) -> Eight {
    if SOURCE == 1u {
        let at = (base + i) / 8u;
        let both = keys[at / 2u];
        let words = select(both.xy, both.zw, (at & 1u) == 1u);
        return Eight(vec4<f32>(unpack4xI8(words.x)), vec4<f32>(unpack4xI8(words.y)));
    }
    if SOURCE == 3u {
        var v: Eight;
        for (var j = 0u; j < 4u; j += 1u) {
            v.a[j] = key_element(base + k_offset(LEAD, HEAD_DIM, row, dim_at(slot_head, i + j)));
            v.b[j] = key_element(base + k_offset(LEAD, HEAD_DIM, row, dim_at(slot_head, i + 4u + j)));
        }
        return v;
    }
    var at = base + i;
    if SOURCE == 0u {
        at = base + k_offset(LEAD, HEAD_DIM, row, i);
    }
    if DTYPE == 0u {
        return Eight(bitcast<vec4<f32>>(keys[at / 4u]), bitcast<vec4<f32>>(keys[at / 4u + 1u]));
    }
    let v = keys[at / 8u];
    return Eight(unpack4(v.x, v.y), unpack4(v.z, v.w));
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
        } else if SOURCE == 2u {
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
        }
        let t = first + lane;
        if t < kv_len {
            if POOL == 2u {
                for (var r = 0u; r < ROWS; r += 1u) {
                    scores[(sequence * p.heads + head * GROUP + r) * p.stride + t] =
                        score_bits(finite(acc[r] * scale));
                }
            } else {
                var pooled = LOWEST;
                for (var r = 0u; r < ROWS; r += 1u) {
                    pooled = max(pooled, finite(acc[r] * scale));
                }
                scores[(sequence * p.kv_heads + head) * p.stride + t] = score_bits(pooled);
            }
        }
    }
}
