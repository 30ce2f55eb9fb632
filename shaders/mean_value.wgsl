// The mean value in place of the tokens that were left out: out = alpha out + (1 - alpha) sum_v / kv_len, with alpha
// the share of the estimated softmax that the listed tokens hold. One workgroup per (query head, sequence).

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    stride: u32,
    // Room of a list, and lists of a sequence.
    k: u32,
    lists: u32,
    slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> scores: array<f32>;
@group(0) @binding(3) var<storage, read> indices: array<u32>;
@group(0) @binding(4) var<storage, read> counts: array<u32>;
@group(0) @binding(5) var<storage, read> sums: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;

var<workgroup> lane_part: array<vec2<f32>, 64>;
var<workgroup> lane_kept: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = group.x;
    let record = group.y * META_WORDS;
    let kv_len = sequences[record + META_KV_LEN];
    let slot = sequences[record + META_SLOT];
    let row = (group.y * p.heads + head) * p.stride;
    var part = vec2<f32>(LOWEST, 0.0);
    for (var t = lane; t < kv_len; t += 64u) {
        part = with_score(part, scores[row + t]);
    }
    lane_part[lane] = part;
    workgroupBarrier();
    // Every lane joins all parts in the same order.
    var whole = vec2<f32>(LOWEST, 0.0);
    for (var i = 0u; i < 64u; i += 1u) {
        whole = join(whole, lane_part[i]);
    }
    let list = group.y * p.lists + head * p.lists / p.heads;
    let count = min(counts[list], p.k);
    var mine = 0.0;
    for (var i = lane; i < count; i += 64u) {
        let t = indices[list * p.k + i];
        if t < kv_len {
            let s = scores[row + t];
            if s > LOWEST {
                mine += exp(s - whole.x);
            }
        }
    }
    lane_kept[lane] = mine;
    workgroupBarrier();
    var kept = 0.0;
    for (var i = 0u; i < 64u; i += 1u) {
        kept += lane_kept[i];
    }
    if whole.y <= 0.0 || slot >= p.slots || sequences[record + META_Q_LEN] == 0u {
        return;
    }
    let rest = clamp((whole.y - kept) / whole.y, 0.0, 1.0);
    if rest > 0.0 {
        let share = rest / f32(kv_len);
        let sum_base = (slot * p.kv_heads + head / (p.heads / p.kv_heads)) * 3u * p.head_dim;
        let base = (sequences[record + META_Q_START] * p.heads + head) * p.head_dim;
        for (var i = lane; i < p.head_dim; i += 64u) {
            out[base + i] = (1.0 - rest) * out[base + i] + share * sums[sum_base + i];
        }
    }
}
