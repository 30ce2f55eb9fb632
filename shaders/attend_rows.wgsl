// Causal attention over listed tokens; workgroups of (split, heads that share a list, sequence and row).

struct Params {
    rows: u32,
    heads: u32,
    kv_heads: u32,
    // Room of one list, and lists per sequence.
    k: u32,
    lists: u32,
    splits: u32,
    scale: f32,
    // HEAD_DIM, for loops that are not to be unrolled.
    head_dim: u32,
    // 1 where `head_map` names the list of each KV head.
    mapped: u32,
    // Most rows of a sequence.
    max_q: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(8) var<storage, read> indices: array<u32>;
@group(0) @binding(9) var<storage, read> counts: array<u32>;
@group(0) @binding(10) var<storage, read> head_map: array<u32>;

var<private> list_base: u32;
var<private> list_tokens: u32;

fn token_at(i: u32) -> u32 {
    let t = indices[list_base + i];
    return select(NO_TOKEN, t, t < list_tokens);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z / p.max_q;
    let i = group.z % p.max_q;
    let q_len = record(sequence, META_Q_LEN);
    let kv_len = record(sequence, META_KV_LEN);
    if i >= q_len || kv_len < q_len {
        return;
    }
    let head = group.y * HEADS;
    var own = 0u;
    if p.mapped == 1u {
        own = head_map[head / GROUP];
    } else {
        own = head / (p.heads / p.lists);
    }
    // A list that is not there is empty.
    let there = own < p.lists;
    let list = sequence * p.lists + select(0u, own, there);
    let row = record(sequence, META_Q_START) + i;
    list_base = list * p.k;
    // Tokens up to the row's own.
    list_tokens = kv_len - q_len + i + 1u;
    let count = select(0u, min(counts[list], p.k), there);
    let piece = (count + p.splits - 1u) / p.splits;
    let first = min(group.x * piece, count);
    let last = min(first + piece, count);
    let out_row = (group.x * p.rows + row) * p.heads + head;
    flash_decode(
        lane, sequence, row, p.heads, p.kv_heads, head, first, last, p.scale, p.head_dim, out_row,
    );
}
