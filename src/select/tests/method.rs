//! Names, options and the plans that come of them.

use super::*;
use crate::backend::{DimMetric, Refresh};
use crate::select::{KvReads, ModelShape, OPTIONS, Plan, Role, Scorer};

/// 4 query heads over 2 of 64 dimensions.
fn model(windows: &[Option<usize>]) -> ModelShape<'_> {
    let importance = Some(crate::select::TrainedBlocks::default());
    ModelShape { model: "m", windows, heads: 4, kv_heads: 2, head_dim: 64, importance }
}

fn plan(name: &str) -> Plan {
    let spec: MethodSpec = name.parse().unwrap();
    spec.plan(&model(&[None; 6]), 8192).unwrap()
}

#[test]
fn every_method_makes_a_valid_plan_that_survives_json() {
    for m in METHODS {
        let p = plan(m.name);
        let json = serde_json::to_string(&p).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), p, "{}", m.name);
    }
}

#[test]
fn a_method_knows_whether_its_plan_wants_a_forecast() {
    let names = METHODS.iter().map(|m| m.name).chain(["nosa:query=forecast", "nosa:query=own"]);
    for name in names {
        let spec: MethodSpec = name.parse().unwrap();
        assert_eq!(spec.wants_forecast(), plan(name).wants_forecast(), "{name}");
    }
    // An option that the method does not read.
    let unread = MethodSpec { query: Some(Query::Forecast), ..Variant::Infllm2.into() };
    assert!(!unread.wants_forecast());
}

#[test]
fn dense_layers_and_sliding_windows_stay_dense() {
    let spec: MethodSpec = "sparcas".parse().unwrap();
    let p = spec.plan(&model(&[None, None, Some(128), None]), 8192).unwrap();
    let roles: Vec<_> = p.layers.iter().map(|l| l.role.clone()).collect();
    assert_eq!(roles, [Role::Dense, Role::Dense, Role::Dense, Role::Select]);
}

#[test]
fn options_in_the_name_are_read_and_checked() {
    let spec: MethodSpec = "sparcas-paper:dims=16:metric=pair-qk:update=8".parse().unwrap();
    assert_eq!((spec.dims, spec.update, spec.metric), (Some(16), Some(8), Some(DimMetric::PairQk)));
    for bad in ["sparcas:dims", "sparcas:dims=x", "sparcas:size=3", "sparc"] {
        assert!(bad.parse::<MethodSpec>().is_err(), "{bad}");
    }
    for (unread, key) in [
        ("dense:budget=5", "budget"),
        ("sparcas:update=8:metric=abs-qk", "update"),
        ("oracle:dims=16", "dims"),
        ("window:pool=max-softmax", "pool"),
    ] {
        let e = unread.parse::<MethodSpec>().unwrap_err().to_string();
        assert!(e.contains(&format!("{key:?} is no option of this method")), "{e}");
    }
}

/// An option that a method lists changes its plan, and one that it does not list changes nothing.
#[test]
fn methods_read_the_options_they_list() {
    let values = [
        ("budget", "640"),
        ("dims", "48"),
        ("update", "7"),
        ("beta", "0.5"),
        ("metric", "abs-qk"),
        ("unit", "16"),
        ("pool", "max-logit"),
        ("sinks", "7"),
        ("recent", "9"),
        ("dense-layers", "3"),
        ("dense-below", "99"),
        ("percent", "12.5"),
        ("budget-min", "200"),
        ("anchors", "3"),
        ("candidates", "7000"),
        ("tile", "1"),
        ("prompt-dense", "3"),
        ("mass", "0.5"),
        ("floor", "0.5"),
        ("correct", "true"),
        ("scorer", "sorted"),
        ("slice-bits", "4"),
        ("reuse", "3"),
        ("by-query", "3200"),
        ("query", "forecast"),
    ];
    let known: Vec<_> = values.iter().map(|v| v.0).collect();
    for o in OPTIONS {
        assert!(known.contains(&o.name), "give {} a value", o.name);
    }
    for m in METHODS {
        for (key, value) in values {
            let value = match (key, m.variant) {
                ("unit", Variant::Quest | Variant::Arkvale) => "32",
                ("correct", Variant::Sparq) => "false",
                _ => value,
            };
            let mut spec: MethodSpec = m.variant.into();
            // Only a prompt that is read sparsely has dense layers to choose.
            if key == "prompt-dense" && m.variant.takes("tile") {
                spec.tile = Some(1);
            }
            // Anchors behind the first one, too.
            let layers = [None; 14];
            let base = spec.plan(&model(&layers), 8192).unwrap();
            spec.set(key, value).unwrap_or_else(|e| panic!("{key}={value}: {e}"));
            let changed = spec.plan(&model(&layers), 8192).unwrap() != base;
            assert_eq!(changed, m.variant.takes(key), "{} {key}", m.name);
        }
    }
}

#[test]
fn a_budget_smaller_than_the_kept_tokens_is_refused() {
    let spec = MethodSpec { budget: Some(16), ..Variant::Sparcas.into() };
    let e = spec.plan(&model(&[None; 4]), 8192).unwrap_err().to_string();
    assert!(e.contains("budget of 16"), "{e}");
}

#[test]
fn layers_take_turns_at_rebuilding() {
    let phases: Vec<_> = plan("sparcas-paper")
        .layers
        .iter()
        .filter_map(|l| match l.scorer {
            Scorer::Dims { refresh: Refresh::Every { phase, .. }, .. } => Some(phase),
            _ => None,
        })
        .collect();
    assert_eq!(phases, [21, 32, 42, 53]);
}

#[test]
fn bytes_follow_the_formula_of_the_spec() {
    // Llama-3.1-8B at 32K, D_b = 32, U = 64, T_b = 1024: 937 MB a step.
    let spec = MethodSpec { budget: Some(1024), dims: Some(32), ..Variant::SparcasPaper.into() };
    let p = spec.plan(&ModelShape { head_dim: 128, ..model(&[None; 32]) }, 32768).unwrap();
    let windows = [None; 32];
    let shape = KvReads { windows: &windows, heads: 32, kv_heads: 8, head_dim: 128, elem: 2 };
    let mb = p.bytes_read(32768, &shape) as f64 / 1e6;
    assert!((mb - 937.0).abs() < 15.0, "{mb}");
    // 32 dimensions fresh, chosen offline or projected; SparQ's mean value is 0.1 MB more.
    for variant in [Variant::Sparq, Variant::DoubleSparsity, Variant::Loki] {
        let spec = MethodSpec { budget: Some(1024), dims: Some(32), ..variant.into() };
        let p = spec.plan(&ModelShape { head_dim: 128, ..model(&[None; 32]) }, 32768).unwrap();
        let mb = p.bytes_read(32768, &shape) as f64 / 1e6;
        assert!((mb - 898.0).abs() < 2.0, "{variant:?}: {mb}");
    }
    // 4 bits: a quarter of the 16-bit slice, and a scale a token.
    let bits = |bits| {
        let spec: MethodSpec = format!("double-sparsity:slice-bits={bits}").parse().unwrap();
        let spec = MethodSpec { budget: Some(1024), dims: Some(32), ..spec };
        let p = spec.plan(&ModelShape { head_dim: 128, ..model(&[None; 32]) }, 32768).unwrap();
        p.layers[31].bytes_read(32768, &shape, None)
    };
    let attended = 2 * 1024 * 256 * 8;
    let scored: Vec<u64> = [4, 8, 16].map(|b| (bits(b) - attended) / 8 / 32768).into();
    assert_eq!(scored, [20, 36, 64]);
    assert!(
        "double-sparsity:slice-bits=5"
            .parse::<MethodSpec>()
            .unwrap()
            .plan(&model(&[None; 6]), 8192)
            .is_err()
    );
    let dense = Plan::dense(32).bytes_read(32768, &shape) as f64 / 1e6;
    assert!((dense - 4295.0).abs() < 1.0, "{dense}");
}
