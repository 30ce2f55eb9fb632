// out[i, :] = x[rows[i], :], one thread per output word.

struct Params {
    n: u32,
    x_rows: u32,
    cols: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<u32>;

// Bits of element `e` of the output.
fn source_bits(e: u32) -> u32 {
    let row = rows[e / p.cols];
    if row >= p.x_rows {
        return 0u;
    }
    let i = row * p.cols + e % p.cols;
    let word = x[word_of(i)];
    if DTYPE == 0u {
        return word;
    }
    return select(word & 0xffffu, word >> 16u, (i & 1u) == 1u);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let w = flat_group(group, groups) * 64u + lane;
    let total = p.n * p.cols;
    if DTYPE == 0u {
        if w < total {
            out[w] = source_bits(w);
        }
        return;
    }
    let e = w * 2u;
    if e >= total {
        return;
    }
    var high = out[w] & 0xffff0000u;
    if e + 1u < total {
        high = source_bits(e + 1u) << 16u;
    }
    out[w] = source_bits(e) | high;
}
