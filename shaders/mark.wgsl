// Notes how many tokens of each sequence are done: after the source of an op that brings a copy of keys up to date,
// whose `p`, `sequences` and `done` it reads and writes. A thread a (sequence, KV head).

@compute @workgroup_size(64)
fn mark(
    @builtin(global_invocation_id) id: vec3<u32>,
) {
    if id.x >= p.sequences * p.kv_heads {
        return;
    }
    let record = id.x / p.kv_heads * META_WORDS;
    let slot = sequences[record + META_SLOT];
    let kv_len = sequences[record + META_KV_LEN];
    if slot < p.slots && kv_len <= p.capacity {
        done[slot * p.kv_heads + id.x % p.kv_heads] = kv_len;
    }
}
