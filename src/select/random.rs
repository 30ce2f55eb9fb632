//! Random tokens: the floor that every scorer must beat at the same budget.
//!
//! A token's score is a hash of seed, layer, KV head and position, so that a token stays chosen until enough better
//! ones follow it, and no step depends on another.

use super::pick::pool_and_pick;
use super::{LayerContext, LayerPlan, LayerShape, Scorer, SelectError, Selection, Selector};
use crate::backend::{Backend, DType, PAGE, Tensor};

/// The score of a token: 24 bits of a hash, in 0..1 (the finaliser of splitmix64).
pub fn noise(seed: u32, layer: usize, kv_head: usize, position: usize) -> f32 {
    let mut x = u64::from(seed) << 48 ^ (layer as u64) << 40 ^ (kv_head as u64) << 32;
    x = (x ^ position as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    (x >> 40) as f32 / (1u64 << 24) as f32
}

/// Scores that are there before the first query.
#[derive(Debug)]
pub struct RandomSelector {
    plan: LayerPlan,
    /// f32 `[kv_heads, stride]`.
    scores: Tensor,
}

impl RandomSelector {
    /// For a plan with [`Scorer::Random`].
    ///
    /// # Errors
    /// [`SelectError::BadPlan`] for any other scorer, [`SelectError::Backend`] when the device is full.
    pub fn new(b: &dyn Backend, shape: &LayerShape, plan: &LayerPlan) -> Result<Self, SelectError> {
        let Scorer::Random { seed } = plan.scorer else {
            return Err(SelectError::BadPlan {
                method: "random".into(),
                reason: "the plan has no random scores".into(),
            });
        };
        let stride = shape.capacity.next_multiple_of(PAGE);
        let of_head = |h: usize| (0..stride).map(move |j| noise(seed, shape.layer, h, j));
        let values: Vec<f32> = (0..shape.kv_heads).flat_map(of_head).collect();
        let scores = b.alloc(DType::F32, values.len(), "random scores")?;
        b.upload(&scores, bytemuck::cast_slice(&values))?;
        Ok(RandomSelector { plan: plan.clone(), scores })
    }
}

impl Selector for RandomSelector {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        _q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        // All layers share the buffer, and forcing tokens writes to it.
        let n = cx.shape.kv_heads * cx.scratch.stride;
        for s in 0..cx.seqs.n {
            cx.backend.copy(&self.scores.slice(0, n), &cx.scratch.scores.slice(s * n, n))?;
        }
        pool_and_pick(cx, &self.plan, out)
    }
}

#[cfg(test)]
mod tests {
    use super::noise;

    #[test]
    fn scores_are_spread_evenly_and_differ_by_layer_head_and_position() {
        let n = 10_000;
        let row = |layer, head| -> Vec<f32> { (0..n).map(|j| noise(0, layer, head, j)).collect() };
        let a = row(3, 1);
        let mean = a.iter().sum::<f32>() / n as f32;
        assert!((mean - 0.5).abs() < 0.01 && a.iter().all(|x| (0.0..1.0).contains(x)), "{mean}");
        for other in [row(4, 1), row(3, 2)] {
            let both = a.iter().zip(&other).filter(|(x, y)| **x > 0.9 && **y > 0.9).count();
            assert!((60..140).contains(&both), "{both} of {n} in both tenths");
        }
    }
}
