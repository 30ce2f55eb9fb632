// Rewrites the marked columns of the compact slice for all tokens; workgroups of (page, KV head, sequence).

struct Params {
    kv_heads: u32,
    head_dim: u32,
    lead: u32,
    n_pages: u32,
    n_dims: u32,
    capacity: u32,
    slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k: array<u32>;
@group(0) @binding(4) var<storage, read> dims: array<u32>;
@group(0) @binding(5) var<storage, read> changed: array<u32>;
@group(0) @binding(6) var<storage, read_write> slice: array<u32>;

// u32 words of `changed` per (slot, KV head).
const CHANGED_WORDS: u32 = 8u;

fn is_changed(slot_head: u32, column: u32) -> bool {
    return ((changed[slot_head * CHANGED_WORDS + column / 32u] >> (column % 32u)) & 1u) == 1u;
}

// Bits of the key at column `column`, row `row` of the tile.
fn key_bits(slot_head: u32, column: u32, tile: u32, row: u32) -> u32 {
    let dim = min(dims[slot_head * p.n_dims + column], p.head_dim - 1u);
    let at = tile * PAGE * p.head_dim + k_offset(p.lead, p.head_dim, row, dim);
    let word = k[word_of(at)];
    if DTYPE == 0u {
        return word;
    }
    return select(word & 0xffffu, word >> 16u, (at & 1u) == 1u);
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
    let slot = sequences[record + META_SLOT];
    if slot >= p.slots || kv_len > p.capacity {
        return;
    }
    let slot_head = slot * p.kv_heads + head;
    var any = 0u;
    for (var w = 0u; w < CHANGED_WORDS; w += 1u) {
        any |= changed[slot_head * CHANGED_WORDS + w];
    }
    if any == 0u {
        return;
    }
    let words = select(p.n_dims / 2u, p.n_dims, DTYPE == 0u);
    for (var first = group.x * PAGE; first < kv_len; first += groups.x * PAGE) {
        let page = pages[page_list + first / PAGE];
        if page >= p.n_pages {
            continue;
        }
        let tile = page * p.kv_heads + head;
        let count = min(PAGE, kv_len - first);
        for (var e = lane; e < count * words; e += 64u) {
            let row = e / words;
            let word = e % words;
            let at = (slot_head * p.capacity + first + row) * words + word;
            if DTYPE == 0u {
                if is_changed(slot_head, word) {
                    slice[at] = key_bits(slot_head, word, tile, row);
                }
            } else {
                let low = is_changed(slot_head, 2u * word);
                let high = is_changed(slot_head, 2u * word + 1u);
                if low || high {
                    var bits = slice[at];
                    if low {
                        bits = (bits & 0xffff0000u) | key_bits(slot_head, 2u * word, tile, row);
                    }
                    if high {
                        bits = (bits & 0xffffu) | (key_bits(slot_head, 2u * word + 1u, tile, row) << 16u);
                    }
                    slice[at] = bits;
                }
            }
        }
    }
}
