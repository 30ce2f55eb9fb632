//! SparDA (arXiv 2606.04511): InfLLM-V2's blocks, scored by the Forecast of the layer before.
//!
//! Layer `l` projects its attention input to one vector per KV head, which is rotated at the query's position and
//! multiplied with the compressed keys of layer `l + 1`: no scale, no softmax, no sum over heads. So the blocks of a
//! layer are known while the layer before it still runs. The first layer has a projection for itself.

use super::blocks::Query;
use super::{LayerPlan, MethodSpec, Scorer, infllm};
use crate::backend::HeadPool;

pub(super) fn layer(spec: &MethodSpec, tokens: usize) -> LayerPlan {
    let mut plan = infllm::layer(spec, tokens);
    if let Scorer::Blocks { query, .. } = &mut plan.scorer {
        *query = Query::Forecast;
    }
    // One score row per KV head: there is nothing to pool.
    plan.pool = HeadPool::SumLogit;
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::ModelShape;

    #[test]
    fn the_plan_is_that_of_infllm_but_for_the_query() {
        let plan = |name: &str| {
            let spec: MethodSpec = name.parse().unwrap();
            spec.plan(&ModelShape::of_layers(&[None; 2], 128), 65536).unwrap()
        };
        let (sparda, infllm) = (plan("sparda:budget=6144"), plan("infllm2:budget=6144"));
        assert!(sparda.wants_forecast() && !infllm.wants_forecast());
        assert_eq!(sparda.summaries(), infllm.summaries());
        assert_eq!(sparda.layers[1].keep, infllm.layers[1].keep);
        assert_eq!(sparda.layers[1].lists(32, 2), 2);
    }
}
