// Pools per-query-head logits over a GQA group, after a softmax per head in the log domain or as they are. `partials`
// leaves (largest, sum of exponentials) of every chunk of CHUNK tokens in `parts`; `pool` joins them and writes.

// Query heads of an output row.
override GROUP: u32 = 1u;
// The sum of the heads instead of the largest.
override SUM: bool = false;
// Of probabilities instead of logits.
override SOFTMAX: bool = true;

// Tokens of one partial log-sum-exp.
const CHUNK: u32 = 4096u;

struct Params {
    heads: u32,
    // Output rows of a sequence.
    rows: u32,
    stride: u32,
    // Chunks of a row in `parts`.
    chunks: u32,
    // 1 where `lengths` says how many scores an output row holds.
    listed: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> scores: array<f32>;
@group(0) @binding(3) var<storage, read_write> parts: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<u32>;
@group(0) @binding(5) var<storage, read> lengths: array<u32>;

// Scores of an output row.
fn length(sequence: u32, row: u32) -> u32 {
    if p.listed == 1u {
        return min(lengths[sequence * p.rows + row], p.stride);
    }
    return sequences[sequence * META_WORDS + META_KV_LEN];
}

var<workgroup> lane_part: array<vec2<f32>, 64>;

@compute @workgroup_size(64)
fn partials(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.z * p.heads + group.y;
    let first = group.x * CHUNK;
    let last = min(first + CHUNK, length(group.z, group.y / GROUP));
    var part = vec2<f32>(LOWEST, 0.0);
    for (var t = first + lane; t < last; t += 64u) {
        part = with_score(part, scores[row * p.stride + t]);
    }
    lane_part[lane] = part;
    workgroupBarrier();
    if lane == 0u {
        for (var i = 1u; i < 64u; i += 1u) {
            part = join(part, lane_part[i]);
        }
        parts[row * p.chunks + group.x] = part;
    }
}

var<workgroup> head_lse: array<f32, GROUP>;

@compute @workgroup_size(64)
fn pool(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let count = length(group.z, group.y);
    let head0 = group.z * p.heads + group.y * GROUP;
    for (var h = lane; h < GROUP; h += 64u) {
        var part = vec2<f32>(LOWEST, 0.0);
        for (var c = 0u; SOFTMAX && c * CHUNK < count; c += 1u) {
            part = join(part, parts[(head0 + h) * p.chunks + c]);
        }
        // A head whose scores are all -infinity leaves them as they are.
        head_lse[h] = select(0.0, part.x + log(part.y), part.y > 0.0);
    }
    workgroupBarrier();
    let base = (group.z * p.rows + group.y) * p.stride;
    for (var t = group.x * 64u + lane; t < count; t += groups.x * 64u) {
        if SUM && !SOFTMAX {
            var sum = 0.0;
            var all = true;
            for (var h = 0u; h < GROUP; h += 1u) {
                let s = scores[(head0 + h) * p.stride + t];
                all = all && s > LOWEST;
                sum += select(0.0, s, s > LOWEST);
            }
            out[base + t] = select(MINUS_INF, bitcast<u32>(sum), all);
            continue;
        }
        var largest = LOWEST;
        for (var h = 0u; h < GROUP; h += 1u) {
            largest = max(largest, scores[(head0 + h) * p.stride + t] - head_lse[h]);
        }
        if SUM && largest > LOWEST {
            var sum = 0.0;
            for (var h = 0u; h < GROUP; h += 1u) {
                sum += exp(scores[(head0 + h) * p.stride + t] - head_lse[h] - largest);
            }
            largest += log(sum);
        }
        out[base + t] = select(MINUS_INF, bitcast<u32>(largest), largest > LOWEST);
    }
}
