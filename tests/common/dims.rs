//! Query-chosen dimensions over a [`Layer`].

use longsight::backend::reference::{floats, words};
use longsight::backend::{
    CHANGED_WORDS, CompactSlice, DIM_STATE_WORDS, DType, DimMetric, RebuildSlice, Refresh,
    SelectDims, Tensor,
};

use super::cache::Layer;

/// A fresh choice of dimensions in every step.
const EVERY_STEP: Refresh = Refresh::Every { every: 1, phase: 0 };

/// Query-chosen dimensions of a layer and their compact slice.
pub struct Dims {
    pub n: usize,
    /// u32 `[kv, n]`.
    pub dims: Tensor,
    /// u32 `[kv, DIM_STATE_WORDS]`.
    pub state: Tensor,
    /// u32 `[kv, CHANGED_WORDS]`.
    pub changed: Tensor,
    coverage: Tensor,
    data: Tensor,
    capacity: usize,
}

impl Dims {
    pub fn new(l: &Layer, n: usize) -> Dims {
        let kv = l.heads.kv;
        Dims {
            n,
            dims: l.alloc(DType::U32, kv * n),
            state: l.alloc(DType::U32, kv * DIM_STATE_WORDS),
            changed: l.alloc(DType::U32, kv * CHANGED_WORDS),
            coverage: l.alloc(DType::F32, kv * 2),
            data: l.alloc(DType::F32, kv * l.capacity * n),
            capacity: l.capacity,
        }
    }

    pub fn slice(&self) -> CompactSlice<'_> {
        let (data, dims) = (&self.data, &self.dims);
        CompactSlice { data, dims, n_dims: self.n, capacity: self.capacity, slots: 1 }
    }

    /// Chooses by the layer's query in every step, and rewrites the columns that changed.
    pub fn choose(&self, l: &Layer, metric: DimMetric, unit: usize) {
        let p = SelectDims {
            q: &l.q,
            seqs: l.seqs(),
            stats: Some(&l.stats),
            dims: &self.dims,
            state: &self.state,
            changed: &self.changed,
            coverage: &self.coverage,
            heads: l.heads.query,
            kv_heads: l.heads.kv,
            head_dim: l.heads.dim,
            slots: 1,
            n_dims: self.n,
            unit,
            metric,
            refresh: EVERY_STEP,
        };
        l.dev.select_dims(&p).unwrap();
        self.rebuild(l);
    }

    /// Rewrites the columns marked as changed.
    pub fn rebuild(&self, l: &Layer) {
        let (slice, changed) = (self.slice(), &self.changed);
        let p = RebuildSlice { seqs: l.seqs(), cache: l.pool(), slice, changed };
        l.dev.rebuild_slice(&p).unwrap();
    }

    /// Marks every column as changed.
    pub fn mark_all(&self, l: &Layer) {
        let mut mask = [0u32; CHANGED_WORDS];
        (0..self.n).for_each(|c| mask[c / 32] |= 1 << (c % 32));
        let all = mask.repeat(l.heads.kv);
        l.dev.upload(&self.changed, bytemuck::cast_slice(&all)).unwrap();
    }

    /// The dimension of each column, per KV head.
    pub fn lists(&self, l: &Layer) -> Vec<Vec<u32>> {
        words(&*l.dev, &self.dims).unwrap().chunks_exact(self.n).map(<[u32]>::to_vec).collect()
    }

    /// The slice's first `tokens` rows of every KV head.
    pub fn values(&self, l: &Layer, tokens: usize) -> Vec<f64> {
        let all = floats(&*l.dev, &self.data).unwrap();
        let heads = all.chunks_exact(self.capacity * self.n);
        heads.flat_map(|h| h[..tokens * self.n].to_vec()).collect()
    }
}
