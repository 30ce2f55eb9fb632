//! Plain f64 implementations of every op, for the conformance test and for the checks inside benchmarks.
//!
//! Each function takes the parameter struct of the op it mirrors, reads the input tensors back from the
//! device (so it sees the values after rounding to their dtype), follows the formula of the parameter
//! struct literally, and returns what every output element must be. It records nothing on the device.
//! Speed is no aim beyond checking sizes that tests and benchmarks use.

mod attend;
mod blocks;
mod content_bias;
mod dense;
mod dims;
mod hold_lists;
mod kv;
mod mean_value;
mod project;
mod quantise_keys;
mod score;
mod score_rows;
mod score_tiles;
mod trim_scores;
mod union_ranks;

pub use attend::{attend_dense, attend_rows, merge};
pub use blocks::{expand_blocks, force_blocks, kv_summaries, pool_blocks, score_summaries};
pub use content_bias::content_bias;
pub use dense::{embed, gather_rows, linear, linear_gated, rms_norm, rope, swiglu};
pub use dims::{decision_margin, rebuild_slice, select_dims};
pub use hold_lists::hold_lists;
pub use kv::{key_stats, kv_append};
pub use mean_value::mean_value;
pub use project::project;
pub use quantise_keys::quantise_keys;
pub use score::{force, force_top_k, pool_scores, score_dims, score_pool, top_k};
pub use score_rows::score_rows;
pub use score_tiles::score_tiles;
pub use trim_scores::trim_scores;
pub use union_ranks::union_ranks;

use super::{Backend, DType, KvPool, META_WORDS, Meta, PAGE, Result, Seqs, Tensor};
use half::{bf16, f16};

/// What the contract says about one element of an output tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cell {
    /// Not written: holds what it held before the call.
    Keep,
    /// Unspecified.
    Any,
    /// This value, up to the op's rounding.
    Is(f64),
    /// A value at most this far (second) from the first.
    Near(f64, f64),
}

/// The expected contents of one output tensor, one [`Cell`] per element.
#[derive(Debug)]
pub struct Output<'a> {
    /// Op that writes it.
    pub op: &'static str,
    /// Field of the parameter struct.
    pub name: &'static str,
    /// The tensor.
    pub tensor: &'a Tensor,
    /// Expected contents, `tensor.len()` of them.
    pub cells: Vec<Cell>,
    /// [`Cell::Is`] values admit no rounding beyond the one to the tensor's dtype.
    pub exact: bool,
}

impl<'a> Output<'a> {
    fn new(op: &'static str, name: &'static str, tensor: &'a Tensor) -> Self {
        Output { op, name, tensor, cells: vec![Cell::Keep; tensor.len()], exact: false }
    }

    fn exact(op: &'static str, name: &'static str, tensor: &'a Tensor) -> Self {
        Output { exact: true, ..Output::new(op, name, tensor) }
    }

    /// Sets the elements from `at` on.
    fn put(&mut self, at: usize, values: &[f64]) {
        for (cell, v) in self.cells[at..at + values.len()].iter_mut().zip(values) {
            *cell = Cell::Is(*v);
        }
    }
}

/// Values of `bytes`, exactly.
pub fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let two = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    let four = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let items = bytes.chunks_exact(dtype.bytes());
    match dtype {
        DType::F32 => items.map(|b| f64::from(f32::from_bits(four(b)))).collect(),
        DType::F16 => items.map(|b| f16::from_bits(two(b)).to_f64()).collect(),
        DType::BF16 => items.map(|b| bf16::from_bits(two(b)).to_f64()).collect(),
        DType::I8 => items.map(|b| f64::from(b[0] as i8)).collect(),
        DType::U32 => items.map(|b| f64::from(four(b))).collect(),
    }
}

/// Bytes of `values` in `dtype`, rounded to nearest, ties to even.
pub fn encode(dtype: DType, values: &[f64]) -> Vec<u8> {
    let it = values.iter();
    match dtype {
        DType::F32 => it.flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        DType::F16 => it.flat_map(|v| f16::from_f32(to_odd(*v)).to_le_bytes()).collect(),
        DType::BF16 => it.flat_map(|v| bf16::from_f32(to_odd(*v)).to_le_bytes()).collect(),
        DType::I8 => it.map(|v| v.round_ties_even() as i8 as u8).collect(),
        DType::U32 => it.flat_map(|v| (*v as u32).to_le_bytes()).collect(),
    }
}

/// `v` in f32, rounded to odd: a last bit of 1 stands for what was cut off, so that the next rounding to 16 bits sees
/// on which side of a tie `v` lies (half's own `from_f64` drops those bits).
fn to_odd(v: f64) -> f32 {
    let near = v as f32;
    if f64::from(near) == v || !near.is_finite() {
        return near;
    }
    let up = f64::from(near).abs() > v.abs();
    f32::from_bits((near.to_bits() - u32::from(up)) | 1)
}

/// Reads a tensor back as f64 (exact for every dtype).
pub fn floats(dev: &dyn Backend, t: &Tensor) -> Result<Vec<f64>> {
    let mut bytes = vec![0; t.bytes()];
    dev.download(t, &mut bytes)?;
    Ok(decode(t.dtype(), &bytes))
}

/// Reads a u32 tensor back.
pub fn words(dev: &dyn Backend, t: &Tensor) -> Result<Vec<u32>> {
    Ok(floats(dev, t)?.into_iter().map(|v| v as u32).collect())
}

/// One sequence's record and pages, on the host.
struct Seq {
    q_start: usize,
    q_len: usize,
    kv_len: usize,
    pages: Vec<usize>,
    slot: usize,
    step: u32,
}

impl Seq {
    fn read(dev: &dyn Backend, s: &Seqs<'_>) -> Result<Vec<Seq>> {
        let (meta, pages) = (words(dev, s.meta)?, words(dev, s.pages)?);
        let one = |m: &[u32]| {
            let (at, kv_len) = (m[Meta::PAGES] as usize, m[Meta::KV_LEN] as usize);
            Seq {
                q_start: m[Meta::Q_START] as usize,
                q_len: m[Meta::Q_LEN] as usize,
                kv_len,
                pages: pages[at..at + kv_len.div_ceil(PAGE)].iter().map(|p| *p as usize).collect(),
                slot: m[Meta::SLOT] as usize,
                step: m[Meta::STEP],
            }
        };
        Ok(meta.chunks_exact(META_WORDS).take(s.n).map(one).collect())
    }
}

/// Index arithmetic of a [`KvPool`].
#[derive(Clone, Copy)]
struct Layout {
    kv_heads: usize,
    d: usize,
    lead: usize,
}

impl Layout {
    fn of(p: &KvPool<'_>) -> Layout {
        Layout { kv_heads: p.kv_heads, d: p.head_dim, lead: p.lead }
    }
    /// First element of the (page, head) tile that holds token `j`.
    fn tile(&self, s: &Seq, h: usize, j: usize) -> usize {
        (s.pages[j / PAGE] * self.kv_heads + h) * PAGE * self.d
    }
    fn k(&self, s: &Seq, h: usize, j: usize, i: usize) -> usize {
        self.tile(s, h, j) + KvPool::k_offset(self.lead, self.d, j % PAGE, i)
    }
    fn v(&self, s: &Seq, h: usize, j: usize, i: usize) -> usize {
        self.tile(s, h, j) + (j % PAGE) * self.d + i
    }
    /// Row of token `j` in arrays of `[n_pages, kv_heads, 64]`.
    fn row(&self, s: &Seq, h: usize, j: usize) -> usize {
        (s.pages[j / PAGE] * self.kv_heads + h) * PAGE + j % PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values just beside a tie of the narrow type, beyond the bits of f32 as well.
    #[test]
    fn encode_rounds_once() {
        for (dtype, bits) in [(DType::BF16, 8), (DType::F16, 11)] {
            let ulp = 2f64.powi(1 - bits);
            let tie = 1.0 + ulp / 2.0;
            for (v, want) in [
                (tie, 1.0),
                (tie + ulp, 1.0 + 2.0 * ulp),
                (tie + 2f64.powi(-23), 1.0 + ulp),
                (tie - 2f64.powi(-23), 1.0),
                (tie + 2f64.powi(-40), 1.0 + ulp),
                (tie - 2f64.powi(-40), 1.0),
                (tie + ulp - 2f64.powi(-40), 1.0 + ulp),
                (-tie - 2f64.powi(-40), -1.0 - ulp),
            ] {
                assert_eq!(decode(dtype, &encode(dtype, &[v])), [want], "{dtype} of {v:e}");
            }
        }
        for v in [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, 65504.0, 2f64.powi(-24)] {
            assert_eq!(decode(DType::F16, &encode(DType::F16, &[v])), [v]);
        }
        assert!(decode(DType::BF16, &encode(DType::BF16, &[f64::NAN]))[0].is_nan());
    }
}
