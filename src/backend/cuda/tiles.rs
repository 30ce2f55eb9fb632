//! Scores of keys for a tile of query rows.

use super::CudaBackend;
use super::args::{PoolArg, SeqsArg, word};
use super::attend::MMA_DIMS;
use super::hopper;
use super::launch::{Args, Shape};
use crate::backend::{Backend, DType, PAGE, Result, ScoreTiles};
use bytemuck::{Pod, Zeroable};

/// `ScoreTilesArgs` of `score_tiles.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ScoreTilesArgs {
    q: u64,
    lse: u64,
    seqs: SeqsArg,
    pool: PoolArg,
    scores: u64,
    stride: u64,
    scale: f32,
    heads: u32,
    lists: u32,
    pad: u32,
}

impl CudaBackend {
    pub(super) fn score_tiles_op(&self, p: &ScoreTiles<'_>) -> Result<()> {
        const OP: &str = "score_tiles";
        /// Threads of a block; a thread has a key of its own in the kernel for CUDA cores, which takes 16 vectors.
        const THREADS: usize = 128;
        const VECTORS: usize = 16;
        p.check()?;
        let (act, kv, d) = (p.q.dtype(), p.cache.k.dtype(), p.cache.head_dim);
        if !self.attends(act, kv) {
            return Err(self.unsupported(OP, format!("{act} queries over a {kv} cache")));
        }
        let args = ScoreTilesArgs {
            q: self.ptr(OP, p.q)?,
            lse: self.ptr(OP, p.lse)?,
            seqs: self.seqs(OP, &p.seqs)?,
            pool: self.pool(OP, &p.cache)?,
            scores: self.ptr(OP, p.scores)?,
            stride: p.stride as u64,
            scale: p.scale,
            heads: word(OP, "heads", p.heads)?,
            lists: word(OP, "lists", p.lists())?,
            pad: 0,
        };
        // Vectors of one KV head; a list of several heads is summed up by the other kernels.
        let vectors = p.seqs.max_q * (p.heads / p.cache.kv_heads);
        let of = [vectors, p.lists(), p.seqs.n];
        if p.lists() == p.cache.kv_heads
            && let Some((jobs, shape)) =
                hopper::score(OP, &self.limits, (act, kv, d, p.scale), of, p.seqs.max_kv)?
        {
            let entry = format!("score_tiles_wgmma_{kv}_d{d}");
            let (jobs, keys) = jobs.mapped(&p.cache, &args.pool);
            return self.launch(OP, &entry, shape, Args::new().with(args).with(jobs).with(keys));
        }
        let (keys, entry, shared) = if act == kv && kv != DType::F32 && MMA_DIMS.contains(&d) {
            // 64 vectors and as many keys, in padded rows.
            (PAGE, format!("score_tiles_{kv}_d{d}"), 2 * PAGE * (d + 8) * 2)
        } else {
            (THREADS, format!("score_tiles_{act}_{kv}"), VECTORS * d * 4)
        };
        let grid = [p.seqs.max_kv.div_ceil(keys), p.lists(), p.seqs.n];
        let shape = Shape::new(grid, THREADS).shared(shared);
        self.launch(OP, &entry, shape, Args::new().with(args))
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "score_tiles" "ScoreTilesArgs" ScoreTilesArgs,
}
