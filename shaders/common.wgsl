// Functions shared by the shaders; every shader is compiled with this file in front of it.

// Dtype of the op's typed buffers: 0 f32, 1 f16, 2 bf16. Typed buffers are bound as words and unpacked here.
override DTYPE: u32 = 0u;

// Stands for minus infinity inside the kernels; f32 infinities have no literal in WGSL.
const LOWEST: f32 = -3.0e38;
// Bit patterns of the infinities, for results that must hold one.
const PLUS_INF: u32 = 0x7f800000u;
const MINUS_INF: u32 = 0xff800000u;
// Tokens of one KV page, and words of one sequence's record in `meta`.
const PAGE: u32 = 64u;
const META_WORDS: u32 = 8u;
const META_Q_START: u32 = 0u;
const META_Q_LEN: u32 = 1u;
const META_KV_LEN: u32 = 2u;
const META_PAGES: u32 = 3u;
const META_SLOT: u32 = 4u;
const META_STEP: u32 = 5u;

// Two 16-bit floats of one word.
fn unpack2(w: u32) -> vec2<f32> {
    if DTYPE == 1u {
        return unpack2x16float(w);
    }
    return vec2<f32>(bitcast<f32>(w << 16u), bitcast<f32>(w & 0xffff0000u));
}

// Four 16-bit floats of two words.
fn unpack4(a: u32, b: u32) -> vec4<f32> {
    return vec4<f32>(unpack2(a), unpack2(b));
}

// Element `i` of a word array of dtype DTYPE sits in this word.
fn word_of(i: u32) -> u32 {
    if DTYPE == 0u {
        return i;
    }
    return i >> 1u;
}

// Element `i`, given its word.
fn element(word: u32, i: u32) -> f32 {
    if DTYPE == 0u {
        return bitcast<f32>(word);
    }
    let both = unpack2(word);
    return select(both.x, both.y, (i & 1u) == 1u);
}

// f32 to bf16, round to nearest even.
fn bf16_bits(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    if (b & 0x7fffffffu) > PLUS_INF {
        return (b >> 16u) | 0x40u;
    }
    return (b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u;
}

// f32 to f16, round to nearest even; pack2x16float leaves the rounding to the driver.
fn f16_bits(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    let sign = (b >> 16u) & 0x8000u;
    let a = b & 0x7fffffffu;
    if a > PLUS_INF {
        return sign | 0x7e00u;
    }
    if a >= 0x477ff000u {
        return sign | 0x7c00u;
    }
    if a < 0x38800000u {
        return sign | u32(round(bitcast<f32>(a) * 16777216.0));
    }
    return sign | ((a + 0xfffu + ((a >> 13u) & 1u) - 0x38000000u) >> 13u);
}

// Two 16-bit floats in one word.
fn pack2(v: vec2<f32>) -> u32 {
    if DTYPE == 1u {
        return f16_bits(v.x) | (f16_bits(v.y) << 16u);
    }
    return bf16_bits(v.x) | (bf16_bits(v.y) << 16u);
}

// `x` as it reads back from a buffer of dtype DTYPE.
fn rounded(x: f32) -> f32 {
    if DTYPE == 0u {
        return x;
    }
    return unpack2(pack2(vec2<f32>(x, 0.0))).x;
}

// Linear workgroup index of a grid folded into two dimensions.
fn flat_group(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.y * groups.x + group.x;
}

// Offset of dimension `i` of row `row` inside a K tile of `lead` leading dimensions.
fn k_offset(lead: u32, head_dim: u32, row: u32, i: u32) -> u32 {
    if i < lead {
        return row * lead + i;
    }
    return PAGE * lead + row * (head_dim - lead) + (i - lead);
}

// LOWEST for what is not finite; tested by bits, because drivers may assume that there is no NaN.
fn finite(x: f32) -> f32 {
    return select(x, LOWEST, (bitcast<u32>(x) & PLUS_INF) == PLUS_INF);
}

// Bits of a score; -infinity, which top_k never takes, for LOWEST.
fn score_bits(x: f32) -> u32 {
    return select(MINUS_INF, bitcast<u32>(x), x > LOWEST);
}

// Order-preserving image of a score; 0 for NaN and -infinity, which are never chosen.
fn image(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > PLUS_INF || bits == MINUS_INF {
        return 0u;
    }
    if bits == 0x80000000u {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

// Eight consecutive values.
struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

// Joins two partial log-sum-exps: (largest, sum of exponentials).
fn join(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    let m = max(a.x, b.x);
    return vec2<f32>(m, a.y * exp(a.x - m) + b.y * exp(b.x - m));
}

// A partial log-sum-exp with one more score; those of -infinity and NaN count as nothing.
fn with_score(part: vec2<f32>, s: f32) -> vec2<f32> {
    if s > part.x {
        return vec2<f32>(s, part.y * exp(part.x - s) + 1.0);
    }
    return select(part, vec2<f32>(part.x, part.y + exp(s - part.x)), s > LOWEST);
}
