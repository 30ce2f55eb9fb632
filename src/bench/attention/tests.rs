//! Every method is measured and right, wrong options are refused.

use super::AttentionBench;
use crate::backend::DType;
use crate::backend::cpu::CpuBackend;
use crate::select::{METHODS, MethodSpec, Variant};

fn bench(methods: &[MethodSpec]) -> AttentionBench {
    AttentionBench {
        depth: 300,
        batches: vec![2],
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        dtype: DType::F32,
        methods: methods.iter().map(|m| (m.name().to_owned(), m.clone())).collect(),
        plans: Vec::new(),
        steps: 3,
        seed: 1,
    }
}

#[test]
fn every_method_is_measured_against_the_reference() {
    let spec = |variant: Variant| MethodSpec {
        budget: Some(96),
        dense_below: Some(0),
        dense_layers: Some(0),
        ..variant.into()
    };
    let methods: Vec<MethodSpec> = METHODS.iter().map(|m| spec(m.variant)).collect();
    let report = bench(&methods).run(&CpuBackend::new(), &mut |_, _, _| ()).unwrap();
    let wrong: Vec<_> = report.failures().map(|r| (&r.method, r.check.value)).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let missing: Vec<&str> = methods
        .iter()
        .map(MethodSpec::name)
        .filter(|name| report.rows.iter().all(|r| r.method != *name))
        .collect();
    // SparDA needs a Forecast, NOSA a content importance, SparQ mixes in the mean value.
    assert_eq!(missing, ["sparq", "sparda", "nosa"], "{:?}", report.notes);
    assert!(report.rows.iter().all(|r| r.x_dense.is_some() && r.bytes > 0));
}

#[test]
fn options_that_cannot_be_measured_are_refused() {
    let refused = |b: AttentionBench| b.validate().unwrap_err().to_string();
    let base = || bench(&[]);
    assert!(refused(AttentionBench { steps: usize::MAX, ..base() }).contains("--steps"));
    assert!(refused(AttentionBench { steps: 300, ..base() }).contains("--steps"));
    assert!(refused(AttentionBench { heads: 3, ..base() }).contains("--kv-heads"));
    assert!(refused(AttentionBench { batches: vec![], ..base() }).contains("--batch"));
    assert!(refused(AttentionBench { head_dim: 12, ..base() }).contains("--head-dim"));
}
