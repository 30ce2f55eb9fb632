//! Chosen key dimensions in few bits.

use super::kv::check_dims;
use super::{KvPool, Seqs, apart, holds, is};
use crate::backend::{DType, Result, Tensor};

/// Bits of a number in a [`QuantisedSlice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SliceBits {
    /// Two numbers a byte, of -7 to 7 in two's complement; the one of the smaller column in the low half.
    Four,
    /// A number a byte, of -127 to 127.
    Eight,
}

impl SliceBits {
    /// Bytes of a row of `n` numbers.
    pub const fn row(self, n: usize) -> usize {
        match self {
            SliceBits::Four => n / 2,
            SliceBits::Eight => n,
        }
    }

    /// Largest number.
    pub const fn most(self) -> f32 {
        match self {
            SliceBits::Four => 7.0,
            SliceBits::Eight => 127.0,
        }
    }
}

/// Chosen dimensions of every key of a sequence in few bits, symmetric per token and KV head (Double Sparsity's label
/// cache): number times scale is the key, up to half a scale.
#[derive(Debug, Clone, Copy)]
pub struct QuantisedSlice<'a> {
    /// i8 `[slots, kv_heads, capacity, bits.row(n_dims)]`.
    pub data: &'a Tensor,
    /// f32 `[slots, kv_heads, capacity]`.
    pub scale: &'a Tensor,
    /// u32 `[slots, kv_heads, n_dims]`: the dimension that each column holds.
    pub dims: &'a Tensor,
    /// Columns; a multiple of 8.
    pub n_dims: usize,
    /// Bits of a number.
    pub bits: SliceBits,
    /// Tokens a slot has room for.
    pub capacity: usize,
    /// Sequences that have a slice.
    pub slots: usize,
}

impl QuantisedSlice<'_> {
    pub(crate) fn check(&self, op: &'static str, pool: &KvPool<'_>) -> Result<()> {
        is(op, "slice", self.data, DType::I8)?;
        is(op, "slice scales", self.scale, DType::F32)?;
        is(op, "dims", self.dims, DType::U32)?;
        check_dims(op, self.n_dims, pool.head_dim)?;
        let (slots, heads) = (self.slots, pool.kv_heads);
        let row = self.bits.row(self.n_dims);
        holds(op, "slice", self.data, &[slots, heads, self.capacity, row])?;
        holds(op, "slice scales", self.scale, &[slots, heads, self.capacity])?;
        holds(op, "dims", self.dims, &[slots, heads, self.n_dims])
    }
}

/// Brings a [`QuantisedSlice`] up to date: the tokens `done .. kv_len` of every sequence, of which `done` then says
/// that they are there; rows below are left alone.
///
/// `scale = max_c |K[t, dims[c]]| / most`, `number[c] = round(K[t, dims[c]] / scale)`, ties to even, both in f32 from the
/// key as the page holds it; zeros where the scale is 0. A key that holds a number that is not finite gives numbers
/// without a meaning.
#[derive(Debug)]
pub struct QuantiseKeys<'a> {
    /// The sequences.
    pub seqs: Seqs<'a>,
    /// The layer's pages.
    pub cache: KvPool<'a>,
    /// The slice, out.
    pub slice: QuantisedSlice<'a>,
    /// u32 `[slots, kv_heads]`: tokens whose rows are in the slice, in and out.
    pub done: &'a Tensor,
}

impl QuantiseKeys<'_> {
    /// Shapes and dtypes fit, and no output shares bytes with an input or another output.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`](crate::backend::BackendError::BadArgument), naming what does not fit.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "quantise_keys";
        self.seqs.check_decode(OP)?;
        self.cache.check(OP)?;
        self.slice.check(OP, &self.cache)?;
        self.seqs.check_room(OP, self.slice.capacity)?;
        is(OP, "done", self.done, DType::U32)?;
        holds(OP, "done", self.done, &[self.slice.slots, self.cache.kv_heads])?;
        let s = &self.slice;
        let outs = [("slice", s.data), ("slice scales", s.scale), ("done", self.done)];
        let ([meta, pages], keys) = (self.seqs.named(), self.cache.named()[0]);
        apart(OP, &outs, &[keys, ("dims", s.dims), meta, pages])
    }
}
