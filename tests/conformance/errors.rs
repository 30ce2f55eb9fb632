//! Arguments that do not fit: every op answers `BadArgument` and touches nothing.

use super::Cases;
use super::batch::{Batch, Cache, Shape};
use super::rig::{Outcome, Rig};
use longsight::backend::*;

pub fn cases(c: &mut Cases) {
    c.add("embed", "bad_arguments", |rig, _| embed_gather(rig));
    c.add("linear", "bad_arguments", |rig, _| linear(rig));
    c.add("linear_gated", "bad_arguments", |rig, _| linear_gated(rig));
    c.add("rms_norm", "bad_arguments", |rig, _| norm_rope_swiglu(rig));
    c.add("kv_append", "bad_arguments", |rig, _| kv(rig));
    c.add("score_dims", "bad_arguments", |rig, _| score(rig));
    c.add("attend_dense", "bad_arguments", |rig, _| attend(rig));
}

/// A size whose products wrap around to something small.
pub const WRAPS: usize = 1 << 62;

/// `t` without its last element.
pub fn short(t: &Tensor) -> Tensor {
    t.slice(0, t.len() - 1)
}

fn embed_gather(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let (rows, cols, vocab) = (3, 64, 10);
    let tokens = rig.words(&[1, 2, 3])?;
    let table = rig.zeros(DType::F32, vocab * cols)?;
    let out = rig.output(DType::F32, rows * cols)?;
    let p = || Embed { tokens: &tokens, table: &table, out: &out, rows, cols, vocab, scale: 1.0 };
    rig.refuses("tokens as f32", dev.embed(&Embed { tokens: &table, ..p() }))?;
    rig.refuses("table as u32", dev.embed(&Embed { table: &tokens, ..p() }))?;
    rig.refuses("scaled by NaN", dev.embed(&Embed { scale: f32::NAN, ..p() }))?;
    rig.refuses("short table", dev.embed(&Embed { table: &short(&table), ..p() }))?;
    rig.refuses("short out", dev.embed(&Embed { out: &short(&out), ..p() }))?;
    rig.refuses("short tokens", dev.embed(&Embed { tokens: &short(&tokens), ..p() }))?;
    rig.refuses("sizes that wrap", dev.embed(&Embed { vocab: WRAPS, ..p() }))?;
    rig.refuses("out in table", dev.embed(&Embed { out: &table, ..p() }))?;
    let (n, x_rows) = (3, vocab);
    let p = || GatherRows { x: &table, rows: &tokens, out: &out, n, x_rows, cols };
    rig.refuses("short x", dev.gather_rows(&GatherRows { x: &short(&table), ..p() }))?;
    rig.refuses("out is x", dev.gather_rows(&GatherRows { out: &table, ..p() }))?;
    rig.refuses("sizes that wrap", dev.gather_rows(&GatherRows { x_rows: WRAPS, ..p() }))?;
    rig.refuses("short out", dev.gather_rows(&GatherRows { out: &short(&out), ..p() }))?;
    rig.refuses("rows as f32", dev.gather_rows(&GatherRows { rows: &out, ..p() }))
}

fn linear_gated(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let (rows, inputs, ffn) = (2, 64, 16);
    let x = rig.zeros(DType::F32, rows * inputs)?;
    let w = rig.zeros(DType::F32, 2 * ffn * inputs)?;
    let y = rig.output(DType::F32, rows * 2 * ffn)?;
    let other = rig.output(DType::F32, rows * 2 * ffn)?;
    let out = rig.output(DType::F32, rows * ffn)?;
    let bias = rig.zeros(DType::F32, 2 * ffn)?;
    let (bias, outputs, accumulate) = (Some(&bias), 2 * ffn, false);
    let l = || Linear { x: &x, w: &w, bias: None, y: &y, rows, inputs, outputs, accumulate };
    let s = || SwiGlu { x: &y, out: &out, rows, ffn };
    rig.refuses("a bias", dev.linear_gated(&Linear { bias, ..l() }, &s()))?;
    rig.refuses("a sum", dev.linear_gated(&Linear { accumulate: true, ..l() }, &s()))?;
    rig.refuses("another tensor", dev.linear_gated(&l(), &SwiGlu { x: &other, ..s() }))?;
    rig.refuses("fewer rows", dev.linear_gated(&l(), &SwiGlu { rows: 1, ..s() }))?;
    rig.refuses("a narrower width", dev.linear_gated(&l(), &SwiGlu { ffn: 8, ..s() }))?;
    rig.refuses("out is x", dev.linear_gated(&l(), &SwiGlu { out: &x, ..s() }))?;
    rig.refuses("out in w", dev.linear_gated(&l(), &SwiGlu { out: &w.slice(0, 32), ..s() }))
}

fn linear(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let (rows, inputs, outputs) = (2, 64, 16);
    let x = rig.zeros(DType::F32, rows * inputs)?;
    let w = rig.zeros(DType::F32, outputs * inputs)?;
    let y = rig.output(DType::F32, rows * outputs)?;
    let bias = rig.zeros(DType::F32, outputs)?;
    let index = rig.words(&[0; 64])?;
    let p = || Linear {
        x: &x,
        w: &w,
        bias: Some(&bias),
        y: &y,
        rows,
        inputs,
        outputs,
        accumulate: false,
    };
    rig.refuses("short x", dev.linear(&Linear { x: &short(&x), ..p() }))?;
    rig.refuses("short w", dev.linear(&Linear { w: &short(&w), ..p() }))?;
    rig.refuses("short y", dev.linear(&Linear { y: &short(&y), ..p() }))?;
    rig.refuses("short bias", dev.linear(&Linear { bias: Some(&short(&bias)), ..p() }))?;
    rig.refuses("u32 bias", dev.linear(&Linear { bias: Some(&index), ..p() }))?;
    rig.refuses("u32 x", dev.linear(&Linear { x: &index, rows: 1, ..p() }))?;
    rig.refuses("inputs not of 8", dev.linear(&Linear { inputs: 60, ..p() }))?;
    rig.refuses("rows that wrap", dev.linear(&Linear { rows: WRAPS, inputs: 16, ..p() }))?;
    rig.refuses("y is x", dev.linear(&Linear { y: &x, ..p() }))?;
    rig.refuses("y in w", dev.linear(&Linear { y: &w.slice(0, 32), ..p() }))?;
    let all = rig.zeros(DType::F32, rows * outputs)?;
    let bias = Some(&all);
    rig.refuses("y over bias", dev.linear(&Linear { y: &all, bias, accumulate: true, ..p() }))
}

fn norm_rope_swiglu(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let (rows, cols) = (2, 64);
    let x = rig.zeros(DType::F32, 2 * rows * cols)?;
    let weight = rig.zeros(DType::F32, cols)?;
    let out = rig.output(DType::F32, rows * cols)?;
    let positions = rig.words(&[0, 1])?;
    let p = || RmsNorm { x: &x, weight: &weight, out: &out, rows, cols, eps: 1e-5 };
    rig.refuses("short weight", dev.rms_norm(&RmsNorm { weight: &short(&weight), ..p() }))?;
    rig.refuses("short out", dev.rms_norm(&RmsNorm { out: &short(&out), ..p() }))?;
    rig.refuses("out is x", dev.rms_norm(&RmsNorm { out: &x, ..p() }))?;
    rig.refuses("x as u32", dev.rms_norm(&RmsNorm { x: &positions, ..p() }))?;
    rig.refuses("rows that wrap", dev.rms_norm(&RmsNorm { rows: WRAPS, ..p() }))?;
    rig.refuses("out is weight", dev.rms_norm(&RmsNorm { out: &weight, rows: 1, ..p() }))?;
    let p = || Rope {
        x: &x,
        x_stride: 64,
        positions: &positions,
        inv_freq: &weight,
        heads_per_freq: 1,
        norm: None,
        factor: 1.0,
        out: &out,
        rows,
        heads: 1,
        head_dim: 64,
    };
    rig.refuses("stride beyond x", dev.rope(&Rope { x_stride: 200, ..p() }))?;
    rig.refuses("odd head_dim", dev.rope(&Rope { head_dim: 63, ..p() }))?;
    rig.refuses("no frequency rows", dev.rope(&Rope { heads_per_freq: 0, ..p() }))?;
    rig.refuses("short positions", dev.rope(&Rope { positions: &short(&positions), ..p() }))?;
    rig.refuses("short out", dev.rope(&Rope { out: &short(&out), ..p() }))?;
    rig.refuses("a stride that wraps", dev.rope(&Rope { x_stride: usize::MAX - 63, ..p() }))?;
    rig.refuses("heads that wrap", dev.rope(&Rope { heads: WRAPS, heads_per_freq: WRAPS, ..p() }))?;
    let freqs = rig.zeros(DType::F32, rows * cols)?;
    rig.refuses("out is inv_freq", dev.rope(&Rope { inv_freq: &freqs, out: &freqs, ..p() }))?;
    let p = || SwiGlu { x: &x, out: &out, rows, ffn: cols };
    rig.refuses("short x", dev.swiglu(&SwiGlu { x: &short(&x), ..p() }))?;
    rig.refuses("short out", dev.swiglu(&SwiGlu { out: &short(&out), ..p() }))?;
    rig.refuses("sizes that wrap", dev.swiglu(&SwiGlu { ffn: 1 << 63, ..p() }))?;
    rig.refuses("out in x", dev.swiglu(&SwiGlu { out: &x.slice(0, rows * cols), ..p() }))
}

const SHAPE: Shape = Shape { kv_heads: 2, d: 64, lead: 32 };

fn kv(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let c = Cache::new(rig, &b, SHAPE, DType::F32, |s| s.kv_len)?;
    let k = rig.zeros(DType::F32, b.rows * 128)?;
    let stats = rig.zeros(DType::F32, b.slots * 2 * key_stats_len(64))?;
    let data = rig.zeros(DType::I8, b.n_pages * 2 * PAGE * 32)?;
    let scale = rig.zeros(DType::F32, b.n_pages * 2 * PAGE)?;
    let dims = rig.words(&vec![0; b.slots * 2 * 16])?;
    let slice = rig.zeros(DType::F32, b.slots * 2 * 128 * 16)?;
    let keys = Int8Keys { data: &data, scale: &scale, dims: 32 };
    let compact =
        CompactSlice { data: &slice, dims: &dims, n_dims: 16, capacity: 128, slots: b.slots };
    let p = || KvAppend {
        k: &k,
        k_stride: 128,
        v: &k,
        v_stride: 128,
        seqs: b.seqs(),
        cache: c.pool(),
        int8: Some(keys),
        slice: Some(compact),
    };
    let pool = |k, v| KvPool { k, v, ..c.pool() };
    let (cut_k, cut_v) = (short(&c.k), short(&c.v));
    rig.refuses("short k pool", dev.kv_append(&KvAppend { cache: pool(&cut_k, &c.v), ..p() }))?;
    rig.refuses("short v pool", dev.kv_append(&KvAppend { cache: pool(&c.k, &cut_v), ..p() }))?;
    rig.refuses("u32 pool", dev.kv_append(&KvAppend { cache: pool(&dims, &c.v), ..p() }))?;
    let lead = |lead| KvPool { lead, ..c.pool() };
    for wrong in [0, 12, 72] {
        let what = format!("lead {wrong}");
        rig.refuses(&what, dev.kv_append(&KvAppend { cache: lead(wrong), ..p() }))?;
        rig.refuses(
            &what,
            dev.key_stats(&KeyStats {
                seqs: b.seqs(),
                cache: lead(wrong),
                stats: &stats,
                slots: 3,
            }),
        )?;
    }
    rig.refuses("short k", dev.kv_append(&KvAppend { k: &short(&k), ..p() }))?;
    rig.refuses("stride beyond v", dev.kv_append(&KvAppend { v_stride: 300, ..p() }))?;
    let int8 = Some(Int8Keys { dims: 12, ..keys });
    rig.refuses("12 int8 dimensions", dev.kv_append(&KvAppend { int8, ..p() }))?;
    let int8 = Some(Int8Keys { dims: 40, ..keys });
    rig.refuses("short int8 keys", dev.kv_append(&KvAppend { int8, ..p() }))?;
    let slice = Some(CompactSlice { capacity: 129, ..compact });
    rig.refuses("short slice", dev.kv_append(&KvAppend { slice, ..p() }))?;
    let slice = Some(CompactSlice { capacity: WRAPS, ..compact });
    rig.refuses("a slice that wraps", dev.kv_append(&KvAppend { slice, ..p() }))?;
    let wraps = KvPool { n_pages: WRAPS, ..c.pool() };
    rig.refuses("pages that wrap", dev.kv_append(&KvAppend { cache: wraps, ..p() }))?;
    rig.refuses("a stride that wraps", dev.kv_append(&KvAppend { k_stride: usize::MAX, ..p() }))?;
    let same = pool(&c.k, &c.k);
    rig.refuses("values over keys", dev.kv_append(&KvAppend { cache: same, ..p() }))?;
    rig.refuses("input in the pages", dev.kv_append(&KvAppend { k: &c.v, ..p() }))?;
    let slice = Some(CompactSlice { data: &c.v, ..compact });
    rig.refuses("slice over values", dev.kv_append(&KvAppend { slice, ..p() }))?;
    rig.refuses("scales over the input", dev.kv_append(&KvAppend { k: &scale, ..p() }))?;
    let int8 = Some(Int8Keys { scale: compact.data, ..keys });
    rig.refuses("scales over the slice", dev.kv_append(&KvAppend { int8, ..p() }))?;
    let meta = short(b.seqs().meta);
    let seqs = Seqs { meta: &meta, ..b.seqs() };
    rig.refuses("short meta", dev.kv_append(&KvAppend { seqs, ..p() }))?;
    let stats = short(&stats);
    let p = KeyStats { seqs: b.seqs(), cache: c.pool(), stats: &stats, slots: b.slots };
    rig.refuses("short stats", dev.key_stats(&p))?;
    rig.refuses("slots that wrap", dev.key_stats(&KeyStats { slots: WRAPS, ..p }))?;
    rig.refuses("stats over keys", dev.key_stats(&KeyStats { stats: &c.k, ..p }))?;
    let changed = rig.words(&vec![u32::MAX; b.slots * 2 * CHANGED_WORDS])?;
    let p = || RebuildSlice { seqs: b.seqs(), cache: c.pool(), slice: compact, changed: &changed };
    rig.refuses(
        "short mask",
        dev.rebuild_slice(&RebuildSlice { changed: &short(&changed), ..p() }),
    )?;
    let over = CompactSlice { data: &c.k, ..compact };
    rig.refuses("slice over keys", dev.rebuild_slice(&RebuildSlice { slice: over, ..p() }))?;
    let seqs = Seqs { max_kv: 129, ..b.seqs() };
    rig.refuses("no room for max_kv", dev.rebuild_slice(&RebuildSlice { seqs, ..p() }))
}

fn score(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let c = Cache::new(rig, &b, SHAPE, DType::F32, |s| s.kv_len)?;
    let (heads, stride) = (6, b.stride());
    let q = rig.zeros(DType::F32, b.rows * heads * 64)?;
    let scores = rig.output(DType::F32, b.n() * 2 * stride)?;
    let index = rig.words(&[0; 64])?;
    let p = || ScoreDims {
        q: &q,
        seqs: b.seqs(),
        cache: c.pool(),
        source: ScoreSource::Lead { n: 32 },
        heads,
        pool: HeadPool::SumLogit,
        scale: LogitScale::InvSqrtDim,
        scores: &scores,
        stride,
    };
    for n in [0, 12, 72] {
        let source = ScoreSource::Lead { n };
        rig.refuses(&format!("{n} dimensions"), dev.score_dims(&ScoreDims { source, ..p() }))?;
    }
    let source = ScoreSource::Gather { dims: &q, n: 8 };
    rig.refuses("f32 dimension list", dev.score_dims(&ScoreDims { source, ..p() }))?;
    rig.refuses("too many rows", dev.score_dims(&ScoreDims { pool: HeadPool::None, ..p() }))?;
    rig.refuses("stride below max_kv", dev.score_dims(&ScoreDims { stride: 64, ..p() }))?;
    rig.refuses("odd stride", dev.score_dims(&ScoreDims { stride: stride + 1, ..p() }))?;
    rig.refuses("heads", dev.score_dims(&ScoreDims { heads: 5, ..p() }))?;
    rig.refuses("short q", dev.score_dims(&ScoreDims { q: &short(&q), ..p() }))?;
    rig.refuses("u32 scores", dev.score_dims(&ScoreDims { scores: &index, ..p() }))?;
    let seqs = Seqs { max_q: 2, ..b.seqs() };
    rig.refuses("prefill", dev.score_dims(&ScoreDims { seqs, ..p() }))?;
    rig.refuses("a stride that wraps", dev.score_dims(&ScoreDims { stride: WRAPS, ..p() }))?;
    rig.refuses("scores over keys", dev.score_dims(&ScoreDims { scores: &c.k, ..p() }))?;
    rig.refuses("scores over q", dev.score_dims(&ScoreDims { scores: &q, ..p() }))?;
    let pooled = rig.output(DType::F32, b.n() * stride)?;
    let p = || PoolScores {
        scores: &scores,
        out: &pooled,
        seqs: b.seqs(),
        heads: 2,
        kv_heads: 1,
        stride,
        pool: HeadPool::MaxSoftmax,
        lengths: None,
    };
    rig.refuses("nothing to pool", dev.pool_scores(&PoolScores { pool: HeadPool::None, ..p() }))?;
    rig.refuses("no KV heads", dev.pool_scores(&PoolScores { kv_heads: 0, ..p() }))?;
    rig.refuses("short scores", dev.pool_scores(&PoolScores { heads: 4, ..p() }))?;
    rig.refuses("out in scores", dev.pool_scores(&PoolScores { out: &scores, ..p() }))?;
    let (scores, seqs) = (&scores, b.seqs());
    let p = Force { scores, seqs, rows_per_seq: 2, stride, sinks: 4, recent: 0, among: None };
    rig.refuses("newest token not forced", dev.force(&p))?;
    rig.refuses("rows", dev.force(&Force { recent: 1, rows_per_seq: 3, ..p }))?;
    rig.refuses("rows that wrap", dev.force(&Force { recent: 1, rows_per_seq: WRAPS, ..p }))
}

fn attend(rig: &mut Rig) -> Outcome {
    let dev = rig.dev.clone();
    let b = Batch::decode(rig, &[65, 3])?;
    let c = Cache::new(rig, &b, SHAPE, DType::F32, |s| s.kv_len)?;
    let (heads, n) = (6, b.rows * 6);
    let q = rig.zeros(DType::F32, n * 64)?;
    let out = rig.output(DType::F32, n * 64)?;
    let lse = rig.output(DType::F32, n)?;
    let index = rig.words(&vec![0; b.n() * heads * 8])?;
    let p = || AttendDense {
        q: &q,
        seqs: b.seqs(),
        cache: c.pool(),
        heads,
        scale: 0.125,
        window: None,
        splits: 1,
        out: &out,
        lse: Some(&lse),
        values: true,
        logits: None,
    };
    rig.refuses("empty window", dev.attend_dense(&AttendDense { window: Some(0), ..p() }))?;
    let nothing = AttendDense { lse: None, values: false, ..p() };
    rig.refuses("nothing wanted", dev.attend_dense(&nothing))?;
    rig.refuses("no split", dev.attend_dense(&AttendDense { splits: 0, ..p() }))?;
    let stride = b.stride();
    let scores = rig.output(DType::F32, b.n() * heads * stride)?;
    let (less, begin) = (short(&scores), scores.slice(0, n));
    let logits = Logits { scores: &scores, stride, pool: HeadPool::None };
    let kept = || AttendDense { logits: Some(logits), ..p() };
    let few = Some(Logits { scores: &less, ..logits });
    rig.refuses("short logits", dev.attend_dense(&AttendDense { logits: few, ..p() }))?;
    let window = AttendDense { window: Some(8), ..kept() };
    rig.refuses("logits of a window", dev.attend_dense(&window))?;
    let unscaled = AttendDense { scale: 1.0, ..kept() };
    rig.refuses("logits at another scale", dev.attend_dense(&unscaled))?;
    let within = AttendDense { lse: Some(&begin), ..kept() };
    rig.refuses("lse in the logits", dev.attend_dense(&within))?;
    rig.refuses("no room for 2 splits", dev.attend_dense(&AttendDense { splits: 2, ..p() }))?;
    rig.refuses("short lse", dev.attend_dense(&AttendDense { lse: Some(&short(&lse)), ..p() }))?;
    rig.refuses("short out", dev.attend_dense(&AttendDense { out: &short(&out), ..p() }))?;
    rig.refuses("u32 q", dev.attend_dense(&AttendDense { q: &index, ..p() }))?;
    rig.refuses("groups of 17", dev.attend_dense(&AttendDense { heads: 34, ..p() }))?;
    let seqs = Seqs { rows: WRAPS, ..b.seqs() };
    rig.refuses("rows that wrap", dev.attend_dense(&AttendDense { seqs, ..p() }))?;
    rig.refuses("out is q", dev.attend_dense(&AttendDense { out: &q, ..p() }))?;
    rig.refuses("out in the pages", dev.attend_dense(&AttendDense { out: &c.v, ..p() }))?;
    rig.refuses("lse in out", dev.attend_dense(&AttendDense { lse: Some(&out), ..p() }))?;
    let two = rig.output(DType::F32, 2 * n * 64)?;
    let split = AttendDense { splits: 2, out: &two, lse: None, ..p() };
    rig.refuses("splits without lse", dev.attend_dense(&split))?;
    rig.refuses("splits that wrap", dev.attend_dense(&AttendDense { splits: WRAPS, ..p() }))?;
    let p = || AttendRows {
        q: &q,
        seqs: b.seqs(),
        cache: c.pool(),
        heads,
        scale: 0.125,
        indices: &index,
        counts: &index,
        k: 8,
        rows_per_seq: 6,
        head_map: None,
        settled: false,
        splits: 1,
        out: &out,
        lse: None,
    };
    rig.refuses("3 lists", dev.attend_rows(&AttendRows { rows_per_seq: 3, ..p() }))?;
    let mapped = |head_map, rows_per_seq| AttendRows { head_map, rows_per_seq, ..p() };
    let one = index.slice(0, 1);
    rig.refuses("a short map", dev.attend_rows(&mapped(Some(&one), 3)))?;
    rig.refuses("a map of f32", dev.attend_rows(&mapped(Some(&lse), 3)))?;
    rig.refuses("a map into no lists", dev.attend_rows(&mapped(Some(&index), 0)))?;
    rig.refuses("short indices", dev.attend_rows(&AttendRows { k: 9, ..p() }))?;
    rig.refuses("f32 counts", dev.attend_rows(&AttendRows { counts: &q, ..p() }))?;
    rig.refuses("k that wraps", dev.attend_rows(&AttendRows { k: WRAPS, ..p() }))?;
    rig.refuses("out is q", dev.attend_rows(&AttendRows { out: &q, ..p() }))?;
    let (part, part_lse, seqs) = (&two, &lse, b.seqs());
    let (out, lse, head_dim) = (&out, None, 64);
    let p = Merge { part, part_lse, seqs, splits: 2, heads, head_dim, out, lse };
    rig.refuses("short part_lse", dev.merge(&p))?;
    let one = Merge { splits: 1, ..p };
    rig.refuses("out in part", dev.merge(&Merge { out: part, ..one }))?;
    rig.refuses("splits that wrap", dev.merge(&Merge { splits: WRAPS, ..one }))
}
