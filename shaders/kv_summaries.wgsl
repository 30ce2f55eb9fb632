// Summaries of runs of keys that hold a new token (bounds, cuboids) or end with one (windows). One workgroup per
// (summary, KV head, sequence), one thread per pair of dimensions, tokens in order.

// 0 bounds, 1 cuboid of means, 2 windows.
override KIND: u32 = 0u;
// Tokens of a run, and those that a summary covers before it.
override RUN: u32 = 16u;
override BEFORE: u32 = 0u;

struct Params {
    kv_heads: u32,
    head_dim: u32,
    lead: u32,
    n_pages: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<u32>;

// Page of token `t`.
fn page_of(page_list: u32, t: u32) -> u32 {
    return min(pages[page_list + t / PAGE], p.n_pages - 1u);
}

fn key_pair(page_list: u32, head: u32, t: u32, pair: u32) -> vec2<f32> {
    let tile = page_of(page_list, t) * p.kv_heads + head;
    let at = tile * PAGE * p.head_dim + k_offset(p.lead, p.head_dim, t % PAGE, 2u * pair);
    if DTYPE == 0u {
        return vec2<f32>(bitcast<f32>(k[at]), bitcast<f32>(k[at + 1u]));
    }
    return unpack2(k[at / 2u]);
}

fn put(at: u32, v: vec2<f32>) {
    if DTYPE == 0u {
        out[at] = bitcast<u32>(v.x);
        out[at + 1u] = bitcast<u32>(v.y);
    } else {
        out[at / 2u] = pack2(v);
    }
}

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) pair: u32,
) {
    let head = group.y;
    let record = group.z * META_WORDS;
    let kv_len = sequences[record + META_KV_LEN];
    let page_list = sequences[record + META_PAGES];
    let first = (kv_len - sequences[record + META_Q_LEN]) / RUN;
    if 2u * pair >= p.head_dim {
        return;
    }
    let vectors = select(2u, 1u, KIND == 2u);
    for (var g = first + group.x; g * RUN < kv_len; g += groups.x) {
        let end = min((g + 1u) * RUN, kv_len);
        if KIND == 2u && (g * RUN < BEFORE || (g + 1u) * RUN > kv_len) {
            continue;
        }
        let start = g * RUN - BEFORE;
        let share = 1.0 / f32(end - start);
        var lo = key_pair(page_list, head, start, pair);
        var hi = lo;
        var sum = lo;
        for (var t = start + 1u; t < end; t += 1u) {
            let key = key_pair(page_list, head, t, pair);
            lo = min(lo, key);
            hi = max(hi, key);
            sum += key;
        }
        if KIND == 1u {
            let middle = 0.5 * lo + 0.5 * hi;
            var radius = vec2<f32>();
            for (var t = start; t < end; t += 1u) {
                radius += abs(key_pair(page_list, head, t, pair) - middle);
            }
            lo = middle - radius * share;
            hi = middle + radius * share;
        }
        let row = (page_of(page_list, g * RUN) * p.kv_heads + head) * (PAGE / RUN) + g % (PAGE / RUN);
        let at = row * vectors * p.head_dim + 2u * pair;
        if KIND == 2u {
            put(at, sum * share);
        } else {
            put(at, lo);
            put(at + p.head_dim, hi);
        }
    }
}
