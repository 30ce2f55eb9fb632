//! Every method is measured and right, a wrong result is seen, wrong options are refused.

use super::rig::Rig;
use super::subject::Case;
use super::{AttentionBench, PromptBench, Subject};
use crate::backend::cpu::CpuBackend;
use crate::backend::reference::{encode, floats};
use crate::backend::{Backend, DType, Tensor};
use crate::select::{METHODS, MethodSpec, Variant};

fn subject(methods: Vec<MethodSpec>) -> Subject {
    Subject {
        batches: vec![2],
        layers: 3,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        dtype: DType::F32,
        methods: methods.into_iter().map(|m| (m.name().to_owned(), m)).collect(),
        plans: Vec::new(),
        seed: 1,
    }
}

fn bench(methods: Vec<MethodSpec>) -> AttentionBench {
    AttentionBench { of: subject(methods), depth: 300, steps: 3 }
}

fn prompts(methods: &[&str]) -> PromptBench {
    let methods = methods.iter().map(|m| m.parse().unwrap()).collect();
    PromptBench { of: subject(methods), prompts: vec![300], chunk: Some(128), repeats: 2 }
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
    let report = bench(methods.clone()).run(&CpuBackend::new(), &mut |_, _, _| true).unwrap();
    let wrong: Vec<_> = report.failures().map(|r| (&r.method, r.check.value)).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let missing: Vec<&str> = methods
        .iter()
        .map(MethodSpec::name)
        .filter(|name| report.rows.iter().all(|r| r.method != *name))
        .collect();
    // NOSA needs a content importance, SparQ mixes in the mean value.
    assert_eq!(missing, ["sparq", "nosa"], "{:?}", report.notes);
    assert!(report.rows.iter().all(|r| r.x_dense.is_some() && r.bytes > 0));
    assert_eq!(report.rows[0].x_dense, Some(1.0));
}

/// Whatever can read prompts sparsely, by rows and, where it can, by tiles.
#[test]
fn every_method_with_a_tile_reads_prompts() {
    let spec = |variant: Variant, tile| MethodSpec {
        budget: Some(96),
        dense_below: Some(0),
        dense_layers: variant.takes("dense-layers").then_some(0),
        tile: Some(tile),
        ..variant.into()
    };
    let tiled = METHODS.iter().map(|m| m.variant).filter(|v| v.takes("tile"));
    let mut methods: Vec<_> = tiled.map(|v| spec(v, 1)).collect();
    methods.extend([spec(Variant::Kascade, 32), spec(Variant::KascadePooled, 16)]);
    let n = methods.len();
    let report = PromptBench { of: subject(methods), ..prompts(&[]) };
    let report = report.run(&CpuBackend::new(), &mut |_, _, _| true).unwrap();
    let wrong: Vec<_> = report.failures().map(|r| (&r.method, &r.check)).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    // NOSA needs a content importance.
    assert!(matches!(&report.notes[..], [n] if n.starts_with("nosa")), "{:?}", report.notes);
    assert_eq!(report.rows.len(), n);
    for r in &report.rows {
        // The last chunk, of 44 tokens; four rows of two heads of 32 dimensions.
        assert_eq!((&r.checked_tokens[..], r.check.elements), (&[256, 270, 284, 299][..], 256));
        assert_eq!((r.check.sequence, r.check.kv_head, r.ms.samples.len()), (1, 1, 2));
    }
}

/// The check sees the last layer's result in every one of the rows, and what it was to attend to.
#[test]
fn a_wrong_result_of_a_prompt_fails_the_check() {
    let b = CpuBackend::new();
    let cases = ["dense", "kascade:tile=32:budget=64", "sparda:tile=1:budget=192:dense-below=0"];
    for name in cases {
        let o = prompts(&[name]);
        let plans = o.of.sparse_plans(300, 300, &mut Vec::new()).unwrap();
        let plan = plans.last().unwrap().1.clone();
        let what = String::new();
        let case = Case { what, tokens: 300, batch: 2, rows: 256, filled: false, plans };
        let mut rig = Rig::new(&b, &o.of, &case, &mut || true).unwrap();
        let found = rig.prompt(&plan, 1, &mut || true).unwrap();
        let (good, tokens) = rig.sampled(&found.attention).unwrap();
        assert!(good.passed, "{name}: {good:?}");
        let right = floats(&b, &rig.ws.attn).unwrap();
        let row = 4 * 32;
        for token in tokens {
            // Of sequence 1: its 44 rows lie behind those of sequence 0; the heads of KV head 1 begin at 2.
            let at = (44 + token - 256) * row + 2 * 32;
            let mut wrong = right.clone();
            wrong[at..at + 64].iter_mut().for_each(|v| *v *= 1.05);
            put(&b, &rig.ws.attn, &wrong);
            let (check, _) = rig.sampled(&found.attention).unwrap();
            assert!(!check.passed, "{name}: token {token} {check:?}");
            wrong[at] = f64::NAN;
            put(&b, &rig.ws.attn, &wrong);
            assert!(!rig.sampled(&found.attention).unwrap().0.passed, "{name}: NaN at {token}");
        }
        put(&b, &rig.ws.attn, &right);
        // Other values than those that were attended to.
        let values = rig.kv(2).1.clone();
        let changed: Vec<f64> = floats(&b, &values).unwrap().iter().map(|v| v + 0.1).collect();
        put(&b, &values, &changed);
        assert!(!rig.sampled(&found.attention).unwrap().0.passed, "{name}: other values");
    }
}

fn put(b: &dyn Backend, t: &Tensor, values: &[f64]) {
    b.upload(t, &encode(t.dtype(), values)).unwrap();
}

/// What the check takes for the lists of a row are those of its own tile.
#[test]
fn the_lists_of_another_tile_fail_the_check() {
    let b = CpuBackend::new();
    let o = prompts(&["kascade:tile=32:budget=64:anchors=1"]);
    let plans = o.of.sparse_plans(300, 300, &mut Vec::new()).unwrap();
    let plan = plans[1].1.clone();
    let what = String::new();
    let case = Case { what, tokens: 300, batch: 2, rows: 256, filled: false, plans };
    let mut rig = Rig::new(&b, &o.of, &case, &mut || true).unwrap();
    let found = rig.prompt(&plan, 1, &mut || true).unwrap();
    let seqs: Vec<_> = rig
        .tables
        .iter()
        .enumerate()
        .map(|(slot, t)| crate::model::StepSeq {
            tokens: &[0; 44],
            cached: 256,
            pages: t.pages(),
            slot,
            decode: None,
        })
        .collect();
    // Two tiles of each sequence: 256..288 and 288..300.
    let tile = |i, token| found.attention.attended_tile(2, &seqs, (i, token)).unwrap().0;
    assert_eq!([(0, 256), (0, 288), (1, 287), (1, 299)].map(|(i, t)| tile(i, t)), [0, 1, 2, 3]);
    assert!(found.attention.attended_tile(2, &seqs, (1, 300)).is_none());
    let (_, lists, _) = found.attention.attended_tile(2, &seqs, (1, 299)).unwrap();
    let words = floats(&b, &lists.indices).unwrap();
    let per_tile = lists.k * lists.rows_per_seq;
    let mut swapped = words.clone();
    swapped[2 * per_tile..3 * per_tile].copy_from_slice(&words[..per_tile]);
    put(&b, &lists.indices, &swapped);
    assert!(!rig.sampled(&found.attention).unwrap().0.passed);
}

#[test]
fn roles_are_told_apart() {
    let bench = prompts(&[
        "kascade:tile=32:budget=64:anchors=0+1",
        "kascade:tile=32:budget=64:anchors=1",
        "kascade:tile=32:budget=64:anchors=0+1:prompt-dense=1",
        "sparda:tile=1:budget=192:dense-below=0",
        "infllm2:tile=1:budget=192:dense-below=0:dense-layers=1",
        "quest:budget=96:dense-below=0",
    ]);
    let report = bench.run(&CpuBackend::new(), &mut |_, _, _| true).unwrap();
    let roles: Vec<Vec<(&str, usize)>> = report
        .rows
        .iter()
        .map(|r| r.roles.iter().map(|x| (x.role, x.layers.len())).collect())
        .collect();
    let want: [&[(&str, usize)]; 6] = [
        &[("dense", 3)],
        // Nobody reuses the dense anchor's choice.
        &[("dense", 1), ("anchor", 1), ("reuse", 1)],
        &[("dense anchor", 1), ("reuse", 2)],
        &[("dense", 1), ("anchor", 1), ("reuse", 1)],
        &[("select", 3)],
        &[("dense", 1), ("select", 2)],
    ];
    assert_eq!(roles, want);
    assert!(matches!(&report.notes[..], [n] if n.starts_with("quest") && n.contains("--tile")));
    for r in &report.rows {
        assert_eq!(r.layer_ms.len(), 3);
        assert_eq!(r.tflop_s.is_some(), r.method == "dense");
        for role in &r.roles {
            let (ms, what) = (role.ms, format!("{} {}: {:?}", r.method, role.role, role.ms));
            assert!(ms.append > 0.0 && ms.total() >= ms.attention(), "{what}");
            let chooses = !matches!(role.role, "dense" | "reuse");
            assert_eq!(ms.select > 0.0, chooses, "{what}");
            let lists = !matches!(role.role, "dense" | "dense anchor");
            assert_eq!(ms.listed > 0.0, lists, "{what}");
            assert_eq!(ms.forecast > 0.0, r.method == "sparda", "{what}");
        }
    }
}

#[test]
fn options_that_cannot_be_measured_are_refused() {
    let refused = |b: AttentionBench| b.validate().unwrap_err().to_string();
    let base = || bench(Vec::new());
    let of = || subject(Vec::new());
    assert!(refused(AttentionBench { steps: usize::MAX, ..base() }).contains("--steps"));
    assert!(refused(AttentionBench { steps: 300, ..base() }).contains("--steps"));
    let wrong = |of: Subject| refused(AttentionBench { of, ..base() });
    assert!(wrong(Subject { heads: 3, ..of() }).contains("--kv-heads"));
    assert!(wrong(Subject { batches: vec![], ..of() }).contains("--batch"));
    assert!(wrong(Subject { head_dim: 12, ..of() }).contains("--head-dim"));
    let refused = |b: PromptBench| b.validate().unwrap_err().to_string();
    let base = || prompts(&[]);
    assert!(refused(PromptBench { prompts: vec![], ..base() }).contains("--prompt"));
    assert!(refused(PromptBench { prompts: vec![8, 0], ..base() }).contains("a prompt of 0"));
    assert!(refused(PromptBench { prompts: vec![usize::MAX], ..base() }).contains("--prompt"));
    assert!(refused(PromptBench { chunk: Some(0), ..base() }).contains("--chunk"));
    assert!(refused(PromptBench { repeats: 0, ..base() }).contains("--repeats"));
    let of = Subject { heads: 3, ..of() };
    assert!(refused(PromptBench { of, ..base() }).contains("--kv-heads"));
}

/// Measurements of many steps end at the next one.
#[test]
fn a_measurement_ends_between_its_steps() {
    let mut asked = 0;
    let report = bench(vec![]).run(&CpuBackend::new(), &mut |what, _, _| {
        asked += usize::from(what.starts_with("dense"));
        asked < 3
    });
    let report = report.unwrap();
    assert!(report.rows.is_empty() && asked == 3, "{asked}");
    assert!(report.notes[0].contains("dense") && report.notes[0].contains("interrupted"));
}
