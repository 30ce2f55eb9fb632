// Writes the step's keys and values into the pages (`pages_main`), into the int8 copy (`int8_main`) and into
// the compact slice (`slice_main`). One workgroup per (row of a sequence, KV head, sequence).

struct Params {
    k_stride: u32,
    v_stride: u32,
    k_offset: u32,
    v_offset: u32,
    kv_heads: u32,
    head_dim: u32,
    lead: u32,
    n_pages: u32,
    // Leading dimensions of the int8 copy.
    int8_dims: u32,
    // Compact slice.
    n_dims: u32,
    capacity: u32,
    slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
@group(0) @binding(3) var<storage, read> sequences: array<u32>;
@group(0) @binding(4) var<storage, read> pages: array<u32>;
@group(0) @binding(5) var<storage, read_write> k_pages: array<u32>;
@group(0) @binding(6) var<storage, read_write> v_pages: array<u32>;
@group(0) @binding(7) var<storage, read_write> int8_keys: array<u32>;
@group(0) @binding(8) var<storage, read_write> int8_scale: array<f32>;
@group(0) @binding(9) var<storage, read_write> slice: array<u32>;
@group(0) @binding(10) var<storage, read> dims: array<u32>;

fn record(sequence: u32, word: u32) -> u32 {
    return sequences[sequence * META_WORDS + word];
}

// Index of (page, head) of token `t`, or 0xffffffff where the page table is wrong.
fn tile_of(sequence: u32, t: u32, head: u32) -> u32 {
    let page = pages[record(sequence, META_PAGES) + t / PAGE];
    return select(0xffffffffu, page * p.kv_heads + head, page < p.n_pages);
}

@compute @workgroup_size(64)
fn pages_main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z;
    let head = group.y;
    let q_len = record(sequence, META_Q_LEN);
    for (var i = group.x; i < q_len; i += groups.x) {
        let row = record(sequence, META_Q_START) + i;
        let t = record(sequence, META_KV_LEN) - q_len + i;
        let tile = tile_of(sequence, t, head);
        if tile == 0xffffffffu {
            continue;
        }
        let base = tile * PAGE * p.head_dim;
        let k_row = p.k_offset + row * p.k_stride + head * p.head_dim;
        let v_row = p.v_offset + row * p.v_stride + head * p.head_dim;
        if DTYPE == 0u {
            for (var d = lane; d < p.head_dim; d += 64u) {
                k_pages[base + k_offset(p.lead, p.head_dim, t % PAGE, d)] = bitcast<u32>(k[k_row + d]);
                v_pages[base + (t % PAGE) * p.head_dim + d] = bitcast<u32>(v[v_row + d]);
            }
        } else {
            for (var d = 2u * lane; d < p.head_dim; d += 128u) {
                let at = base + k_offset(p.lead, p.head_dim, t % PAGE, d);
                k_pages[at / 2u] = pack2(vec2<f32>(k[k_row + d], k[k_row + d + 1u]));
                let v_at = base + (t % PAGE) * p.head_dim + d;
                v_pages[v_at / 2u] = pack2(vec2<f32>(v[v_row + d], v[v_row + d + 1u]));
            }
        }
    }
}

var<workgroup> partial: array<f32, 64>;

// One byte of the int8 copy; `scale` is 0 for a zero row.
fn quantised(x: f32, scale: f32) -> u32 {
    if scale == 0.0 {
        return 0u;
    }
    return bitcast<u32>(i32(clamp(round(x / scale), -127.0, 127.0))) & 0xffu;
}

@compute @workgroup_size(64)
fn int8_main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z;
    let head = group.y;
    let q_len = record(sequence, META_Q_LEN);
    for (var i = group.x; i < q_len; i += groups.x) {
        let row = record(sequence, META_Q_START) + i;
        let t = record(sequence, META_KV_LEN) - q_len + i;
        let k_row = p.k_offset + row * p.k_stride + head * p.head_dim;
        var largest = 0.0;
        for (var d = lane; d < p.int8_dims; d += 64u) {
            largest = max(largest, abs(rounded(k[k_row + d])));
        }
        partial[lane] = largest;
        workgroupBarrier();
        for (var j = 0u; j < 64u; j += 1u) {
            largest = max(largest, partial[j]);
        }
        let scale = largest / 127.0;
        let tile = tile_of(sequence, t, head);
        if tile != 0xffffffffu {
            let at = tile * PAGE + t % PAGE;
            for (var d = 4u * lane; d < p.int8_dims; d += 256u) {
                var word = 0u;
                for (var j = 0u; j < 4u; j += 1u) {
                    word |= quantised(rounded(k[k_row + d + j]), scale) << (8u * j);
                }
                int8_keys[(at * p.int8_dims + d) / 4u] = word;
            }
            if lane == 0u {
                int8_scale[at] = scale;
            }
        }
        workgroupBarrier();
    }
}

@compute @workgroup_size(64)
fn slice_main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let sequence = group.z;
    let head = group.y;
    let q_len = record(sequence, META_Q_LEN);
    let kv_len = record(sequence, META_KV_LEN);
    let slot = record(sequence, META_SLOT);
    if kv_len > p.capacity || slot >= p.slots {
        return;
    }
    let slot_head = (slot * p.kv_heads + head) * p.n_dims;
    for (var i = group.x; i < q_len; i += groups.x) {
        let k_row = p.k_offset + (record(sequence, META_Q_START) + i) * p.k_stride + head * p.head_dim;
        let t = kv_len - q_len + i;
        let base = ((slot * p.kv_heads + head) * p.capacity + t) * p.n_dims;
        if DTYPE == 0u {
            for (var c = lane; c < p.n_dims; c += 64u) {
                slice[base + c] = bitcast<u32>(k[k_row + min(dims[slot_head + c], p.head_dim - 1u)]);
            }
        } else {
            for (var c = 2u * lane; c < p.n_dims; c += 128u) {
                let a = k[k_row + min(dims[slot_head + c], p.head_dim - 1u)];
                let b = k[k_row + min(dims[slot_head + c + 1u], p.head_dim - 1u)];
                slice[(base + c) / 2u] = pack2(vec2<f32>(a, b));
            }
        }
    }
}
