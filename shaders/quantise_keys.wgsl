// Brings the chosen key dimensions of every token, in 4 or 8 bits, up to date (`main`); `mark` then notes how many
// tokens are there.

struct Params {
    kv_heads: u32,
    head_dim: u32,
    lead: u32,
    n_pages: u32,
    // Chosen dimensions, and how many of them a word holds: 4 or 8.
    n: u32,
    per_word: u32,
    capacity: u32,
    slots: u32,
    sequences: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k: array<u32>;
@group(0) @binding(4) var<storage, read> dims: array<u32>;
@group(0) @binding(5) var<storage, read_write> data: array<u32>;
@group(0) @binding(6) var<storage, read_write> scales: array<f32>;
@group(0) @binding(7) var<storage, read_write> done: array<u32>;

// The key in row `row` of a tile at column `c`.
fn chosen(slot_head: u32, tile: u32, row: u32, c: u32) -> f32 {
    let dim = min(dims[slot_head * p.n + c], p.head_dim - 1u);
    let at = tile * PAGE * p.head_dim + k_offset(p.lead, p.head_dim, row, dim);
    return element(k[word_of(at)], at);
}

// Workgroups of (page, KV head, sequence), a lane a token.
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
    let slot = sequences[record + META_SLOT];
    if slot >= p.slots || kv_len > p.capacity {
        return;
    }
    let slot_head = slot * p.kv_heads + head;
    let first = min(done[slot_head], kv_len);
    let bits = 32u / p.per_word;
    let most = select(127.0, 7.0, p.per_word == 8u);
    let mask = select(0xffu, 0xfu, p.per_word == 8u);
    for (var page = first / PAGE + group.x; page * PAGE < kv_len; page += groups.x) {
        let number = pages[page_list + page];
        let t = page * PAGE + lane;
        if number >= p.n_pages || t < first || t >= kv_len {
            continue;
        }
        let tile = number * p.kv_heads + head;
        var top = 0.0;
        for (var c = 0u; c < p.n; c += 1u) {
            top = max(top, abs(chosen(slot_head, tile, lane, c)));
        }
        let scale = top / most;
        let row = slot_head * p.capacity + t;
        scales[row] = scale;
        for (var c = 0u; c < p.n; c += p.per_word) {
            var word = 0u;
            for (var i = 0u; i < p.per_word; i += 1u) {
                var x = 0.0;
                if scale > 0.0 {
                    x = clamp(round(chosen(slot_head, tile, lane, c + i) / scale), -most, most);
                }
                word |= (bitcast<u32>(i32(x)) & mask) << (bits * i);
            }
            data[(row * p.n + c) / p.per_word] = word;
        }
    }
}
