// Sets the scores that a budget leaves out to -infinity. Thresholds are found bit by bit in the ordered u32 image of
// f32; every sum is taken in a fixed order, so that no result depends on timing. `mass`: one workgroup per row keeps
// a share of the row's softmax; `together`: one workgroup per sequence shares a number of tokens among its rows.

struct Params {
    rows_per_seq: u32,
    stride: u32,
    // Of `together`.
    tokens: u32,
    at_least: u32,
    // Of `mass`: the share as bits of an f32.
    share: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read_write> scores: array<u32>;

const LANES: u32 = 256u;

var<workgroup> counts: array<u32, LANES>;
var<workgroup> sums: array<f32, LANES>;
var<workgroup> floors: array<u32, 256>;

// Order-preserving image; 0 for NaN and -infinity, which are never chosen.
fn image(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > PLUS_INF || bits == MINUS_INF {
        return 0u;
    }
    if bits == 0x80000000u {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

// The sum over all lanes, the same bits in each of them.
fn all_counts(mine: u32, lane: u32) -> u32 {
    workgroupBarrier();
    counts[lane] = mine;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            counts[lane] += counts[lane + half];
        }
    }
    workgroupBarrier();
    return counts[0];
}

fn all_sums(mine: f32, lane: u32) -> f32 {
    workgroupBarrier();
    sums[lane] = mine;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            sums[lane] += sums[lane + half];
        }
    }
    workgroupBarrier();
    return sums[0];
}

// Scores of at least `t` in the lane's part of a row.
fn my_count(base: u32, n: u32, t: u32, lane: u32) -> u32 {
    var count = 0u;
    for (var i = lane; i < n; i += LANES) {
        let key = image(scores[base + i]);
        count += select(0u, 1u, key != 0u && key >= t);
    }
    return count;
}

fn my_mass(base: u32, n: u32, t: u32, top: f32, lane: u32) -> f32 {
    var mass = 0.0;
    for (var i = lane; i < n; i += LANES) {
        let bits = scores[base + i];
        let key = image(bits);
        if key != 0u && key >= t {
            mass += exp(bitcast<f32>(bits) - top);
        }
    }
    return mass;
}

// The largest image that `p.at_least` scores of a row reach, at most that of +infinity; 0 where the row has fewer.
fn floor_of(base: u32, n: u32, lane: u32) -> u32 {
    var t = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit = bit >> 1u) {
        if all_counts(my_count(base, n, t | bit, lane), lane) >= p.at_least {
            t |= bit;
        }
    }
    return min(t, PLUS_INF | 0x80000000u);
}

fn cut(base: u32, n: u32, t: u32, lane: u32) {
    for (var i = lane; i < n; i += LANES) {
        if image(scores[base + i]) < t {
            scores[base + i] = MINUS_INF;
        }
    }
}

@compute @workgroup_size(256)
fn mass(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let n = sequences[group.y * META_WORDS + META_KV_LEN];
    let base = (group.y * p.rows_per_seq + group.x) * p.stride;
    var largest = LOWEST;
    for (var i = lane; i < n; i += LANES) {
        let bits = scores[base + i];
        if image(bits) != 0u {
            largest = max(largest, bitcast<f32>(bits));
        }
    }
    sums[lane] = largest;
    workgroupBarrier();
    for (var i = 0u; i < LANES; i += 1u) {
        largest = max(largest, sums[i]);
    }
    let goal = all_sums(my_mass(base, n, 0u, largest, lane), lane) * bitcast<f32>(p.share);
    var t = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit = bit >> 1u) {
        if all_sums(my_mass(base, n, t | bit, largest, lane), lane) >= goal {
            t |= bit;
        }
    }
    let least = floor_of(base, n, lane);
    cut(base, n, min(t, least), lane);
}

@compute @workgroup_size(256)
fn together(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let n = sequences[group.x * META_WORDS + META_KV_LEN];
    let first = group.x * p.rows_per_seq;
    for (var r = 0u; r < p.rows_per_seq; r += 1u) {
        let least = floor_of((first + r) * p.stride, n, lane);
        if lane == 0u {
            floors[r] = least;
        }
    }
    workgroupBarrier();
    // The largest image that leaves too many, 0 where none does.
    var t = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit = bit >> 1u) {
        var count = 0u;
        for (var r = 0u; r < p.rows_per_seq; r += 1u) {
            count += my_count((first + r) * p.stride, n, min(t | bit, floors[r]), lane);
        }
        if all_counts(count, lane) > p.tokens {
            t |= bit;
        }
    }
    let u = select(t + 1u, t, t == 0xffffffffu);
    for (var r = 0u; r < p.rows_per_seq; r += 1u) {
        cut((first + r) * p.stride, n, min(u, floors[r]), lane);
    }
}
