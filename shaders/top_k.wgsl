// The k largest scores of a row as ascending indices: radix select over the ordered u32 image of f32, eight
// bits a pass, then an ordered compaction by prefix sums. One workgroup per row; no result depends on timing.

struct Params {
    rows_per_seq: u32,
    stride: u32,
    k: u32,
    unit: u32,
    permille: u32,
    at_least: u32,
    // Room of a candidate list, 0 without candidates.
    among: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> scores: array<u32>;
@group(0) @binding(3) var<storage, read_write> indices: array<u32>;
@group(0) @binding(4) var<storage, read_write> counts: array<u32>;
@group(0) @binding(5) var<storage, read> candidates: array<u32>;
@group(0) @binding(6) var<storage, read> candidate_counts: array<u32>;

var<workgroup> histogram: array<atomic<u32>, 256>;
var<workgroup> sums: array<u32, 16>;
// Bits of the threshold found so far, and how many are still to be taken among equal prefixes.
var<workgroup> prefix: u32;
var<workgroup> wanted: u32;
var<workgroup> above: array<u32, 256>;
var<workgroup> equal: array<u32, 256>;
var<workgroup> above_sums: array<u32, 16>;
var<workgroup> equal_sums: array<u32, 16>;

// What score `i` of a row belongs to.
fn number(row: u32, i: u32) -> u32 {
    if p.among > 0u {
        return candidates[row * p.among + i];
    }
    return i;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.y;
    let row = sequence * p.rows_per_seq + group.x;
    let tokens = sequences[sequence * META_WORDS + META_KV_LEN];
    var n = (tokens + p.unit - 1u) / p.unit;
    if p.among > 0u {
        n = min(candidate_counts[row], p.among);
    }
    let base = row * p.stride;
    if lane == 0u {
        prefix = 0u;
        // permille * tokens / 1000 without leaving 32 bits.
        let share = tokens / 1000u * p.permille + tokens % 1000u * p.permille / 1000u;
        wanted = min(p.k, max(p.at_least, share));
    }
    for (var shift = 24i; shift >= 0i; shift -= 8i) {
        atomicStore(&histogram[lane], 0u);
        workgroupBarrier();
        // Bits above the digit; a shift by 32 is undefined.
        let high = select(0xffffffffu << (u32(shift) + 8u), 0u, shift == 24i);
        let chosen = prefix;
        for (var t = lane; t < n; t += 256u) {
            let key = image(scores[base + t]);
            if key != 0u && (key & high) == chosen {
                atomicAdd(&histogram[(key >> u32(shift)) & 255u], 1u);
            }
        }
        workgroupBarrier();
        if lane < 16u {
            var sum = 0u;
            for (var i = 0u; i < 16u; i += 1u) {
                sum += atomicLoad(&histogram[lane * 16u + i]);
            }
            sums[lane] = sum;
        }
        workgroupBarrier();
        if lane == 0u {
            // The digit where the count from the top reaches `wanted`; digit 0 where it never does.
            var left = wanted;
            var part = 15i;
            for (; part > 0i && sums[part] < left; part -= 1i) {
                left -= sums[part];
            }
            var digit = part * 16i + 15i;
            for (; digit > part * 16i; digit -= 1i) {
                let n = atomicLoad(&histogram[digit]);
                if n >= left {
                    break;
                }
                left -= n;
            }
            wanted = left;
            prefix = chosen | (u32(digit) << u32(shift));
        }
        workgroupBarrier();
    }
    // Fewer candidates than k: the search ends at 0, which no candidate has.
    let threshold = prefix;
    let ties = select(wanted, 0u, threshold == 0u);

    // Each thread owns a contiguous piece, so that its output is contiguous too.
    let piece = (n + 255u) / 256u;
    let first = min(lane * piece, n);
    let last = min(first + piece, n);
    var n_above = 0u;
    var n_equal = 0u;
    for (var t = first; t < last; t += 1u) {
        let key = image(scores[base + t]);
        n_above += select(0u, 1u, key > threshold);
        n_equal += select(0u, 1u, key == threshold);
    }
    above[lane] = n_above;
    equal[lane] = n_equal;
    workgroupBarrier();
    if lane < 16u {
        var a = 0u;
        var e = 0u;
        for (var i = 0u; i < 16u; i += 1u) {
            a += above[lane * 16u + i];
            e += equal[lane * 16u + i];
        }
        above_sums[lane] = a;
        equal_sums[lane] = e;
    }
    workgroupBarrier();
    var a = 0u;
    var e = 0u;
    for (var i = 0u; i < lane / 16u; i += 1u) {
        a += above_sums[i];
        e += equal_sums[i];
    }
    for (var i = lane & ~15u; i < lane; i += 1u) {
        a += above[i];
        e += equal[i];
    }
    for (var t = first; t < last; t += 1u) {
        let key = image(scores[base + t]);
        if key > threshold {
            indices[row * p.k + a + min(e, ties)] = number(row, t);
            a += 1u;
        } else if key == threshold {
            if e < ties {
                indices[row * p.k + a + e] = number(row, t);
            }
            e += 1u;
        }
    }
    if lane == 255u {
        counts[row] = a + min(e, ties);
    }
}
