//! Arguments that do not fit the ops of blocks: `BadArgument`, and nothing is touched.

use super::Cases;
use super::batch::{Batch, Cache, Shape};
use super::errors::{WRAPS, short};
use super::rig::{Outcome, Rig};
use longsight::backend::*;

pub fn cases(c: &mut Cases) {
    c.add("kv_summaries", "bad_arguments", |rig, _| summaries(rig));
    c.add("pool_blocks", "bad_arguments", |rig, _| blocks(rig));
}

const WINDOWS: SummaryKind = SummaryKind::Windows { size: 32, stride: 16 };

fn summaries(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let shape = Shape { kv_heads: 2, d: 64, lead: 64 };
    let b = Batch::decode(rig, &[100, 3])?;
    let cache = Cache::new(rig, &b, shape, DType::F32, |s| s.kv_len)?;
    let data = rig.output(DType::F32, b.n_pages * 2 * WINDOWS.page_len(64))?;
    let half = rig.output(DType::F16, data.len())?;
    let (kind, cache, few) = (WINDOWS, cache.pool(), short(&data));
    let keep =
        |data, kind| KvSummaries { seqs: b.seqs(), cache, summaries: Summaries { data, kind } };
    rig.refuses("short data", dev.kv_summaries(&keep(&few, kind)))?;
    rig.refuses("another dtype", dev.kv_summaries(&keep(&half, kind)))?;
    rig.refuses("into the keys", dev.kv_summaries(&keep(cache.k, kind)))?;
    for kind in [
        SummaryKind::Bounds { page: 0 },
        SummaryKind::Bounds { page: 24 },
        SummaryKind::Cuboid { page: 128 },
        SummaryKind::Windows { size: 40, stride: 16 },
        SummaryKind::Windows { size: 16, stride: 0 },
        SummaryKind::Windows { size: 128, stride: 16 },
    ] {
        rig.refuses(&format!("{kind:?}"), dev.kv_summaries(&keep(&data, kind)))?;
    }
    // Bounds hold two vectors: the data has room for windows only.
    let bounds = SummaryKind::Bounds { page: 16 };
    rig.refuses("more vectors", dev.kv_summaries(&keep(&data, bounds)))?;

    let q = rig.zeros(DType::F32, b.rows * 4 * 64)?;
    let stride = kind.count(b.max_kv);
    let scores = rig.output(DType::F32, b.n() * 4 * stride)?;
    let p = || ScoreSummaries {
        q: &q,
        seqs: b.seqs(),
        summaries: Summaries { data: &data, kind },
        n_pages: b.n_pages,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        from: 0,
        dims: 64,
        scale: 1.0,
        scores: &scores,
        stride,
    };
    rig.refuses("short q", dev.score_summaries(&ScoreSummaries { q: &short(&q), ..p() }))?;
    rig.refuses(
        "short scores",
        dev.score_summaries(&ScoreSummaries { scores: &short(&scores), ..p() }),
    )?;
    rig.refuses(
        "small stride",
        dev.score_summaries(&ScoreSummaries { stride: stride - 1, ..p() }),
    )?;
    rig.refuses("a third of a head", dev.score_summaries(&ScoreSummaries { kv_heads: 3, ..p() }))?;
    rig.refuses("no KV head", dev.score_summaries(&ScoreSummaries { kv_heads: 0, ..p() }))?;
    rig.refuses("odd head_dim", dev.score_summaries(&ScoreSummaries { head_dim: 63, ..p() }))?;
    rig.refuses("pages that wrap", dev.score_summaries(&ScoreSummaries { n_pages: WRAPS, ..p() }))?;
    rig.refuses("scores are q", dev.score_summaries(&ScoreSummaries { scores: &q, ..p() }))?;
    let of = |from, dims| ScoreSummaries { from, dims, ..p() };
    for (from, dims) in [(0, 0), (0, 72), (8, 64), (4, 8), (0, 12), (usize::MAX - 7, 8)] {
        rig.refuses(&format!("{dims} from {from} on"), dev.score_summaries(&of(from, dims)))?;
    }
    let seqs = Seqs { max_q: 2, ..b.seqs() };
    rig.refuses("a prompt", dev.score_summaries(&ScoreSummaries { seqs, ..p() }))
}

fn blocks(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[100, 3])?;
    let (stride, block_stride) = (WINDOWS.count(b.max_kv), b.max_kv.div_ceil(64));
    let scores = rig.zeros(DType::F32, b.n() * 4 * stride)?;
    let out = rig.output(DType::F32, b.n() * 2 * block_stride)?;
    let p = || PoolBlocks {
        scores: &scores,
        seqs: b.seqs(),
        kind: WINDOWS,
        heads: 4,
        kv_heads: 2,
        pool: HeadPool::SumLogit,
        stride,
        unit: 64,
        sinks: 0,
        recent: 1,
        out: &out,
        block_stride,
    };
    rig.refuses("short scores", dev.pool_blocks(&PoolBlocks { scores: &short(&scores), ..p() }))?;
    rig.refuses("short out", dev.pool_blocks(&PoolBlocks { out: &short(&out), ..p() }))?;
    rig.refuses("rows per head", dev.pool_blocks(&PoolBlocks { pool: HeadPool::None, ..p() }))?;
    rig.refuses("small stride", dev.pool_blocks(&PoolBlocks { stride: stride - 1, ..p() }))?;
    let small = block_stride - 1;
    rig.refuses("small block stride", dev.pool_blocks(&PoolBlocks { block_stride: small, ..p() }))?;
    rig.refuses("no KV head", dev.pool_blocks(&PoolBlocks { kv_heads: 0, ..p() }))?;
    rig.refuses("3 KV heads", dev.pool_blocks(&PoolBlocks { kv_heads: 3, ..p() }))?;
    for unit in [0, 1, 48, 128] {
        rig.refuses("unit", dev.pool_blocks(&PoolBlocks { unit, ..p() }))?;
    }
    let kind = SummaryKind::Bounds { page: 64 };
    rig.refuses(
        "summaries longer than blocks",
        dev.pool_blocks(&PoolBlocks { kind, unit: 32, ..p() }),
    )?;
    rig.refuses("out is scores", dev.pool_blocks(&PoolBlocks { out: &scores, ..p() }))?;

    let (k, unit) = (2, 64);
    let lists = rig.zeros(DType::U32, b.n() * 2 * k)?;
    let block_counts = rig.zeros(DType::U32, b.n() * 2)?;
    let indices = rig.output(DType::U32, b.n() * 2 * k * unit)?;
    let counts = rig.output(DType::U32, b.n() * 2)?;
    let p = || ExpandBlocks {
        blocks: &lists,
        block_counts: &block_counts,
        seqs: b.seqs(),
        rows_per_seq: 2,
        k,
        unit,
        indices: &indices,
        counts: &counts,
    };
    rig.refuses("short lists", dev.expand_blocks(&ExpandBlocks { blocks: &short(&lists), ..p() }))?;
    rig.refuses(
        "short indices",
        dev.expand_blocks(&ExpandBlocks { indices: &short(&indices), ..p() }),
    )?;
    rig.refuses(
        "short counts",
        dev.expand_blocks(&ExpandBlocks { counts: &short(&counts), ..p() }),
    )?;
    let few = &short(&block_counts);
    rig.refuses(
        "short block counts",
        dev.expand_blocks(&ExpandBlocks { block_counts: few, ..p() }),
    )?;
    rig.refuses("lists as f32", dev.expand_blocks(&ExpandBlocks { blocks: &scores, ..p() }))?;
    rig.refuses("no list", dev.expand_blocks(&ExpandBlocks { k: 0, ..p() }))?;
    rig.refuses("k that wraps", dev.expand_blocks(&ExpandBlocks { k: WRAPS, ..p() }))?;
    rig.refuses("unit", dev.expand_blocks(&ExpandBlocks { unit: 8, ..p() }))?;
    rig.refuses(
        "counts are block counts",
        dev.expand_blocks(&ExpandBlocks { counts: &block_counts, ..p() }),
    )
}
