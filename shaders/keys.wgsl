// The K pages of a layer, as attention and the scores of tiles read them.

@group(0) @binding(4) var<storage, read> k: array<vec2<u32>>;

// Four elements of the K pages from `at` on (a multiple of 4).
fn k4(at: u32) -> vec4<f32> {
    if DTYPE == 0u {
        return vec4<f32>(bitcast<vec2<f32>>(k[at / 2u]), bitcast<vec2<f32>>(k[at / 2u + 1u]));
    }
    let w = k[at / 4u];
    return unpack4(w.x, w.y);
}
