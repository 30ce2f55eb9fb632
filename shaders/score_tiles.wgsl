// Probabilities of keys, summed over the rows of a tile and the heads that share a list; workgroups of (64 keys, list,
// tile), one thread per key. 16 query vectors (row, head) at a time share a read of the key.

override HEAD_DIM: u32 = 64u;
override LEAD: u32 = 64u;
// Query heads per KV head.
override GROUP: u32 = 1u;

struct Params {
    heads: u32,
    kv_heads: u32,
    lists: u32,
    n_pages: u32,
    stride: u32,
    scale: f32,
    // HEAD_DIM, for loops that are not to be unrolled.
    head_dim: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> sequences: array<u32>;
@group(0) @binding(3) var<storage, read> pages: array<u32>;
@group(0) @binding(5) var<storage, read> lse: array<f32>;
@group(0) @binding(6) var<storage, read_write> scores: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let record = group.z * META_WORDS;
    let q_start = sequences[record + META_Q_START];
    let q_len = sequences[record + META_Q_LEN];
    let kv_len = sequences[record + META_KV_LEN];
    let token = group.x * PAGE + lane;
    if token >= kv_len || kv_len < q_len {
        return;
    }
    let offset = kv_len - q_len;
    // Rows from `first` on see the token.
    let first = select(0u, token - offset, token > offset);
    let page = min(pages[sequences[record + META_PAGES] + group.x], p.n_pages - 1u);
    let per_list = p.kv_heads / p.lists;
    var sum = 0.0;
    for (var h = group.y * per_list; h < (group.y + 1u) * per_list; h += 1u) {
        let tile = (page * p.kv_heads + h) * PAGE * HEAD_DIM;
        for (var v0 = first * GROUP; v0 < q_len * GROUP; v0 += 16u) {
            let n = min(16u, q_len * GROUP - v0);
            var acc = array<f32, 16>();
            for (var d = 0u; d < p.head_dim; d += 4u) {
                let key = k4(tile + k_offset(LEAD, HEAD_DIM, lane, d));
                for (var i = 0u; i < n; i += 1u) {
                    let v = v0 + i;
                    let item = (q_start + v / GROUP) * p.heads + h * GROUP + v % GROUP;
                    acc[i] += dot(key, q[(item * HEAD_DIM + d) / 4u]);
                }
            }
            for (var i = 0u; i < n; i += 1u) {
                let v = v0 + i;
                let item = (q_start + v / GROUP) * p.heads + h * GROUP + v % GROUP;
                sum += exp(acc[i] * p.scale - lse[item]);
            }
        }
    }
    scores[(group.z * p.lists + group.y) * p.stride + token] = sum;
}
