// Logits of one decode query per sequence against summaries of its keys; workgroups of (64 summaries, KV head,
// sequence), one thread per summary. As lo <= hi, max(q lo, q hi) = min(q, 0) lo + max(q, 0) hi.

// Query heads per KV head.
override GROUP: u32 = 1u;
// Vectors of a summary: 2 for bounds and cuboids, 1 for the means of windows.
override VECTORS: u32 = 1u;
// Tokens of a run, and those that a summary covers before it.
override RUN: u32 = 16u;
override BEFORE: u32 = 0u;

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    n_pages: u32,
    stride: u32,
    scale: f32,
    // First dimension that counts, and how many do.
    first: u32,
    dims: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> sequences: array<u32>;
@group(0) @binding(3) var<storage, read> pages: array<u32>;
@group(0) @binding(4) var<storage, read> data: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> scores: array<u32>;

fn eight(at: u32) -> Eight {
    if DTYPE == 0u {
        return Eight(bitcast<vec4<f32>>(data[at / 4u]), bitcast<vec4<f32>>(data[at / 4u + 1u]));
    }
    let v = data[at / 8u];
    return Eight(unpack4(v.x, v.y), unpack4(v.z, v.w));
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = group.y;
    let record = group.z * META_WORDS;
    let kv_len = sequences[record + META_KV_LEN];
    let page_list = sequences[record + META_PAGES];
    let d = p.head_dim;
    let q_base = (sequences[record + META_Q_START] * p.heads + head * GROUP) * d;
    for (var g = group.x * 64u + lane; g * RUN < kv_len; g += groups.x * 64u) {
        let page = min(pages[page_list + g * RUN / PAGE], p.n_pages - 1u);
        let row = (page * p.kv_heads + head) * (PAGE / RUN) + g % (PAGE / RUN);
        let base = row * VECTORS * d;
        var acc = array<f32, 16>();
        for (var i = p.first; i < p.first + p.dims; i += 8u) {
            let lo = eight(base + i);
            var hi = lo;
            if VECTORS == 2u {
                hi = eight(base + d + i);
            }
            for (var r = 0u; r < GROUP; r += 1u) {
                let at = (q_base + r * d + i) / 4u;
                let a = q[at];
                let b = q[at + 1u];
                if VECTORS == 2u {
                    let zero = vec4<f32>();
                    acc[r] += dot(min(a, zero), lo.a) + dot(max(a, zero), hi.a)
                        + dot(min(b, zero), lo.b) + dot(max(b, zero), hi.b);
                } else {
                    acc[r] += dot(a, lo.a) + dot(b, lo.b);
                }
            }
        }
        let whole = g * RUN >= BEFORE && (g + 1u) * RUN <= kv_len;
        for (var r = 0u; r < GROUP; r += 1u) {
            let logit = select(LOWEST, finite(acc[r] * p.scale), VECTORS == 2u || whole);
            scores[(group.z * p.heads + head * GROUP + r) * p.stride + g] = score_bits(logit);
        }
    }
}
