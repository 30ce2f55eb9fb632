//! Where the token lists of a plan's layers are kept, and who reads them.
//!
//! Layers whose lists nobody reuses share buffers: what one has chosen is attended to before the next one chooses.
//! An anchor's lists have buffers of their own, so that they are there until the last layer that reuses them.

use super::held::Held;
use crate::backend::{Backend, DType, GatherRows, Result, Seqs, Tensor};
use crate::select::{
    LayerContext, LayerPlan, LayerShape, Plan, Refine, Role, SelectError, Selection,
};
use std::sync::Arc;

/// Lists of one layer.
#[derive(Debug)]
pub(super) struct LayerLists {
    /// The lists that the layer attends with: its own, or its anchor's.
    pub attend: Arc<Selection>,
    /// The list of each KV head, u32 `[kv_heads]`, where lists are not in head order.
    pub head_map: Option<Tensor>,
    /// Longer lists that the layer makes for those that refine them.
    pub candidates: Option<Arc<Selection>>,
    /// What the layer refines.
    pub handed: Option<Handed>,
    /// What a sequence holds of `attend` and of `candidates` from step to step, where steps share a choice.
    held: (Option<Held>, Option<Held>),
}

impl LayerLists {
    /// Where the layer's own choice goes.
    pub fn chosen(&self) -> &Selection {
        self.held.0.as_ref().map_or(&self.attend, |h| &h.chosen)
    }

    /// Where what it hands down goes.
    pub fn handed_down(&self) -> Option<&Selection> {
        let own = self.candidates.as_deref();
        self.held.1.as_ref().map_or(own, |h| Some(&h.chosen))
    }

    /// Records what brings the lists of all sequences of `cx` up to date, the first `fresh` of which have just chosen.
    pub fn hold(&self, cx: &LayerContext<'_>, fresh: usize) -> Result<()> {
        let held = [(&self.held.0, Some(&self.attend)), (&self.held.1, self.candidates.as_ref())];
        for (held, out) in held {
            if let (Some(held), Some(out)) = (held, out) {
                held.hold(cx, fresh, out)?;
            }
        }
        Ok(())
    }

    /// Copies what slot `from` holds to slot `to`.
    pub fn fork(&self, b: &dyn Backend, from: usize, to: usize) -> Result<()> {
        let held = [&self.held.0, &self.held.1];
        held.into_iter().flatten().try_for_each(|h| h.fork(b, from, to))
    }
}

/// An anchor's candidates as a layer reads them.
#[derive(Debug)]
pub(super) struct Handed {
    /// The scorer.
    pub refine: Refine,
    from: Arc<Selection>,
    /// The same lists in the order of this layer's heads, and the rows of `from` to take: u32 `[slots, lists]`.
    mapped: Option<(Arc<Selection>, Tensor)>,
}

/// Room for `lists` lists of `k` tokens for each slot.
fn selection(
    b: &dyn Backend,
    shape: &LayerShape,
    k: usize,
    lists: usize,
) -> Result<Arc<Selection>> {
    let n = shape.slots * lists;
    Ok(Arc::new(Selection {
        indices: b.alloc(DType::U32, n * k, "token lists")?,
        counts: b.alloc(DType::U32, n, "token counts")?,
        k,
        rows_per_seq: lists,
    }))
}

fn words(b: &dyn Backend, words: &[u32]) -> Result<Tensor> {
    let t = b.alloc(DType::U32, words.len(), "head map")?;
    b.upload(&t, bytemuck::cast_slice(words))?;
    Ok(t)
}

/// Buffers that are made once for each size.
#[derive(Default)]
struct Shared(Vec<Arc<Selection>>);

impl Shared {
    fn get(
        &mut self,
        b: &dyn Backend,
        shape: &LayerShape,
        k: usize,
        lists: usize,
    ) -> Result<Arc<Selection>> {
        if let Some(s) = self.0.iter().find(|s| (s.k, s.rows_per_seq) == (k, lists)) {
            return Ok(s.clone());
        }
        let new = selection(b, shape, k, lists)?;
        self.0.push(new.clone());
        Ok(new)
    }
}

/// One entry for each layer of a checked plan; `None` for dense ones. `most`: tokens that a score row holds.
///
/// # Errors
/// [`SelectError::BadPlan`] for a plan that [`Plan::check`] refuses, [`SelectError::Backend`] when the device is full.
pub(super) fn layer_lists(
    b: &dyn Backend,
    plan: &Plan,
    shape: &LayerShape,
    most: usize,
) -> std::result::Result<Vec<Option<LayerLists>>, SelectError> {
    let (mut own, mut mapped) = (Shared::default(), Shared::default());
    let mut chosen = Shared::default();
    let mut all: Vec<Option<LayerLists>> = Vec::with_capacity(plan.layers.len());
    for (l, p) in plan.layers.iter().enumerate() {
        let users = || plan.layers.iter().filter(|u| reused(u) == Some(l));
        let lists = p.lists(shape.heads, shape.kv_heads);
        let mut made = |k| own.get(b, shape, k, lists);
        // No list is longer than a sequence, whatever the budget.
        let budget = p.budget.tokens.min(most);
        all.push(match &p.role {
            Role::Dense => None,
            Role::Select | Role::DenseAnchor => {
                // Held lists grow by a token a step.
                let room = |k: usize| k.saturating_add(p.reuse.saturating_sub(1)).min(most);
                let attend = match users().next() {
                    Some(_) => selection(b, shape, room(budget), lists)?,
                    None => made(room(budget))?,
                };
                let wanted = users().filter_map(candidates).max().map(|k| k.min(most));
                let longer = wanted.map(|k| selection(b, shape, room(k), lists)).transpose()?;
                let head_map = map_of(b, shape, lists, None)?;
                let mut held = |k: Option<usize>| -> Result<Option<Held>> {
                    let Some(k) = k.filter(|_| p.reuse > 1) else { return Ok(None) };
                    Held::new(b, shape, chosen.get(b, shape, k, lists)?).map(Some)
                };
                let held = (held(Some(budget))?, held(wanted)?);
                Some(LayerLists { attend, head_map, candidates: longer, handed: None, held })
            }
            Role::Reuse { from, head_map, refine } => {
                let anchor = all.get(*from).and_then(Option::as_ref);
                let anchor = anchor.ok_or_else(|| SelectError::BadPlan {
                    method: plan.method.clone(),
                    reason: format!("layer {l} reuses layer {from}, which makes no token lists"),
                })?;
                Some(match (refine, &anchor.candidates) {
                    (Some(refine), Some(from)) => {
                        let rows = rows_of(shape, lists, from.rows_per_seq, head_map);
                        let in_order = rows.iter().enumerate().all(|(i, &r)| i == r as usize);
                        let mapped = if in_order && from.rows_per_seq == lists {
                            None
                        } else {
                            let to = mapped.get(b, shape, from.k, lists)?;
                            Some((to, words(b, &rows)?))
                        };
                        let handed = Handed { refine: refine.clone(), from: from.clone(), mapped };
                        let head_map = map_of(b, shape, lists, None)?;
                        let attend = made(budget)?;
                        let handed = Some(handed);
                        LayerLists {
                            attend,
                            head_map,
                            candidates: None,
                            handed,
                            held: (None, None),
                        }
                    }
                    _ => {
                        let attend = anchor.attend.clone();
                        let head_map = map_of(b, shape, attend.rows_per_seq, Some(head_map))?;
                        let held = (None, None);
                        LayerLists { attend, head_map, candidates: None, handed: None, held }
                    }
                })
            }
        });
    }
    Ok(all)
}

/// The layer whose lists a layer takes.
fn reused(p: &LayerPlan) -> Option<usize> {
    match p.role {
        Role::Reuse { from, .. } => Some(from),
        _ => None,
    }
}

fn candidates(p: &LayerPlan) -> Option<usize> {
    match &p.role {
        Role::Reuse { refine: Some(r), .. } => Some(r.candidates),
        _ => None,
    }
}

/// The map that attention over `lists` lists a sequence needs; none where they are in head order.
fn map_of(
    b: &dyn Backend,
    shape: &LayerShape,
    lists: usize,
    map: Option<&[u8]>,
) -> Result<Option<Tensor>> {
    let map: Vec<u32> = match map {
        Some(map) => map.iter().map(|&e| u32::from(e)).collect(),
        // One list for all heads.
        None if lists == 1 => vec![0; shape.kv_heads],
        None => return Ok(None),
    };
    let in_order = lists == shape.kv_heads && map.iter().enumerate().all(|(h, &e)| h == e as usize);
    if in_order { Ok(None) } else { Ok(Some(words(b, &map)?)) }
}

/// For each list of each slot of a layer that makes `lists` of them: the row of the anchor's, which makes `theirs`.
fn rows_of(shape: &LayerShape, lists: usize, theirs: usize, head_map: &[u8]) -> Vec<u32> {
    let list = |i: usize| usize::from(head_map[i * shape.kv_heads / lists]);
    (0..shape.slots * lists).map(|r| (r / lists * theirs + list(r % lists)) as u32).collect()
}

impl Handed {
    /// Records what brings the anchor's candidates into the order of the layer's own lists; where they are then.
    pub fn arrange(&self, b: &dyn Backend, seqs: Seqs<'_>) -> Result<&Selection> {
        let Some((to, rows)) = &self.mapped else { return Ok(&self.from) };
        let n = seqs.n * to.rows_per_seq;
        let x_rows = seqs.n * self.from.rows_per_seq;
        let gather = |x: &Tensor, out: &Tensor, cols| {
            b.gather_rows(&GatherRows { x, rows, out, n, x_rows, cols })
        };
        gather(&self.from.indices, &to.indices, to.k)?;
        gather(&self.from.counts, &to.counts, 1)?;
        Ok(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> LayerShape {
        LayerShape {
            layer: 0,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            plain_dim: 16,
            kv_dtype: DType::F32,
            slots: 2,
            at_once: 2,
            rows: 2,
            capacity: 64,
        }
    }

    #[test]
    fn candidates_are_taken_by_head() {
        // Two lists from two, crossed; one per query head; one from one.
        assert_eq!(rows_of(&shape(), 2, 2, &[1, 0]), [1, 0, 3, 2]);
        assert_eq!(rows_of(&shape(), 4, 2, &[1, 0]), [1, 1, 0, 0, 3, 3, 2, 2]);
        assert_eq!(rows_of(&shape(), 1, 1, &[0, 0]), [0, 1]);
        assert_eq!(rows_of(&shape(), 2, 4, &[3, 3]), [3, 3, 7, 7]);
    }
}
