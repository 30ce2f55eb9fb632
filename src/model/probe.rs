//! What a layer selects beside what it should: its token lists and the exact attention of every token.

use super::StepSeq;
use super::lists::LayerLists;
use super::trace::download_f32;
use super::workspace::Growing;
use crate::backend::{
    Backend, DType, HeadPool, LogitScale, PoolScores, Result, ScoreDims, ScoreSource, Tensor,
};
use crate::select::{LayerContext, Role, Selector};

/// The selection of one sparse layer in one decode step.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerProbe {
    /// Number of the layer, from 0.
    pub layer: usize,
    /// `[kv_heads][tokens]`: exact attention of each cached token, mean over the query heads of the KV head. Each
    /// row sums to 1.
    pub attention: Vec<Vec<f32>>,
    /// `[kv_heads]`: the tokens that the KV head attends to, ascending. Where its query heads have lists of their
    /// own: the union of these.
    pub selected: Vec<Vec<u32>>,
    /// `[kv_heads]`: the key dimensions that the method scores, ascending; empty where the query does not choose any.
    pub dims: Vec<Vec<u32>>,
}

/// Looks into the layers of steps that decode one sequence. Each look scores every token with all dimensions and
/// copies the scores to the host.
#[derive(Debug)]
pub(crate) struct Probe {
    logits: Growing,
    pooled: Growing,
    /// Slot and tokens of the step's only sequence.
    only: Option<(usize, usize)>,
    pub found: Vec<LayerProbe>,
}

impl Probe {
    pub fn new() -> Probe {
        let new = || Growing::new(DType::F32, "probe");
        Probe { logits: new(), pooled: new(), only: None, found: Vec::new() }
    }

    /// A step begins.
    pub fn begin(&mut self, seqs: &[StepSeq<'_>]) {
        self.only = match seqs {
            [one] if one.decode.is_some() => Some((one.slot, one.kv_len())),
            _ => None,
        };
    }

    /// Looks at a layer that has just chosen its tokens.
    pub(super) fn look(
        &mut self,
        cx: &LayerContext<'_>,
        role: &Role,
        lists: &LayerLists,
        selector: Option<&(dyn Selector + 'static)>,
        q: &Tensor,
    ) -> Result<()> {
        let Some((slot, tokens)) = self.only else { return Ok(()) };
        let found = LayerProbe {
            layer: cx.shape.layer,
            attention: self.attention(cx, q, tokens)?,
            selected: selected(cx, role, lists)?,
            dims: dims(cx, selector, slot)?,
        };
        self.found.push(found);
        Ok(())
    }

    /// Mean probabilities of the query heads of each KV head.
    fn attention(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        tokens: usize,
    ) -> Result<Vec<Vec<f32>>> {
        let (b, shape, stride) = (cx.backend, cx.shape, cx.scratch.stride);
        let logits = self.logits.at_least(b, shape.heads * stride)?;
        let pooled = self.pooled.at_least(b, shape.kv_heads * stride)?;
        b.score_dims(&ScoreDims {
            q,
            seqs: cx.seqs,
            cache: cx.cache,
            source: ScoreSource::Lead { n: shape.head_dim },
            heads: shape.heads,
            pool: HeadPool::MeanSoftmax,
            scale: LogitScale::InvSqrtDim,
            scores: &logits,
            stride,
        })?;
        b.pool_scores(&PoolScores {
            scores: &logits,
            out: &pooled,
            seqs: cx.seqs,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            stride,
            pool: HeadPool::MeanSoftmax,
            lengths: None,
        })?;
        let group = (shape.heads / shape.kv_heads) as f32;
        (0..shape.kv_heads)
            .map(|h| {
                // The logarithm of the sum over the group.
                let row = download_f32(b, &pooled.slice(h * stride, tokens))?;
                Ok(row.into_iter().map(|log| log.exp() / group).collect())
            })
            .collect()
    }
}

fn download_u32(b: &dyn Backend, t: &Tensor) -> Result<Vec<u32>> {
    let mut words = vec![0u32; t.len()];
    b.download(t, bytemuck::cast_slice_mut(&mut words))?;
    Ok(words)
}

/// The list of each KV head.
fn selected(cx: &LayerContext<'_>, role: &Role, lists: &LayerLists) -> Result<Vec<Vec<u32>>> {
    let (of, kv_heads) = (&*lists.attend, cx.shape.kv_heads);
    let n = of.rows_per_seq;
    let counts = download_u32(cx.backend, &of.counts.slice(0, n))?;
    let indices = download_u32(cx.backend, &of.indices.slice(0, n * of.k))?;
    let list = |row: usize| {
        let count = counts.get(row).map_or(0, |&c| (c as usize).min(of.k));
        indices.get(row * of.k..row * of.k + count).unwrap_or_default()
    };
    let group = n / kv_heads.max(1);
    let rows = |h: usize| match role {
        Role::Reuse { head_map, refine: None, .. } => {
            let row = head_map.get(h).map_or(h, |&e| e.into());
            row..row + 1
        }
        // One list for all heads.
        _ if group == 0 => 0..1,
        _ => h * group..(h + 1) * group,
    };
    let head = |h: usize| {
        let mut tokens: Vec<u32> = rows(h).flat_map(|r| list(r).iter().copied()).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    };
    Ok((0..kv_heads).map(head).collect())
}

/// The chosen dimensions of each KV head.
fn dims(
    cx: &LayerContext<'_>,
    selector: Option<&(dyn Selector + 'static)>,
    slot: usize,
) -> Result<Vec<Vec<u32>>> {
    let kv_heads = cx.shape.kv_heads;
    let Some((dims, n)) = selector.and_then(Selector::dims) else {
        return Ok(vec![Vec::new(); kv_heads]);
    };
    let all = download_u32(cx.backend, &dims.slice(slot * kv_heads * n, kv_heads * n))?;
    let sorted = all.chunks_exact(n).map(|of| {
        let mut of = of.to_vec();
        of.sort_unstable();
        of
    });
    Ok(sorted.collect())
}
