// Scores of blocks from scores of summaries. `totals` leaves the log-sum-exp of every score row (softmax pools
// only); `pool` pools the heads summary by summary, takes the largest summary of each block and forces blocks.

// Heads that share a row of blocks.
override GROUP: u32 = 1u;
// 0 sum of logits, 1 largest logit, 2 largest probability, 3 mean probability.
override MODE: u32 = 1u;

struct Params {
    // Score rows and block rows of a sequence.
    heads: u32,
    rows: u32,
    stride: u32,
    block_stride: u32,
    run: u32,
    unit: u32,
    // Summaries that reach into a block from behind it.
    beyond: u32,
    sinks: u32,
    recent: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> scores: array<f32>;
@group(0) @binding(3) var<storage, read_write> totals_of: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<u32>;

var<workgroup> lane_part: array<vec2<f32>, 64>;

@compute @workgroup_size(64)
fn totals(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.y * META_WORDS + META_KV_LEN];
    let row = group.y * p.heads + group.x;
    let n = (kv_len + p.run - 1u) / p.run;
    var part = vec2<f32>(LOWEST, 0.0);
    for (var g = lane; g < n; g += 64u) {
        let s = scores[row * p.stride + g];
        if s > LOWEST {
            part = join(part, vec2<f32>(s, 1.0));
        }
    }
    lane_part[lane] = part;
    workgroupBarrier();
    if lane == 0u {
        for (var i = 1u; i < 64u; i += 1u) {
            part = join(part, lane_part[i]);
        }
        // A head whose scores are all -infinity leaves them as they are.
        totals_of[row] = select(0.0, part.x + log(part.y), part.y > 0.0);
    }
}

var<workgroup> head_total: array<f32, 16>;

// Score of summary `g` over the heads from row `first` on.
fn pooled(first: u32, g: u32) -> f32 {
    var largest = LOWEST;
    var sum = 0.0;
    for (var h = 0u; h < GROUP; h += 1u) {
        let s = scores[(first + h) * p.stride + g] - head_total[h];
        largest = max(largest, s);
        sum += s;
    }
    if MODE == 0u {
        return finite(sum);
    }
    if MODE == 3u && largest > LOWEST {
        sum = 0.0;
        for (var h = 0u; h < GROUP; h += 1u) {
            sum += exp(scores[(first + h) * p.stride + g] - head_total[h] - largest);
        }
        return largest + log(sum);
    }
    return largest;
}

@compute @workgroup_size(64)
fn pool(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.z * META_WORDS + META_KV_LEN];
    let first = group.z * p.heads + group.y * GROUP;
    if lane < GROUP {
        var total = 0.0;
        if MODE >= 2u {
            total = totals_of[first + lane];
        }
        head_total[lane] = total;
    }
    workgroupBarrier();
    let n = (kv_len + p.run - 1u) / p.run;
    let own = p.unit / p.run;
    // Tokens before the recent ones.
    let old = kv_len - min(p.recent, kv_len);
    let base = (group.z * p.rows + group.y) * p.block_stride;
    for (var b = group.x * 64u + lane; b * p.unit < kv_len; b += groups.x * 64u) {
        var best = LOWEST;
        for (var g = own * b; g < min(n, own * (b + 1u) + p.beyond); g += 1u) {
            best = max(best, pooled(first, g));
        }
        let forced = b * p.unit < p.sinks || (p.recent > 0u && (b + 1u) * p.unit > old);
        out[base + b] = select(score_bits(best), PLUS_INF, forced);
    }
}
