// What score_dims.wgsl and score_rows.wgsl share: the group's queries in workgroup memory, scaled and gathered, and
// the keys they meet. `Params` is declared by the op; `n` and `head_dim` are N and HEAD_DIM, for loops that are not
// to be unrolled.

// 0 leading dimensions of the K tiles, 1 int8 copy, 2 compact slice, 3 listed dimensions of the K tiles, 4 and 5 the
// slice in 8 and in 4 bits.
override SOURCE: u32 = 0u;
// 0 sum over the group, 1 maximum, 2 one row per query head.
override POOL: u32 = 2u;
override COVERAGE: bool = false;
override HEAD_DIM: u32 = 64u;
override LEAD: u32 = 64u;
// Query heads that share the keys, and query rows held (1 for the sum, which is linear).
override GROUP: u32 = 1u;
override ROWS: u32 = 1u;
// Dimensions read, and how many of them the query tile holds at a time.
override N: u32 = 64u;
override CHUNK: u32 = 64u;
// ROWS * CHUNK / 4.
override TILE: u32 = 16u;

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> sequences: array<u32>;
@group(0) @binding(3) var<storage, read> pages: array<u32>;
// K pages, int8 copy or compact slice.
@group(0) @binding(4) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> dims: array<u32>;
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

// Eight values of the K tile at `base` from listed dimension `i` on.
fn gathered8(base: u32, row: u32, slot_head: u32, i: u32) -> Eight {
    var v: Eight;
    for (var j = 0u; j < 4u; j += 1u) {
        v.a[j] = key_element(base + k_offset(LEAD, HEAD_DIM, row, dim_at(slot_head, i + j)));
        v.b[j] = key_element(base + k_offset(LEAD, HEAD_DIM, row, dim_at(slot_head, i + 4u + j)));
    }
    return v;
}

// Eight values of `keys` from element `at` on (a multiple of 8).
fn keys8(at: u32) -> Eight {
    if DTYPE == 0u {
        return Eight(bitcast<vec4<f32>>(keys[at / 4u]), bitcast<vec4<f32>>(keys[at / 4u + 1u]));
    }
    let v = keys[at / 8u];
    return Eight(unpack4(v.x, v.y), unpack4(v.z, v.w));
}

// Writes column `t` of one row per held query from `first_row` on, or their pooled score into `pooled_row`.
fn write_scores(sums: array<f32, 16>, first_row: u32, pooled_row: u32, t: u32) {
    var acc = sums;
    if POOL == 2u {
        for (var r = 0u; r < ROWS; r += 1u) {
            scores[(first_row + r) * p.stride + t] = score_bits(finite(acc[r]));
        }
        return;
    }
    var pooled = LOWEST;
    for (var r = 0u; r < ROWS; r += 1u) {
        pooled = max(pooled, finite(acc[r]));
    }
    scores[pooled_row * p.stride + t] = score_bits(pooled);
}
