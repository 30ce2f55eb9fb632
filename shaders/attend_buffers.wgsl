// Buffers and accessors shared by attend_dense.wgsl and attend_rows.wgsl.

override HAS_LSE: bool = false;

@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> sequences: array<u32>;
@group(0) @binding(3) var<storage, read> pages: array<u32>;
@group(0) @binding(5) var<storage, read> v: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> lse: array<u32>;

fn record(sequence: u32, word: u32) -> u32 {
    return sequences[sequence * META_WORDS + word];
}

// Page `i` of the sequence's list.
fn page_of(sequence: u32, i: u32) -> u32 {
    return pages[record(sequence, META_PAGES) + i];
}

// Four elements of the V pages from `at` on (a multiple of 4).
fn v4(at: u32) -> vec4<f32> {
    if DTYPE == 0u {
        return vec4<f32>(bitcast<vec2<f32>>(v[at / 2u]), bitcast<vec2<f32>>(v[at / 2u + 1u]));
    }
    let w = v[at / 4u];
    return unpack4(w.x, w.y);
}

fn write_lse(row: u32, largest: f32, total: f32) {
    if HAS_LSE {
        lse[row] = select(MINUS_INF, bitcast<u32>(largest + log(total)), total > 0.0);
    }
}
