//! Weights from a checkpoint to a device, in the layout that the decoder runs.

use super::importance::ImportanceWeights;
use super::key_order::source_rows;
use super::{Checkpoint, KeyOrder, LayerWeight as L, ModelConfig, ModelError, Weight};
use crate::backend::{Backend, BackendError, DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Weights of one layer on the device. Heads are [`ModelConfig::kv_dim`] wide: rows and columns of dimensions that the
/// checkpoint does not have are zeros.
#[derive(Debug)]
pub struct LayerWeights {
    /// f32 `[hidden]`.
    pub attn_norm: Tensor,
    /// `[(heads + 2 kv_heads) * kv_dim, hidden]`: q, k and v stacked, q and k rows in [`KeyOrder`].
    pub qkv: Tensor,
    /// f32 `[(heads + 2 kv_heads) * kv_dim]`, in the order of the rows of `qkv`.
    pub qkv_bias: Option<Tensor>,
    /// f32 `[heads, head_dim]` and `[kv_heads, head_dim]`.
    pub qk_norm: Option<(Tensor, Tensor)>,
    /// f32 `[kv_heads, kv_dim / 2]`.
    pub inv_freq: Tensor,
    /// Where tokens have a content importance.
    pub importance: Option<ImportanceWeights>,
    /// `[hidden, heads * kv_dim]`.
    pub o: Tensor,
    /// f32 `[hidden]`.
    pub ffn_norm: Tensor,
    /// `[2 * ffn, hidden]`: gate, then up.
    pub gate_up: Tensor,
    /// `[hidden, ffn]`.
    pub down: Tensor,
}

/// All weights of a model on the device.
#[derive(Debug)]
pub struct Weights {
    /// `[vocab, hidden]`.
    pub embed: Tensor,
    pub layers: Vec<LayerWeights>,
    /// f32 `[hidden]`.
    pub output_norm: Tensor,
    /// `[vocab, hidden]`; shares the embedding's buffer when tied.
    pub output: Tensor,
}

/// A failed load: the file's fault or the device's.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The files.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

type Result<T> = std::result::Result<T, LoadError>;

/// Converts f32 values to the bytes of `dtype` (round to nearest, ties to even).
pub(crate) fn to_bytes(x: &[f32], dtype: DType, out: &mut Vec<u8>) {
    out.clear();
    out.resize(x.len() * dtype.bytes(), 0);
    match dtype {
        DType::F16 => out.par_chunks_mut(8192).zip(x.par_chunks(4096)).for_each(|(o, x)| {
            for (o, &v) in o.chunks_exact_mut(2).zip(x) {
                o.copy_from_slice(&f16::from_f32(v).to_le_bytes());
            }
        }),
        DType::BF16 => out.par_chunks_mut(8192).zip(x.par_chunks(4096)).for_each(|(o, x)| {
            for (o, &v) in o.chunks_exact_mut(2).zip(x) {
                o.copy_from_slice(&bf16::from_f32(v).to_le_bytes());
            }
        }),
        _ => out.copy_from_slice(bytemuck::cast_slice(x)),
    }
}

/// Every run of `from` numbers, and zeros up to `to`.
pub(super) fn spread(x: &[f32], from: usize, to: usize) -> Vec<f32> {
    x.chunks_exact(from).flat_map(|x| x.iter().copied().chain(vec![0.0; to - from])).collect()
}

/// Streams rows of a checkpoint to device tensors a few megabytes at a time.
pub(super) struct Loader<'a> {
    pub backend: &'a dyn Backend,
    pub checkpoint: &'a Checkpoint,
    pub dtype: DType,
    /// Called with (bytes of stored weights read so far, all of them).
    pub progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    rows: Vec<f32>,
    bytes: Vec<u8>,
}

/// f32 values converted and uploaded in one go.
const CHUNK: usize = 4 << 20;

impl<'a> Loader<'a> {
    pub fn new(
        backend: &'a dyn Backend,
        checkpoint: &'a Checkpoint,
        dtype: DType,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        Loader { backend, checkpoint, dtype, progress, done: 0, rows: vec![], bytes: vec![] }
    }

    fn alloc(&self, rows: usize, cols: usize, what: &str) -> Result<Tensor> {
        Ok(self.backend.alloc(self.dtype, rows * cols, what)?)
    }

    /// Copies weight `w` to rows `at..` of `dst`; `order[i]` = source row of row `i`, when permuted.
    fn put(&mut self, w: Weight, dst: &Tensor, at: usize, order: Option<&[usize]>) -> Result<()> {
        let [rows, _] = self.checkpoint.shape(w)?;
        self.put_rows(w, 0..rows, dst, at, order)
    }

    /// The same for a weight whose rows are heads, the first of which is head `at` of `dst`.
    fn put_heads(
        &mut self,
        w: Weight,
        dst: &Tensor,
        at: usize,
        order: Option<&[usize]>,
    ) -> Result<()> {
        let c = self.checkpoint.config();
        let (d, wide) = (c.head_dim, c.kv_dim());
        if d == wide {
            return self.put(w, dst, at * d, order);
        }
        let [rows, _] = self.checkpoint.shape(w)?;
        (0..rows / d)
            .try_for_each(|h| self.put_rows(w, h * d..(h + 1) * d, dst, (at + h) * wide, order))
    }

    /// Copies rows of a weight, or of its permutation, to rows `at..` of `dst`. Where the rows of `dst` are wider, the
    /// columns are heads.
    fn put_rows(
        &mut self,
        w: Weight,
        rows: Range<usize>,
        dst: &Tensor,
        at: usize,
        order: Option<&[usize]>,
    ) -> Result<()> {
        let [_, cols] = self.checkpoint.shape(w)?;
        let (d, wide) = (self.checkpoint.config().head_dim, self.checkpoint.config().kv_dim());
        let of_heads = d != wide && matches!(w, Weight::Layer(_, L::O));
        let (step, count) = ((CHUNK / cols).max(1), rows.len());
        let (first, end) = (rows.start, rows.end);
        let mut start = first;
        while start < end {
            let n = step.min(end - start);
            self.rows.resize(n * cols, 0.0);
            match order {
                None => self.checkpoint.read_rows(w, start..start + n, &mut self.rows)?,
                Some(order) => {
                    for (row, &from) in
                        self.rows.chunks_exact_mut(cols).zip(&order[start..start + n])
                    {
                        self.checkpoint.read_rows(w, from..from + 1, row)?;
                    }
                }
            }
            let width = if of_heads { cols / d * wide } else { cols };
            if of_heads {
                self.rows = spread(&self.rows, d, wide);
            }
            to_bytes(&self.rows, dst.dtype(), &mut self.bytes);
            let to = dst.slice((at + start - first) * width, n * width);
            self.backend.upload(&to, &self.bytes)?;
            start += n;
        }
        self.done += (count * cols) as u64;
        let all = self.checkpoint.config().parameters();
        (self.progress)(self.done.min(all), all);
        Ok(())
    }

    fn matrix(&mut self, w: Weight, what: &str) -> Result<Tensor> {
        let [rows, cols] = self.checkpoint.shape(w)?;
        let t = self.alloc(rows, cols, what)?;
        self.put(w, &t, 0, None)?;
        Ok(t)
    }

    /// A matrix whose columns are heads.
    fn matrix_of_heads(&mut self, w: Weight, what: &str) -> Result<Tensor> {
        let [rows, cols] = self.checkpoint.shape(w)?;
        let c = self.checkpoint.config();
        let t = self.alloc(rows, cols / c.head_dim * c.kv_dim(), what)?;
        self.put(w, &t, 0, None)?;
        Ok(t)
    }

    fn importance(&self, l: usize) -> Result<Option<ImportanceWeights>> {
        let c = self.checkpoint.config();
        if c.importance.is_none() {
            return Ok(None);
        }
        let read = |w| self.checkpoint.read(Weight::Layer(l, w));
        let delta = spread(&read(L::Importance)?, c.head_dim, c.kv_dim());
        Ok(Some(ImportanceWeights {
            delta: self.vector(&delta, "content importance")?,
            a: self.vector(&read(L::ImportanceScale)?, "content importance")?,
        }))
    }

    pub fn vector(&self, v: &[f32], what: &str) -> Result<Tensor> {
        let t = self.backend.alloc(DType::F32, v.len(), what)?;
        self.backend.upload(&t, bytemuck::cast_slice(v))?;
        Ok(t)
    }

    /// The weight of a norm whose output is wanted times `scale`.
    fn norm(&mut self, w: Weight, scale: f32) -> Result<Tensor> {
        let mut v = self.checkpoint.read(w)?;
        v.iter_mut().for_each(|v| *v *= scale);
        self.vector(&v, "norm weight")
    }

    /// (Re)writes everything of a layer that depends on the key order.
    pub fn key_ordered(&mut self, l: usize, order: &KeyOrder, w: &LayerWeights) -> Result<()> {
        let c = self.checkpoint.config().clone();
        let width = |heads: usize| heads * c.head_dim;
        let (q, k) =
            (source_rows(&c, order, l, c.n_heads), source_rows(&c, order, l, c.n_kv_heads));
        self.put_heads(Weight::Layer(l, L::Q), &w.qkv, 0, Some(&q))?;
        self.put_heads(Weight::Layer(l, L::K), &w.qkv, c.n_heads, Some(&k))?;
        if let Some(bias) = &w.qkv_bias {
            let mut all = Vec::with_capacity(width(c.n_heads + 2 * c.n_kv_heads));
            for (name, rows) in [(L::QBias, &q), (L::KBias, &k)] {
                let v = self.checkpoint.read(Weight::Layer(l, name))?;
                all.extend(rows.iter().map(|&r| v[r]));
            }
            all.extend(self.checkpoint.read(Weight::Layer(l, L::VBias))?);
            self.backend.upload(bias, bytemuck::cast_slice(&all))?;
        }
        if let Some((qn, kn)) = &w.qk_norm {
            for (name, rows, t) in [(L::QNorm, &q, qn), (L::KNorm, &k, kn)] {
                // One weight per dimension, shared by the heads; each head permutes it its own way.
                let v = self.checkpoint.read(Weight::Layer(l, name))?;
                let all: Vec<f32> = rows.iter().map(|&r| v[r % c.head_dim]).collect();
                self.backend.upload(t, bytemuck::cast_slice(&all))?;
            }
        }
        // What is no dimension of the checkpoint does not turn.
        let freq = spread(&order.inv_freq(l, &c.inv_freq()), c.head_dim / 2, c.kv_dim() / 2);
        self.backend.upload(&w.inv_freq, bytemuck::cast_slice(&freq))?;
        Ok(())
    }

    fn layer(&mut self, l: usize, order: &KeyOrder) -> Result<LayerWeights> {
        let c: ModelConfig = self.checkpoint.config().clone();
        let w = |n| Weight::Layer(l, n);
        let qkv_rows = (c.n_heads + 2 * c.n_kv_heads) * c.kv_dim();
        let floats = |n: usize, what: &str| self.backend.alloc(DType::F32, n, what);
        let layer = LayerWeights {
            qkv: self.alloc(qkv_rows, c.hidden, "attention weights")?,
            qkv_bias: c.qkv_bias.then(|| floats(qkv_rows, "attention bias")).transpose()?,
            qk_norm: if c.qk_norm {
                let q = floats(c.n_heads * c.head_dim, "query norm")?;
                Some((q, floats(c.n_kv_heads * c.head_dim, "key norm")?))
            } else {
                None
            },
            inv_freq: floats(c.n_kv_heads * c.kv_dim() / 2, "rotary frequencies")?,
            importance: self.importance(l)?,
            gate_up: self.alloc(2 * c.ffn, c.hidden, "MLP weights")?,
            attn_norm: self.norm(w(L::AttnNorm), 1.0)?,
            ffn_norm: self.norm(w(L::FfnNorm), 1.0)?,
            o: self.matrix_of_heads(w(L::O), "attention output weights")?,
            down: self.matrix(w(L::Down), "MLP weights")?,
        };
        self.key_ordered(l, order, &layer)?;
        self.put_heads(w(L::V), &layer.qkv, c.n_heads + c.n_kv_heads, None)?;
        self.put(w(L::Gate), &layer.gate_up, 0, None)?;
        self.put(w(L::Up), &layer.gate_up, c.ffn, None)?;
        Ok(layer)
    }

    /// Loads everything.
    pub fn weights(mut self, order: &KeyOrder) -> Result<Weights> {
        let c = self.checkpoint.config();
        let (n_layers, tied) = (c.n_layers, c.tie_embeddings);
        let embed = self.matrix(Weight::Embed, "embedding")?;
        let layers = (0..n_layers).map(|l| self.layer(l, order)).collect::<Result<_>>()?;
        let scale = self.checkpoint.config().scales.logits as f32;
        let output_norm = self.norm(Weight::OutputNorm, scale)?;
        let output =
            if tied { embed.clone() } else { self.matrix(Weight::Output, "output weights")? };
        self.backend.sync()?;
        Ok(Weights { embed, layers, output_norm, output })
    }
}
