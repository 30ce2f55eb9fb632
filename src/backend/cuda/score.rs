//! Scores on few dimensions, pooling, forcing and trimming.

use super::args::{PoolArg, SeqsArg, word};
use super::launch::{Args, Shape};
use super::{CudaBackend, Scratch};
use crate::backend::ops::check_score_pool;
use crate::backend::{
    Backend, DType, Force, HeadPool, LogitScale, PoolScores, Result, ScoreDims, ScoreRows,
    ScoreSource, SliceBits, Trim, TrimScores,
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
    settled: u32,
    pad: u32,
    sums: u64,
}

/// Scores of a block of `pool_lse`.
const LSE_CHUNK: usize = 4096;
/// Query heads that an instance of `score` keeps sums for, and the rows a thread handles at a time.
const GROUPS: [(usize, usize); 4] = [(1, 4), (4, 4), (8, 4), (16, 2)];
/// `source` of [`ScoreArgs`] that gathers listed dimensions.
const GATHER: u32 = 3;

/// A kernel instance: the end of its name, rows that four threads handle at a time, blocks on a multiprocessor.
#[derive(Debug, PartialEq, Eq)]
struct Kernel {
    suffix: String,
    rows: usize,
    resident: usize,
    tensor_cores: bool,
}

impl Kernel {
    /// The instance that leaves sums of exponentials too.
    fn with_sums(self) -> Self {
        let resident = self.resident.min(8);
        Kernel { suffix: self.suffix + "_sums", resident, ..self }
    }
}

/// The instance for `heads` query heads of `act` that share `n` dimensions of keys; `None` for too many heads.
///
/// On tensor cores (`score_mma.cuh`) where the query has 16 bits, the keys as many or 8, and the dimensions are a
/// multiple of 32 that there is an instance for.
fn kernel(
    op: &str,
    (act, keys): (DType, DType),
    pool: HeadPool,
    heads: usize,
    (n, source): (usize, u32),
) -> Option<Kernel> {
    let wide = act != DType::F32 && (keys == act || keys == DType::I8) && source != GATHER;
    if wide && heads <= 16 && matches!(n, 32 | 64 | 128) {
        let (pieces, tiles) = (n / 32, heads.div_ceil(8));
        let (rows, resident) = match (pieces, tiles) {
            (1, 1) if op == "score_rows" => (4, 8),
            (1, 1) if source == 1 => (8, 6),
            (1, 1) if keys == DType::I8 => (4, 8),
            (1, 1) => (4, 10),
            (2, 1) => (4, 6),
            (1, 2) => (4, 5),
            (4, 2) => (4, 3),
            _ => (4, 4),
        };
        let suffix = format!("c{pieces}_t{tiles}");
        return Some(Kernel { suffix, rows, resident, tensor_cores: true });
    }
    let sums = if pool == HeadPool::SumLogit { 1 } else { heads };
    let (g, rows) = GROUPS.into_iter().find(|(g, _)| *g >= sums)?;
    let resident = if g == 1 { 8 } else { 5 };
    Some(Kernel { suffix: format!("g{g}"), rows, resident, tensor_cores: false })
}

/// `POOL_..` of `paged.cuh`.
pub(super) fn pool_mode(pool: HeadPool) -> u32 {
    match pool {
        HeadPool::SumLogit => 1,
        HeadPool::MaxLogit => 2,
        _ => 0,
    }
}

/// What the activations, the pool and the scale set.
fn how(act: DType, pool: HeadPool, scale: LogitScale) -> ScoreArgs {
    ScoreArgs {
        pool_mode: pool_mode(pool),
        q_type: match act {
            DType::F16 => 1,
            DType::BF16 => 2,
            _ => 0,
        },
        coverage: u32::from(scale == LogitScale::Coverage),
        ..ScoreArgs::zeroed()
    }
}

/// The largest exponents and sums of exponentials of parts of every head's scores, `[n, heads, parts]`.
pub(super) struct Sums<'a> {
    scratch: Scratch<'a>,
    parts: usize,
}

impl CudaBackend {
    pub(super) fn score_pool_op(&self, s: &ScoreDims<'_>, p: &PoolScores<'_>) -> Result<()> {
        check_score_pool(s, p)?;
        let sums = self.score_dims_op(s, p.pool.softmax())?;
        self.pool_scores_op(p, sums)
    }

    /// `sums`: of scores that are not pooled, the sums of their exponentials are wanted; where the kernel leaves them, they
    /// are returned.
    pub(super) fn score_dims_op(&self, p: &ScoreDims<'_>, sums: bool) -> Result<Option<Sums<'_>>> {
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
            settled: u32::from(p.seqs.settled),
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
            ScoreSource::Quantised(s) => {
                args.data = self.ptr(OP, s.data)?;
                args.row_scale = self.ptr(OP, s.scale)?;
                args.dims = self.ptr(OP, s.dims)?;
                args.capacity = word(OP, "capacity", s.capacity)?;
                let four = s.bits == SliceBits::Four;
                args.source = if four { 5 } else { 4 };
                (s.n_dims, s.bits.row(s.n_dims), if four { "slice4" } else { "slice8" }.to_string())
            }
            ScoreSource::Gather { dims, n } => {
                args.dims = self.ptr(OP, dims)?;
                args.source = GATHER;
                (*n, 0, format!("{kv}_gather"))
            }
        };
        args.n = word(OP, "n", n)?;
        args.width = word(OP, "row width", width)?;
        let integers = matches!(args.source, 1 | 4 | 5);
        if !integers && !self.attends(act, kv) {
            return Err(self.unsupported(OP, format!("{act} queries over a {kv} cache")));
        }
        let kv_heads = p.cache.kv_heads;
        let keys = if integers { DType::I8 } else { kv };
        let kind = kernel(OP, (act, keys), p.pool, p.heads / kv_heads, (n, args.source))
            .ok_or_else(|| {
                self.unsupported(OP, format!("groups of {} heads", p.heads / kv_heads))
            })?;
        let sums = sums && kind.tensor_cores;
        let kind = if sums { kind.with_sums() } else { kind };
        let shape = self.score_shape(&kind, [p.seqs.max_kv, kv_heads, p.seqs.n]);
        let parts = shape.grid[0];
        let sums = sums.then(|| self.scratch(p.seqs.n * p.heads * parts * 8)).transpose()?;
        args.sums = sums.as_ref().map_or(0, |s| s.ptr);
        let entry = format!("score_dims_{element}_{}", kind.suffix);
        self.launch(OP, &entry, shape, Args::new().with(args))?;
        Ok(sums.map(|scratch| Sums { scratch, parts }))
    }

    /// The launch over `[keys, parts, sequences]`.
    fn score_shape(&self, kernel: &Kernel, [keys, parts, n]: [usize; 3]) -> Shape {
        const BLOCK: usize = 128;
        const MOST_TILES: usize = 16;
        // All blocks at once where that leaves each a few tiles, which they take in turn; more tiles a block would leave
        // the last ones waiting.
        let resident = self.limits.sms * kernel.resident;
        let tiles = keys.div_ceil(BLOCK / 4 * kernel.rows);
        let at_once = resident / (parts * n).max(1);
        let blocks = at_once.max(tiles.div_ceil(MOST_TILES)).clamp(1, tiles.max(1));
        Shape::new([blocks, parts, n], BLOCK)
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
            source: if dims.is_some() { GATHER } else { 0 },
            indices: self.ptr(OP, p.among.indices)?,
            counts: self.ptr(OP, p.among.counts)?,
            lists: word(OP, "lists", p.lists)?,
            list_len: word(OP, "k", p.among.k)?,
            ..how(act, p.pool, p.scale)
        };
        let parts = p.parts_per_seq();
        let kind = kernel(OP, (act, kv), p.pool, p.heads / parts, (n, args.source))
            .ok_or_else(|| self.unsupported(OP, format!("groups of {} heads", p.heads / parts)))?;
        let shape = self.score_shape(&kind, [p.among.k, parts, p.seqs.n]);
        let source = if dims.is_some() { "gather" } else { "lead" };
        let entry = format!("score_rows_{kv}_{source}_{}", kind.suffix);
        self.launch(OP, &entry, shape, Args::new().with(args))
    }

    /// `sums`: those of the scores, where they have been taken.
    pub(super) fn pool_scores_op(&self, p: &PoolScores<'_>, sums: Option<Sums<'_>>) -> Result<()> {
        const OP: &str = "pool_scores";
        p.check()?;
        let seqs = self.seqs(OP, &p.seqs)?;
        let (scores, heads) = (self.ptr(OP, p.scores)?, word(OP, "heads", p.heads)?);
        let stride = p.stride as u64;
        let lengths = p.lengths.map_or(Ok(0), |t| self.ptr(OP, t))?;
        let rows = word(OP, "rows", p.rows_per_seq())?;
        // Logits are pooled without one.
        let softmax = p.pool.softmax();
        if p.heads > 1024 {
            return Err(self.unsupported(OP, format!("{} query heads", p.heads)));
        }
        let sums = match sums {
            None if softmax => {
                let parts = p.longest().div_ceil(LSE_CHUNK).max(1);
                let scratch = self.scratch(p.seqs.n * p.heads * parts * 8)?;
                let args = Args::new().with(scores).with(seqs).with(scratch.ptr).with(heads);
                let args = args.with(stride).with(lengths).with(rows);
                self.launch(OP, "pool_lse", Shape::new([parts, p.heads, p.seqs.n], 256), args)?;
                Some(Sums { scratch, parts })
            }
            sums => sums,
        };
        let (ptr, parts) = sums.as_ref().map_or((0, 0), |s| (s.scratch.ptr, s.parts));
        let args = Args::new()
            .with(scores)
            .with(seqs)
            .with(ptr)
            .with(word(OP, "parts", parts)?)
            .with(self.ptr(OP, p.out)?)
            .with(heads)
            .with(rows)
            .with(stride)
            .with(u32::from(!p.pool.largest()))
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

    pub(super) fn trim_scores_op(&self, p: &TrimScores<'_>) -> Result<()> {
        const OP: &str = "trim_scores";
        p.check()?;
        let args = Args::new()
            .with(self.ptr(OP, p.scores)?)
            .with(self.seqs(OP, &p.seqs)?)
            .with(word(OP, "rows_per_seq", p.rows_per_seq)?)
            .with(p.stride as u64);
        match p.trim {
            Trim::Mass { permille, at_least } => {
                let args = args.with(permille as f32 / 1000.0).with(at_least);
                let shape = Shape::new([p.rows_per_seq, p.seqs.n, 1], 1024);
                self.launch(OP, "trim_scores_mass", shape, args)
            }
            Trim::Together { tokens, at_least } => {
                let shape = Shape::new([p.seqs.n, 1, 1], 1024);
                self.launch(OP, "trim_scores_together", shape, args.with(tokens).with(at_least))
            }
        }
    }
}

#[cfg(test)]
super::args::same_sizes! {
    "score_dims" "ScoreArgs" ScoreArgs,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::launch::holds;

    #[test]
    fn kernels_have_the_instances_that_are_launched() {
        holds("pool_scores", &format!("#define CHUNK {LSE_CHUNK}u"));
        holds("score_dims", &format!("#define GATHER {GATHER}u"));
        let of = |op, keys, heads, n, source| {
            kernel(op, (DType::BF16, keys), HeadPool::MaxLogit, heads, (n, source)).unwrap()
        };
        for (heads, tiles) in [(8, 1), (16, 2)] {
            for n in [32, 64, 128] {
                for (keys, source, all) in [
                    (DType::BF16, 0, "bf16, bf16_lead, LEAD"),
                    (DType::BF16, 2, "bf16, bf16_slice, SLICE"),
                    (DType::I8, 1, "i8, int8, INT8"),
                    (DType::I8, 4, "i8, slice8, SLICE8"),
                    (DType::I8, 5, "i8, slice4, SLICE4"),
                ] {
                    let k = of("score_dims", keys, heads, n, source);
                    assert_eq!(k.suffix, format!("c{}_t{tiles}", n / 32));
                    let (rows, resident) = (k.rows, k.resident);
                    let sums = k.with_sums();
                    assert!(sums.suffix.ends_with("_sums"));
                    let resident = format!("{resident}, {}", sums.resident);
                    match (n, tiles) {
                        (32, 1) => {
                            holds("score_dims", &format!("MMA_ALL({all}, {rows}, {resident})"))
                        }
                        _ => {
                            let which = format!("SOURCE, {}, {tiles}, {rows}, {resident})", n / 32);
                            holds("score_dims", &which);
                        }
                    }
                }
                let k = of("score_rows", DType::BF16, heads, n, 0);
                holds("score_rows", &format!("MMA(K, {}, {tiles}, {})", n / 32, k.resident));
                assert_eq!(k.rows, 4);
            }
        }
        for (g, rows) in GROUPS {
            holds("score_dims", &format!("KERNEL(K, NAME, SOURCE, {g}, {rows})"));
        }
        assert_eq!(of("score_dims", DType::BF16, 4, 48, 0).suffix, "g4");
        assert_eq!(of("score_dims", DType::F16, 4, 32, 0).suffix, "g4");
    }
}
