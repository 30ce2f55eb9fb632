//! Scores on few dimensions, pooling, forcing and top-k.

use super::CudaBackend;
use super::args::{PoolArg, SeqsArg, word};
use super::launch::{Args, Shape};
use crate::backend::{
    Backend, DType, Force, HeadPool, LogitScale, PoolScores, Result, ScoreDims, ScoreRows,
    ScoreSource, TopK,
};
use bytemuck::{Pod, Zeroable};

/// `ScoreArgs` of `score.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ScoreArgs {
    q: u64,
    seqs: SeqsArg,
    pool: PoolArg,
    data: u64,
    row_scale: u64,
    dims: u64,
    scores: u64,
    stride: u64,
    n: u32,
    width: u32,
    capacity: u32,
    heads: u32,
    pool_mode: u32,
    coverage: u32,
    source: u32,
    q_type: u32,
    indices: u64,
    counts: u64,
    lists: u32,
    list_len: u32,
}

/// Query heads that a kernel instance keeps sums for, and the rows a thread handles at a time.
const GROUPS: [(usize, usize); 4] = [(1, 4), (4, 4), (8, 4), (16, 2)];

/// What the activations, the pool and the scale set.
fn how(act: DType, pool: HeadPool, scale: LogitScale) -> ScoreArgs {
    ScoreArgs {
        pool_mode: match pool {
            HeadPool::SumLogit => 1,
            HeadPool::MaxLogit => 2,
            _ => 0,
        },
        q_type: match act {
            DType::F16 => 1,
            DType::BF16 => 2,
            _ => 0,
        },
        coverage: u32::from(scale == LogitScale::Coverage),
        ..ScoreArgs::zeroed()
    }
}

impl CudaBackend {
    pub(super) fn score_dims_op(&self, p: &ScoreDims<'_>) -> Result<()> {
        const OP: &str = "score_dims";
        p.check()?;
        let (act, kv) = (p.q.dtype(), p.cache.k.dtype());
        let mut args = ScoreArgs {
            q: self.ptr(OP, p.q)?,
            seqs: self.seqs(OP, &p.seqs)?,
            pool: self.pool(OP, &p.cache)?,
            scores: self.ptr(OP, p.scores)?,
            stride: p.stride as u64,
            heads: word(OP, "heads", p.heads)?,
            ..how(act, p.pool, p.scale)
        };
        let (n, width, element) = match &p.source {
            ScoreSource::Lead { n } => (*n, 0, format!("{kv}_lead")),
            ScoreSource::Int8 { keys, n } => {
                args.data = self.ptr(OP, keys.data)?;
                args.row_scale = self.ptr(OP, keys.scale)?;
                args.source = 1;
                (*n, keys.dims, "int8".to_string())
            }
            ScoreSource::Slice(s) => {
                args.data = self.ptr(OP, s.data)?;
                args.dims = self.ptr(OP, s.dims)?;
                args.capacity = word(OP, "capacity", s.capacity)?;
                args.source = 2;
                (s.n_dims, s.n_dims, format!("{kv}_slice"))
            }
            ScoreSource::Gather { dims, n } => {
                args.dims = self.ptr(OP, dims)?;
                args.source = 3;
                (*n, 0, format!("{kv}_gather"))
            }
        };
        args.n = word(OP, "n", n)?;
        args.width = word(OP, "row width", width)?;
        if args.source != 1 && !self.attends(act, kv) {
            return Err(self.unsupported(OP, format!("{act} queries over a {kv} cache")));
        }
        let kv_heads = p.cache.kv_heads;
        let (g, shape) =
            self.score_shape(OP, p.pool, p.heads / kv_heads, [p.seqs.max_kv, kv_heads, p.seqs.n])?;
        self.launch(OP, &format!("score_dims_{element}_g{g}"), shape, Args::new().with(args))
    }

    /// Heads that the kernel instance keeps sums for, and the launch over `[keys, parts, sequences]`, each part
    /// being `heads` query heads.
    fn score_shape(
        &self,
        op: &'static str,
        pool: HeadPool,
        heads: usize,
        [keys, parts, n]: [usize; 3],
    ) -> Result<(usize, Shape)> {
        const BLOCK: usize = 128;
        let sums = if pool == HeadPool::SumLogit { 1 } else { heads };
        let Some((g, rows)) = GROUPS.into_iter().find(|(g, _)| *g >= sums) else {
            return Err(self.unsupported(op, format!("groups of {heads} heads")));
        };
        // Enough blocks to fill the device several times; more would only repeat the query's preparation.
        let blocks = keys.div_ceil(BLOCK / 4 * rows);
        let blocks = blocks.min((self.limits.sms * 32).div_ceil((parts * n).max(1)));
        Ok((g, Shape::new([blocks, parts, n], BLOCK)))
    }

    pub(super) fn score_rows_op(&self, p: &ScoreRows<'_>) -> Result<()> {
        const OP: &str = "score_rows";
        p.check()?;
        let (act, kv) = (p.q.dtype(), p.cache.k.dtype());
        if !self.attends(act, kv) {
            return Err(self.unsupported(OP, format!("{act} queries over a {kv} cache")));
        }
        let (n, dims) = p.dims();
        let args = ScoreArgs {
            q: self.ptr(OP, p.q)?,
            seqs: self.seqs(OP, &p.seqs)?,
            pool: self.pool(OP, &p.cache)?,
            dims: dims.map_or(Ok(0), |d| self.ptr(OP, d))?,
            scores: self.ptr(OP, p.scores)?,
            stride: p.stride as u64,
            n: word(OP, "n", n)?,
            heads: word(OP, "heads", p.heads)?,
            source: if dims.is_some() { 3 } else { 0 },
            indices: self.ptr(OP, p.among.indices)?,
            counts: self.ptr(OP, p.among.counts)?,
            lists: word(OP, "lists", p.lists)?,
            list_len: word(OP, "k", p.among.k)?,
            ..how(act, p.pool, p.scale)
        };
        let parts = p.parts_per_seq();
        let over = [p.among.k, parts, p.seqs.n];
        let (g, shape) = self.score_shape(OP, p.pool, p.heads / parts, over)?;
        let source = if dims.is_some() { "gather" } else { "lead" };
        let entry = format!("score_rows_{kv}_{source}_g{g}");
        self.launch(OP, &entry, shape, Args::new().with(args))
    }

    pub(super) fn pool_scores_op(&self, p: &PoolScores<'_>) -> Result<()> {
        const OP: &str = "pool_scores";
        p.check()?;
        let seqs = self.seqs(OP, &p.seqs)?;
        let (scores, heads) = (self.ptr(OP, p.scores)?, word(OP, "heads", p.heads)?);
        let stride = p.stride as u64;
        let lengths = p.lengths.map_or(Ok(0), |t| self.ptr(OP, t))?;
        let rows = word(OP, "rows", p.rows_per_seq())?;
        let scratch = self.scratch(p.seqs.n * p.heads * DType::F32.bytes())?;
        let args = Args::new().with(scores).with(seqs).with(scratch.ptr).with(heads).with(stride);
        let args = args.with(lengths).with(rows);
        self.launch(OP, "pool_lse", Shape::new([p.heads, p.seqs.n, 1], 512), args)?;
        let args = Args::new()
            .with(scores)
            .with(seqs)
            .with(scratch.ptr)
            .with(self.ptr(OP, p.out)?)
            .with(heads)
            .with(rows)
            .with(stride)
            .with(u32::from(p.pool != HeadPool::MaxSoftmax))
            .with(lengths);
        let grid = [p.longest().div_ceil(1024), p.rows_per_seq(), p.seqs.n];
        self.launch(OP, OP, Shape::new(grid, 256), args)
    }

    pub(super) fn force_op(&self, p: &Force<'_>) -> Result<()> {
        const OP: &str = "force";
        p.check()?;
        // Both counts are cut to kv_len in the kernel; a larger number means the same.
        let args = Args::new()
            .with(self.ptr(OP, p.scores)?)
            .with(self.seqs(OP, &p.seqs)?)
            .with(word(OP, "rows_per_seq", p.rows_per_seq)?)
            .with(p.stride as u64)
            .with(p.sinks.min(p.seqs.max_kv) as u32)
            .with(p.recent.min(p.seqs.max_kv) as u32);
        let shape = Shape::new([p.rows_per_seq, p.seqs.n, 1], 128);
        let Some(a) = &p.among else {
            return self.launch(OP, OP, shape, args);
        };
        let args = args
            .with(self.ptr(OP, a.indices)?)
            .with(self.ptr(OP, a.counts)?)
            .with(word(OP, "k", a.k)?);
        self.launch(OP, "force_listed", shape, args)
    }

    pub(super) fn top_k_op(&self, p: &TopK<'_>) -> Result<()> {
        const OP: &str = "top_k";
        /// Threads of a block that keeps its keys in registers, and the keys of a thread (kernel variants).
        const THREADS: usize = 512;
        const KEYS: [usize; 4] = [8, 16, 32, 48];
        /// Bytes of the histograms: three digits of 2048 bins.
        const HISTOGRAMS: usize = 3 * 2048 * 4;
        /// The kernel with keys in shared memory: threads, and room for its static shared memory.
        const SHARED_THREADS: usize = 1024;
        const STATIC: usize = 1024;
        p.check()?;
        let (rows, n) = (p.rows_per_seq * p.seqs.n, p.seqs.max_kv.max(1));
        let room = self.limits.shared.saturating_sub(HISTOGRAMS + STATIC) / 4;
        // As many blocks a row as run at once, one a multiprocessor; where rows alone fill the device, one.
        let useful = n.div_ceil(THREADS * KEYS[0]);
        let blocks = (self.limits.sms / rows.max(1)).min(useful).clamp(1, self.limits.cluster);
        let fits = |blocks: usize| KEYS.into_iter().find(|k| blocks * THREADS * k >= n);
        let keys = match fits(blocks) {
            Some(keys) if blocks > 1 || keys <= 16 => Some((blocks, keys)),
            // One block with its keys in shared memory, or else the largest cluster.
            _ if n <= room => None,
            _ => fits(self.limits.cluster).map(|keys| (self.limits.cluster, keys)),
        };
        let args = Args::new()
            .with(self.ptr(OP, p.scores)?)
            .with(self.seqs(OP, &p.seqs)?)
            .with(self.ptr(OP, p.indices)?)
            .with(self.ptr(OP, p.counts)?)
            .with(word(OP, "rows_per_seq", p.rows_per_seq)?)
            .with(word(OP, "k", p.k)?)
            .with(p.stride as u64)
            .with(word(OP, "cached keys", n.min(room))?);
        match keys {
            Some((blocks, keys)) => {
                let grid = [blocks, p.rows_per_seq, p.seqs.n];
                let shape = Shape::new(grid, THREADS).shared(HISTOGRAMS).cluster(blocks);
                self.launch(OP, &format!("top_k_{keys}"), shape, args)
            }
            None => {
                let shape = Shape::new([1, p.rows_per_seq, p.seqs.n], SHARED_THREADS);
                let shape = shape.shared(HISTOGRAMS + n.min(room).next_multiple_of(4) * 4);
                self.launch(OP, "top_k_shared", shape, args)
            }
        }
    }
}
