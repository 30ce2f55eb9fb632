// Adds the step's keys to the running sums of their slot; one workgroup per (KV head, sequence), one thread
// per rotary pair, tokens in order so that the sums do not depend on timing.

struct Params {
    kv_heads: u32,
    head_dim: u32,
    lead: u32,
    n_pages: u32,
    slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k: array<u32>;
@group(0) @binding(4) var<storage, read_write> stats: array<f32>;

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) pair: u32,
) {
    let head = group.x;
    let record = group.y * META_WORDS;
    let q_len = sequences[record + META_Q_LEN];
    let kv_len = sequences[record + META_KV_LEN];
    let page_list = sequences[record + META_PAGES];
    let slot = sequences[record + META_SLOT];
    let half = p.head_dim / 2u;
    if pair >= half || slot >= p.slots {
        return;
    }
    var sum = vec2<f32>();
    var squares = vec2<f32>();
    var norms = 0.0;
    for (var t = kv_len - q_len; t < kv_len; t += 1u) {
        let page = pages[page_list + t / PAGE];
        if page >= p.n_pages {
            continue;
        }
        let at = (page * p.kv_heads + head) * PAGE * p.head_dim
            + k_offset(p.lead, p.head_dim, t % PAGE, 2u * pair);
        var key: vec2<f32>;
        if DTYPE == 0u {
            key = vec2<f32>(bitcast<f32>(k[at]), bitcast<f32>(k[at + 1u]));
        } else {
            key = unpack2(k[at / 2u]);
        }
        sum += key;
        squares += key * key;
        norms += sqrt(dot(key, key));
    }
    let base = (slot * p.kv_heads + head) * 3u * p.head_dim;
    let square_base = base + p.head_dim;
    let norm_base = base + 2u * p.head_dim;
    if kv_len == q_len {
        stats[base + 2u * pair] = sum.x;
        stats[base + 2u * pair + 1u] = sum.y;
        stats[square_base + 2u * pair] = squares.x;
        stats[square_base + 2u * pair + 1u] = squares.y;
        stats[norm_base + pair] = norms;
        stats[norm_base + half + pair] = squares.x + squares.y;
    } else {
        stats[base + 2u * pair] += sum.x;
        stats[base + 2u * pair + 1u] += sum.y;
        stats[square_base + 2u * pair] += squares.x;
        stats[square_base + 2u * pair + 1u] += squares.y;
        stats[norm_base + pair] += norms;
        stats[norm_base + half + pair] += squares.x + squares.y;
    }
}
