// Projects decode queries (`queries`) and the new keys of their sequences (`keys`) on directions per KV head; `mark`
// then notes how many keys are there.

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    lead: u32,
    n_pages: u32,
    // Directions of a KV head.
    n: u32,
    capacity: u32,
    slots: u32,
    sequences: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> q: array<f32>;
@group(0) @binding(4) var<storage, read> k: array<u32>;
@group(0) @binding(5) var<storage, read> basis: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;
@group(0) @binding(7) var<storage, read_write> slice: array<u32>;
@group(0) @binding(8) var<storage, read_write> done: array<u32>;

@compute @workgroup_size(64)
fn queries(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let record = group.y * META_WORDS;
    if sequences[record + META_Q_LEN] == 0u {
        return;
    }
    let base = (sequences[record + META_Q_START] * p.heads + group.x) * p.head_dim;
    let head = group.x / (p.heads / p.kv_heads);
    for (var i = lane; i < p.head_dim; i += 64u) {
        var sum = 0.0;
        if i < p.n {
            let row = (head * p.n + i) * p.head_dim;
            for (var j = 0u; j < p.head_dim; j += 1u) {
                sum += basis[row + j] * q[base + j];
            }
        }
        out[base + i] = sum;
    }
}

// Direction `i` of the key in row `row` of a tile.
fn along(head: u32, tile: u32, row: u32, i: u32) -> f32 {
    let at = tile * PAGE * p.head_dim;
    let direction = (head * p.n + i) * p.head_dim;
    var sum = 0.0;
    for (var j = 0u; j < p.head_dim; j += 1u) {
        let e = at + k_offset(p.lead, p.head_dim, row, j);
        sum += basis[direction + j] * element(k[word_of(e)], e);
    }
    return sum;
}

@compute @workgroup_size(64)
fn keys(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = group.y;
    let record = group.z * META_WORDS;
    let kv_len = sequences[record + META_KV_LEN];
    let page_list = sequences[record + META_PAGES];
    let slot = sequences[record + META_SLOT];
    if slot >= p.slots || kv_len > p.capacity {
        return;
    }
    let slot_head = slot * p.kv_heads + head;
    let first = min(done[slot_head], kv_len);
    // Two numbers a word where they have 16 bits.
    let words = select(p.n / 2u, p.n, DTYPE == 0u);
    for (var page = first / PAGE + group.x; page * PAGE < kv_len; page += groups.x) {
        let number = pages[page_list + page];
        if number >= p.n_pages {
            continue;
        }
        let tile = number * p.kv_heads + head;
        let start = max(first, page * PAGE);
        let count = min(kv_len, (page + 1u) * PAGE) - start;
        for (var e = lane; e < count * words; e += 64u) {
            let t = start + e / words;
            let word = e % words;
            let at = (slot_head * p.capacity + t) * words + word;
            if DTYPE == 0u {
                slice[at] = bitcast<u32>(along(head, tile, t % PAGE, word));
            } else {
                let low = along(head, tile, t % PAGE, 2u * word);
                slice[at] = pack2(vec2<f32>(low, along(head, tile, t % PAGE, 2u * word + 1u)));
            }
        }
    }
}
