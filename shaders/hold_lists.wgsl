// Token lists that steps share, one thread per entry; workgroups of (64 entries, list, sequence).

struct Params {
    // Sequences that have just chosen.
    fresh: u32,
    rows_per_seq: u32,
    // Room of a list as it was chosen, and as it is attended with.
    k: u32,
    room: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> chosen: array<u32>;
@group(0) @binding(3) var<storage, read> chosen_counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> held: array<u32>;
// Per (slot, list): tokens, and kv_len when they were chosen.
@group(0) @binding(5) var<storage, read_write> marks: array<u32>;
@group(0) @binding(6) var<storage, read_write> indices: array<u32>;
@group(0) @binding(7) var<storage, read_write> counts: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let kv_len = sequences[group.z * META_WORDS + META_KV_LEN];
    let row = group.z * p.rows_per_seq + group.y;
    let own = sequences[group.z * META_WORDS + META_SLOT] * p.rows_per_seq + group.y;
    let now = group.z < p.fresh;
    // The marks of a fresh list are written below and not read by any other workgroup.
    var n = 0u;
    var at = kv_len;
    if now {
        n = min(chosen_counts[row], p.k);
    } else {
        n = min(marks[2u * own], p.k);
        at = min(marks[2u * own + 1u], kv_len);
    }
    let total = min(n + (kv_len - at), p.room);
    for (var i = group.x * 64u + lane; i < total; i += groups.x * 64u) {
        var token = at + (i - n);
        if i < n {
            if now {
                token = chosen[row * p.k + i];
                held[own * p.k + i] = token;
            } else {
                token = held[own * p.k + i];
            }
        }
        indices[row * p.room + i] = token;
    }
    if group.x == 0u && lane == 0u {
        counts[row] = total;
        if now {
            marks[2u * own] = n;
            marks[2u * own + 1u] = kv_len;
        }
    }
}
