// Decode attention of one workgroup: the query heads of a KV head over a range of tokens, with an online
// softmax. Put in front of attend_dense.wgsl and attend_rows.wgsl, which declare the buffers and
// `token_at`.

override HEAD_DIM: u32 = 64u;
override LEAD: u32 = 64u;
// Query heads per KV head, and how many of them one workgroup handles (a divisor of GROUP).
override GROUP: u32 = 1u;
override HEADS: u32 = 1u;
// Tokens of one round (a multiple of 64).
override ROUND: u32 = 64u;
// HEADS * HEAD_DIM / 4 and HEADS * ROUND.
override Q_TILE: u32 = 16u;
override W_TILE: u32 = 64u;

// `token_at` for an entry that is to be skipped.
const NO_TOKEN: u32 = 0xffffffffu;

// Scaled queries; logits and then weights of a round; V offset of each token of a round.
var<workgroup> q_tile: array<vec4<f32>, Q_TILE>;
var<workgroup> weight: array<f32, W_TILE>;
var<workgroup> v_row: array<u32, ROUND>;
var<workgroup> part_max: array<f32, 128>;
var<workgroup> team_sum: array<vec4<f32>, 64>;

// Logit of the token at `row` of K tile `base`, for each head, into `weight[h * ROUND + slot]`.
// `dims` is HEAD_DIM as a run-time value: drivers would unroll the loop, and compile for seconds.
fn write_logits(base: u32, row: u32, slot: u32, dims: u32) {
    var acc = array<f32, 16>();
    for (var i = 0u; i < dims; i += 8u) {
        let at = base + k_offset(LEAD, HEAD_DIM, row, i);
        let a = k4(at);
        let b = k4(at + 4u);
        for (var h = 0u; h < HEADS; h += 1u) {
            let c = (h * HEAD_DIM + i) / 4u;
            acc[h] += dot(a, q_tile[c]) + dot(b, q_tile[c + 1u]);
        }
    }
    for (var h = 0u; h < HEADS; h += 1u) {
        weight[h * ROUND + slot] = acc[h];
    }
}

// Attends entries first..last of the list behind `token_at`. `head` is the first query head; results go to
// row `out_row` (over splits, rows and heads) and the HEADS - 1 after it.
fn flash_decode(
    lane: u32,
    sequence: u32,
    row: u32,
    heads: u32,
    kv_heads: u32,
    head: u32,
    first: u32,
    last: u32,
    scale: f32,
    dims: u32,
    out_row: u32,
) {
    let kv_head = head / GROUP;
    let q_base = (row * heads + head) * HEAD_DIM / 4u;
    for (var e = lane; e < Q_TILE; e += 64u) {
        q_tile[e] = q[q_base + e] * scale;
    }
    workgroupBarrier();

    // Four dimensions per thread in the product with V; teams of threads take every teams-th token.
    let quads = HEAD_DIM / 4u;
    let teams = 64u / quads;
    let team = lane / quads;
    let quad = lane % quads;
    let parts = min(8u, 64u / HEADS);

    var largest = array<f32, 16>();
    var total = array<f32, 16>();
    var acc = array<vec4<f32>, 16>();
    for (var h = 0u; h < HEADS; h += 1u) {
        largest[h] = LOWEST;
    }
    for (var start = first; start < last; start += ROUND) {
        for (var slot = lane; slot < ROUND; slot += 64u) {
            var t = NO_TOKEN;
            if start + slot < last {
                t = token_at(start + slot);
            }
            v_row[slot] = NO_TOKEN;
            if t == NO_TOKEN {
                for (var h = 0u; h < HEADS; h += 1u) {
                    weight[h * ROUND + slot] = LOWEST;
                }
            } else {
                let tile = (page_of(sequence, t / PAGE) * kv_heads + kv_head) * PAGE * HEAD_DIM;
                v_row[slot] = tile + (t % PAGE) * HEAD_DIM;
                write_logits(tile, t % PAGE, slot, dims);
            }
        }
        workgroupBarrier();
        if lane < HEADS * parts {
            let h = lane % HEADS;
            var m = LOWEST;
            for (var slot = lane / HEADS; slot < ROUND; slot += parts) {
                m = max(m, weight[h * ROUND + slot]);
            }
            part_max[lane] = m;
        }
        workgroupBarrier();
        for (var h = 0u; h < HEADS; h += 1u) {
            var m = largest[h];
            for (var i = 0u; i < parts; i += 1u) {
                m = max(m, part_max[i * HEADS + h]);
            }
            let shrink = exp(largest[h] - m);
            largest[h] = m;
            acc[h] *= shrink;
            total[h] *= shrink;
            for (var slot = lane; slot < ROUND; slot += 64u) {
                let s = weight[h * ROUND + slot];
                let w = select(0.0, exp(s - m), s > LOWEST);
                weight[h * ROUND + slot] = w;
                total[h] += w;
            }
        }
        workgroupBarrier();
        if team < teams {
            for (var slot = team; slot < min(ROUND, last - start); slot += teams) {
                let at = v_row[slot];
                if at != NO_TOKEN {
                    let value = v4(at + quad * 4u);
                    for (var h = 0u; h < HEADS; h += 1u) {
                        acc[h] += weight[h * ROUND + slot] * value;
                    }
                }
            }
        }
        workgroupBarrier();
    }

    for (var h = 0u; h < HEADS; h += 1u) {
        team_sum[lane] = acc[h];
        part_max[lane] = total[h];
        workgroupBarrier();
        var denominator = 0.0;
        for (var i = 0u; i < 64u; i += 1u) {
            denominator += part_max[i];
        }
        if team == 0u {
            var sum = team_sum[quad];
            for (var i = 1u; i < teams; i += 1u) {
                sum += team_sum[i * quads + quad];
            }
            let result = select(vec4<f32>(), sum / denominator, denominator > 0.0);
            out[(out_row + h) * quads + quad] = result;
        }
        if lane == 0u {
            write_lse(out_row + h, largest[h], denominator);
        }
        workgroupBarrier();
    }
}
