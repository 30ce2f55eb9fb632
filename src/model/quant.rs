//! Storage types of weights and their conversion to f32.
//!
//! A row is a sequence of blocks; every block of a type has the same number of elements and bytes.
//! The block layouts are those of the GGUF specification (ggml's `block_q*` structures, little
//! endian); `d` and `m` are half-precision scale and offset of a block.

use half::{bf16, f16};

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Quant {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// Blocks of 32: `d`, 32 signed bytes.
    Q8_0,
    /// Blocks of 32: `d`, 32 values of 4 bits.
    Q4_0,
    /// Blocks of 32: `d` and `m`, 32 values of 4 bits.
    Q4_1,
    /// Blocks of 32: `d`, 32 values of 5 bits.
    Q5_0,
    /// Blocks of 32: `d` and `m`, 32 values of 5 bits.
    Q5_1,
    /// Blocks of 256 in 8 groups with 6-bit scales and offsets, values of 4 bits.
    Q4_K,
    /// Blocks of 256 in 8 groups with 6-bit scales and offsets, values of 5 bits.
    Q5_K,
    /// Blocks of 256 in 16 groups with 8-bit scales, values of 6 bits.
    Q6_K,
}

impl Quant {
    /// Every type that can be read.
    pub const ALL: [Quant; 11] = [
        Quant::F32,
        Quant::F16,
        Quant::BF16,
        Quant::Q8_0,
        Quant::Q4_0,
        Quant::Q4_1,
        Quant::Q5_0,
        Quant::Q5_1,
        Quant::Q4_K,
        Quant::Q5_K,
        Quant::Q6_K,
    ];

    /// The type's name in the GGUF specification.
    pub fn name(self) -> &'static str {
        match self {
            Quant::F32 => "F32",
            Quant::F16 => "F16",
            Quant::BF16 => "BF16",
            Quant::Q8_0 => "Q8_0",
            Quant::Q4_0 => "Q4_0",
            Quant::Q4_1 => "Q4_1",
            Quant::Q5_0 => "Q5_0",
            Quant::Q5_1 => "Q5_1",
            Quant::Q4_K => "Q4_K",
            Quant::Q5_K => "Q5_K",
            Quant::Q6_K => "Q6_K",
        }
    }

    /// From the type number of a GGUF tensor entry (`enum ggml_type`).
    pub fn from_ggml(id: u32) -> Option<Quant> {
        Some(match id {
            0 => Quant::F32,
            1 => Quant::F16,
            2 => Quant::Q4_0,
            3 => Quant::Q4_1,
            6 => Quant::Q5_0,
            7 => Quant::Q5_1,
            8 => Quant::Q8_0,
            12 => Quant::Q4_K,
            13 => Quant::Q5_K,
            14 => Quant::Q6_K,
            30 => Quant::BF16,
            _ => return None,
        })
    }

    /// Elements in a block.
    pub fn block_len(self) -> usize {
        match self {
            Quant::F32 | Quant::F16 | Quant::BF16 => 1,
            Quant::Q8_0 | Quant::Q4_0 | Quant::Q4_1 | Quant::Q5_0 | Quant::Q5_1 => 32,
            Quant::Q4_K | Quant::Q5_K | Quant::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Quant::F32 => 4,
            Quant::F16 | Quant::BF16 => 2,
            Quant::Q8_0 => 34,
            Quant::Q4_0 => 18,
            Quant::Q4_1 => 20,
            Quant::Q5_0 => 22,
            Quant::Q5_1 => 24,
            Quant::Q4_K => 144,
            Quant::Q5_K => 176,
            Quant::Q6_K => 210,
        }
    }

    /// Bytes of `n` elements; `None` where `n` is not a whole number of blocks or the size overflows.
    pub fn bytes_for(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Converts whole blocks to f32: `out.len()` elements from `bytes`.
    ///
    /// # Panics
    /// When `bytes.len()` is not `bytes_for(out.len())`; callers derive both from checked shapes.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(Some(bytes.len()), self.bytes_for(out.len()));
        let block: fn(&[u8], &mut [f32]) = match self {
            Quant::F32 => |b, o| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Quant::F16 => |b, o| o[0] = half_at(b, 0),
            Quant::BF16 => |b, o| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Quant::Q8_0 => q8_0,
            Quant::Q4_0 => q4_0,
            Quant::Q4_1 => q4_1,
            Quant::Q5_0 => q5_0,
            Quant::Q5_1 => q5_1,
            Quant::Q4_K => q4_k,
            Quant::Q5_K => q5_k,
            Quant::Q6_K => q6_k,
        };
        for (b, o) in
            bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_len()))
        {
            block(b, o);
        }
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// d, 32 signed bytes: `y = d q`.
fn q8_0(b: &[u8], out: &mut [f32]) {
    let d = half_at(b, 0);
    for (o, &q) in out.iter_mut().zip(&b[2..34]) {
        *o = d * f32::from(q as i8);
    }
}

/// d, 16 bytes of nibbles (low: elements 0..16, high: 16..32): `y = d (q - 8)`.
fn q4_0(b: &[u8], out: &mut [f32]) {
    let d = half_at(b, 0);
    for (j, &q) in b[2..18].iter().enumerate() {
        out[j] = d * (f32::from(q & 15) - 8.0);
        out[j + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

/// d, m, 16 bytes of nibbles: `y = d q + m`.
fn q4_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for (j, &q) in b[4..20].iter().enumerate() {
        out[j] = d * f32::from(q & 15) + m;
        out[j + 16] = d * f32::from(q >> 4) + m;
    }
}

/// The fifth bits of elements `j` and `j + 16`, already shifted to bit 4.
fn fifth_bits(high: u32, j: usize) -> (u8, u8) {
    let bit = |at: usize| (((high >> at) & 1) as u8) << 4;
    (bit(j), bit(j + 16))
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// d, 32 fifth bits, 16 bytes of nibbles: `y = d (q - 16)`.
fn q5_0(b: &[u8], out: &mut [f32]) {
    let (d, high) = (half_at(b, 0), u32_at(b, 2));
    for (j, &q) in b[6..22].iter().enumerate() {
        let (lo, hi) = fifth_bits(high, j);
        out[j] = d * (f32::from((q & 15) | lo) - 16.0);
        out[j + 16] = d * (f32::from((q >> 4) | hi) - 16.0);
    }
}

/// d, m, 32 fifth bits, 16 bytes of nibbles: `y = d q + m`.
fn q5_1(b: &[u8], out: &mut [f32]) {
    let (d, m, high) = (half_at(b, 0), half_at(b, 2), u32_at(b, 4));
    for (j, &q) in b[8..24].iter().enumerate() {
        let (lo, hi) = fifth_bits(high, j);
        out[j] = d * f32::from((q & 15) | lo) + m;
        out[j + 16] = d * f32::from((q >> 4) | hi) + m;
    }
}

/// Scale and minimum (6 bits each) of group `j` of 8, from the 12 packed bytes of Q4_K and Q5_K.
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4),
            (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin, 12 bytes of 6-bit scales and minima for 8 groups of 32, 128 bytes of nibbles:
/// `y = d scale q - dmin min`. A run of 32 bytes holds two groups: low nibbles, then high ones.
fn q4_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin, packed) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
    for (pair, (qs, o)) in b[16..144].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (s0, m0) = scale_min(packed, 2 * pair);
        let (s1, m1) = scale_min(packed, 2 * pair + 1);
        for (l, &q) in qs.iter().enumerate() {
            o[l] = d * s0 * f32::from(q & 15) - dmin * m0;
            o[l + 32] = d * s1 * f32::from(q >> 4) - dmin * m1;
        }
    }
}

/// As Q4_K with 32 bytes of fifth bits before the nibbles: bit `g` of byte `l` belongs to
/// element `l` of group `g`.
fn q5_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin, packed, high) = (half_at(b, 0), half_at(b, 2), &b[4..16], &b[16..48]);
    for (pair, (qs, o)) in b[48..176].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (s0, m0) = scale_min(packed, 2 * pair);
        let (s1, m1) = scale_min(packed, 2 * pair + 1);
        for (l, (&q, &h)) in qs.iter().zip(high).enumerate() {
            let lo = ((h >> (2 * pair)) & 1) << 4;
            let hi = ((h >> (2 * pair + 1)) & 1) << 4;
            o[l] = d * s0 * f32::from((q & 15) | lo) - dmin * m0;
            o[l + 32] = d * s1 * f32::from((q >> 4) | hi) - dmin * m1;
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales (one per 16 elements),
/// d: `y = d scale (q - 32)`. Each half of the block (128 elements) uses 64 nibble bytes, 32 bytes
/// of bit pairs and 8 scales.
fn q6_k(b: &[u8], out: &mut [f32]) {
    let d = half_at(b, 208);
    for (half, o) in out.chunks_exact_mut(128).enumerate() {
        let low = &b[64 * half..][..64];
        let high = &b[128 + 32 * half..][..32];
        let scales = &b[192 + 8 * half..][..8];
        for l in 0..32 {
            for quarter in 0..4 {
                let byte = low[l + 32 * (quarter % 2)];
                let nibble = if quarter < 2 { byte & 15 } else { byte >> 4 };
                let q = nibble | (((high[l] >> (2 * quarter)) & 3) << 4);
                let scale = f32::from(scales[2 * quarter + l / 16] as i8);
                o[l + 32 * quarter] = d * scale * (f32::from(q) - 32.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formats differ in details that only real blocks show: each type is checked against
    /// values computed by the Python `gguf` package (tools/quant_fixture.py).
    #[test]
    fn blocks_match_the_gguf_package() {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/data/quant_blocks.json")).unwrap();
        let cases = fixture.as_object().unwrap();
        for quant in Quant::ALL {
            let case = &cases[quant.name()];
            let hex = case["bytes"].as_str().unwrap();
            let bytes: Vec<u8> = (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
                .collect();
            // f32 bit patterns, so that the comparison loses nothing.
            let want: Vec<f32> = case["f32_bits"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| f32::from_bits(v.as_u64().unwrap() as u32))
                .collect();
            assert!(want.len() >= 2 * quant.block_len());
            let mut got = vec![f32::NAN; want.len()];
            quant.dequantize(&bytes, &mut got);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                // Only the order of two roundings may differ between implementations.
                let tolerance = 4.0 * f32::EPSILON * w.abs().max(1e-3);
                assert!(
                    (g - w).abs() <= tolerance,
                    "{} element {i}: {g} instead of {w}",
                    quant.name()
                );
            }
        }
    }

    #[test]
    fn sizes_reject_partial_blocks_and_overflow() {
        assert_eq!(Quant::Q4_1.bytes_for(64), Some(40));
        assert_eq!(Quant::Q4_1.bytes_for(63), None);
        assert_eq!(Quant::Q6_K.bytes_for(128), None);
        assert_eq!(Quant::F32.bytes_for(usize::MAX), None);
    }
}
