// Chooses key dimensions by the query; one workgroup per (KV head, sequence), one thread per dimension. Ranks
// and columns are found by counting (at most 256 dimensions), which needs no order of arrival.

// 0 sum of |q|, 1 pair norm, 2 |q| * sigma_k, 3 pair norm * (sigma + mean of the key's pair norm).
override METRIC: u32 = 0u;
override ADAPTIVE: bool = false;

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    n_dims: u32,
    unit: u32,
    slots: u32,
    // Refresh::Every.
    every: u32,
    phase: u32,
    // Refresh::Adaptive.
    min_steps: u32,
    max_steps: u32,
    beta: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> sequences: array<u32>;
@group(0) @binding(3) var<storage, read> stats: array<f32>;
@group(0) @binding(4) var<storage, read_write> dims: array<u32>;
@group(0) @binding(5) var<storage, read_write> state: array<u32>;
@group(0) @binding(6) var<storage, read_write> changed: array<u32>;
@group(0) @binding(7) var<storage, read_write> coverage: array<f32>;

var<workgroup> importance: array<f32, 256>;
var<workgroup> unit_sum: array<f32, 256>;
// 1 for dimensions of the best set for this query, and for those of the set in use.
var<workgroup> fresh: array<u32, 256>;
var<workgroup> used: array<u32, 256>;
// 1 for columns whose dimension stays.
var<workgroup> kept: array<u32, 256>;

// sqrt of the variance, from sums over n tokens.
fn deviation(sum: f32, squares: f32, n: f32) -> f32 {
    let mean = sum / n;
    return sqrt(max(squares / n - mean * mean, 0.0));
}

fn importance_of(i: u32, q_base: u32, stats_base: u32, tokens: u32) -> f32 {
    let group = p.heads / p.kv_heads;
    var sum = 0.0;
    for (var h = 0u; h < group; h += 1u) {
        let at = q_base + h * p.head_dim;
        if METRIC == 0u || METRIC == 2u {
            sum += abs(q[at + i]);
        } else {
            let pair = vec2<f32>(q[at + (i & ~1u)], q[at + (i | 1u)]);
            sum += sqrt(dot(pair, pair));
        }
    }
    let n = f32(max(tokens, 1u));
    if METRIC == 2u {
        return sum * deviation(stats[stats_base + i], stats[stats_base + p.head_dim + i], n);
    }
    if METRIC == 3u {
        let norm = stats_base + 2u * p.head_dim + i / 2u;
        let s = stats[norm];
        return sum * (deviation(s, stats[norm + p.head_dim / 2u], n) + s / n);
    }
    return sum;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = group.x;
    let record = group.y * META_WORDS;
    let slot = sequences[record + META_SLOT];
    let step = sequences[record + META_STEP];
    let live = slot < p.slots && sequences[record + META_Q_LEN] > 0u;
    let slot_head = select(0u, slot, live) * p.kv_heads + head;
    let had = state[slot_head * 4u] != 0u;
    let units = p.head_dim / p.unit;

    var mine = 0.0;
    if live && lane < p.head_dim {
        let row = sequences[record + META_Q_START];
        let q_base = (row * p.heads + head * (p.heads / p.kv_heads)) * p.head_dim;
        mine = importance_of(lane, q_base, slot_head * 3u * p.head_dim, sequences[record + META_KV_LEN]);
    }
    importance[lane] = mine;
    fresh[lane] = 0u;
    used[lane] = 0u;
    kept[lane] = 0u;
    workgroupBarrier();
    if lane < units {
        var sum = 0.0;
        for (var i = 0u; i < p.unit; i += 1u) {
            sum += importance[lane * p.unit + i];
        }
        unit_sum[lane] = sum;
    }
    if had && lane < p.n_dims {
        let dim = dims[slot_head * p.n_dims + lane];
        if dim < p.head_dim {
            used[dim] = 1u;
        }
    }
    workgroupBarrier();
    if lane < units {
        var rank = 0u;
        let own = unit_sum[lane];
        for (var u = 0u; u < units; u += 1u) {
            let other = unit_sum[u];
            rank += select(0u, 1u, other > own || (other == own && u < lane));
        }
        if rank < p.n_dims / p.unit {
            for (var i = 0u; i < p.unit; i += 1u) {
                fresh[lane * p.unit + i] = 1u;
            }
        }
    }
    workgroupBarrier();

    var total = 0.0;
    var best = 0.0;
    var current = 0.0;
    for (var i = 0u; i < p.head_dim; i += 1u) {
        total += importance[i];
        best += select(0.0, importance[i], fresh[i] == 1u);
        current += select(0.0, importance[i], used[i] == 1u);
    }
    let rho_best = select(1.0, best / total, total > 0.0);
    let rho_old = select(1.0, current / total, total > 0.0);
    let since = step - state[slot_head * 4u + 1u];
    var refresh = !had;
    if ADAPTIVE {
        refresh = refresh || since >= p.max_steps
            || (since >= p.min_steps && rho_old < p.beta * rho_best);
    } else if p.every > 0u {
        refresh = refresh || (step + p.phase) % p.every == 0u;
    }

    let column = lane < p.n_dims;
    if refresh && column {
        let dim = dims[slot_head * p.n_dims + lane];
        let stays = had && fresh[min(dim, 255u)] == 1u;
        kept[lane] = select(0u, 1u, stays);
    }
    // Everybody has read the state by now.
    workgroupBarrier();
    if !live {
        return;
    }
    var freed = 0u;
    var replaced = 0u;
    if refresh {
        for (var c = 0u; c < p.n_dims; c += 1u) {
            freed += select(0u, 1u, kept[c] == 0u && c < lane);
            replaced += 1u - kept[c];
        }
        if column && kept[lane] == 0u {
            // The `freed`-th new dimension in ascending order.
            var seen = 0u;
            for (var i = 0u; i < p.head_dim; i += 1u) {
                if fresh[i] == 1u && used[i] == 0u {
                    if seen == freed {
                        dims[slot_head * p.n_dims + lane] = i;
                    }
                    seen += 1u;
                }
            }
        }
    }
    if lane < 8u {
        var bits = 0u;
        for (var c = lane * 32u; c < min(lane * 32u + 32u, p.n_dims); c += 1u) {
            bits |= select(0u, 1u << (c % 32u), refresh && kept[c] == 0u);
        }
        changed[slot_head * 8u + lane] = bits;
    }
    if lane == 0u {
        if refresh {
            state[slot_head * 4u] = 1u;
            state[slot_head * 4u + 1u] = step;
            state[slot_head * 4u + 2u] += 1u;
            state[slot_head * 4u + 3u] += select(0u, replaced, had);
        }
        coverage[slot_head * 2u] = select(rho_old, rho_best, refresh);
        coverage[slot_head * 2u + 1u] = rho_best;
    }
}
