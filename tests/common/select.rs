//! A method's own selector over one layer of random keys.

use super::cache::{Heads, Layer, Picked, upload};
use super::profile;
use longsight::backend::reference::floats;
use longsight::backend::{
    AttendRows, DType, KvSummaries, META_WORDS, Meta, Seqs, Summaries, SummaryKind, Tensor,
};
use longsight::select::{
    Given, LayerContext, LayerPlan, LayerShape, MethodSpec, ModelShape, Scratch, Selection,
    TrainedBlocks, Variant, build, correct,
};

/// Summaries of all tokens of the layer.
pub fn summaries(l: &Layer, tokens: usize, kind: SummaryKind) -> Tensor {
    let pool = l.pool();
    let data = l.alloc(DType::F32, pool.n_pages * pool.kv_heads * kind.page_len(pool.head_dim));
    let mut record = [0u32; META_WORDS];
    record[Meta::Q_LEN] = tokens as u32;
    record[Meta::KV_LEN] = tokens as u32;
    let meta = l.alloc(DType::U32, META_WORDS);
    l.dev.upload(&meta, bytemuck::cast_slice(&record)).unwrap();
    let pages = l.seqs().pages;
    let seqs = Seqs {
        meta: &meta,
        pages,
        n: 1,
        max_kv: tokens,
        max_q: tokens,
        rows: tokens,
        settled: false,
    };
    let summaries = Summaries { data: &data, kind };
    l.dev.kv_summaries(&KvSummaries { seqs, cache: pool, summaries }).unwrap();
    data
}

/// The mean query of each KV head's group: a Forecast without training.
pub fn mean_queries(q: &[f32], kv_heads: usize, dim: usize) -> Vec<f32> {
    let group = q.len() / dim / kv_heads;
    let of = |head: &[f32]| -> Vec<f32> {
        (0..dim).map(|i| head[i..].iter().step_by(dim).sum::<f32>() / group as f32).collect()
    };
    q.chunks_exact(group * dim).flat_map(of).collect()
}

/// Runs a method's own selector over the layer, whose query is `q`.
pub fn select(l: &Layer, q: &[f32], spec: &MethodSpec) -> Picked {
    select_then(l, q, spec, |_, _, _| ())
}

/// The same, and the attention `[query, dim]` over what was picked, with the plan's correction.
pub fn attend(l: &Layer, q: &[f32], spec: &MethodSpec) -> (Picked, Vec<f64>) {
    let out = l.alloc(DType::F32, l.heads.query * l.heads.dim);
    let picked = select_then(l, q, spec, |cx, plan, picked| {
        let heads = l.heads;
        l.dev
            .attend_rows(&AttendRows {
                q: &l.q,
                seqs: l.seqs(),
                cache: l.pool(),
                heads: heads.query,
                scale: 1.0 / (heads.dim as f32).sqrt(),
                indices: &picked.indices,
                counts: &picked.counts,
                k: picked.k,
                rows_per_seq: picked.rows_per_seq,
                head_map: None,
                settled: false,
                splits: 1,
                out: &out,
                lse: None,
            })
            .unwrap();
        correct(cx, plan, picked, &out).unwrap();
    });
    (picked, floats(&*l.dev, &out).unwrap())
}

fn select_then(
    l: &Layer,
    q: &[f32],
    spec: &MethodSpec,
    then: impl FnOnce(&LayerContext<'_>, &LayerPlan, &Selection),
) -> Picked {
    let heads = l.heads;
    let Heads { query, kv: kv_heads, dim: head_dim } = heads;
    // NOSA ranks by what the last dimensions hold, whatever that is.
    let plain_dim = match spec.variant {
        Variant::Nosa if l.plain_dim == head_dim => head_dim - 8,
        _ => l.plain_dim,
    };
    let shape = LayerShape { plain_dim, ..l.shape() };
    let importance = (plain_dim < head_dim).then(TrainedBlocks::default);
    let windows = &[None; 14];
    let model = ModelShape { model: "m", windows, heads: query, kv_heads, head_dim, importance };
    // The last: a method's first anchor keeps to exact scores.
    let layers = spec.plan(&model, 4096).unwrap().layers;
    let plan = layers.iter().rfind(|l| l.selects()).expect("a layer that selects");
    let profile = profile::random(1, kv_heads, head_dim);
    let given = Given { profile: Some(&profile), ..Given::default() };
    let mut selector = build(&*l.dev, &shape, plan, given).unwrap().expect("a sparse layer");
    let rows = l.rows(plan.pool);
    // No list is longer than a sequence.
    let k = plan.budget.tokens.min(l.capacity);
    let scratch = Scratch {
        scores: l.alloc(DType::F32, rows * l.capacity),
        head_scores: Some(l.alloc(DType::F32, heads.query * l.capacity)),
        head_lists: Some((l.alloc(DType::U32, heads.query * k), l.alloc(DType::U32, heads.query))),
        stride: l.capacity,
    };
    let out = Selection {
        indices: l.alloc(DType::U32, rows * k),
        counts: l.alloc(DType::U32, rows),
        k,
        rows_per_seq: rows,
    };
    let tokens = l.seqs().max_kv;
    let data = plan.summary().map(|kind| (summaries(l, tokens, kind), kind));
    let forecast = upload(&*l.dev, &mean_queries(q, heads.kv, heads.dim));
    let cx = LayerContext {
        backend: &*l.dev,
        seqs: l.seqs(),
        cache: l.pool(),
        int8: Some(l.int8()),
        stats: Some(&l.stats),
        value_stats: Some(&l.value_stats),
        summaries: data.as_ref().map(|(data, kind)| Summaries { data, kind: *kind }),
        forecast: Some(&forecast),
        shape,
        scratch: &scratch,
    };
    selector.select(&cx, &l.q, &out).unwrap();
    then(&cx, plan, &out);
    Picked::read(&*l.dev, out.indices, out.counts, k)
}
