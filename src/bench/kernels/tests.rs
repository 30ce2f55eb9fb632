use super::check::Pair;
use super::inputs::Rig;
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, BackendError, Tensor};

fn tiny() -> KernelBench {
    KernelBench {
        depth: 200,
        batches: vec![1, 3],
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        dims: 8,
        lead: 8,
        repeats: 3,
        ..KernelBench::default()
    }
}

#[test]
fn every_op_is_measured_and_right() {
    let o = KernelBench { depth: 256, batches: vec![1], repeats: 2, ..tiny() };
    let mut heard = Vec::new();
    let report = o.run(&CpuBackend::new(), &mut |what, done, all| {
        heard.push(what.to_owned());
        assert!(done <= all);
        true
    });
    let report = report.unwrap();
    assert_eq!(report.rows.len() + report.skipped.len(), 8);
    assert!(report.skipped.is_empty(), "{:?}", report.skipped);
    for r in &report.rows {
        assert!(r.check.passed, "{} {}: {:?}", r.op, r.variant, r.check);
        assert!(r.ms.median > 0.0 && r.gb_s > 0.0 && r.bytes > 0 && r.ms.samples.len() == 2);
    }
    assert_eq!(report.failures().count(), 0);
    assert!(heard.iter().any(|h| h == "top_k batch 1"));
}

#[test]
fn what_was_measured_before_an_interruption_stays() {
    let o = KernelBench { depth: 256, batches: vec![1, 2], repeats: 2, ..tiny() };
    let report = o.run(&CpuBackend::new(), &mut |_, done, _| done < 3).unwrap();
    assert_eq!((report.rows.len(), report.skipped.len()), (3, 13));
    assert!(report.skipped.iter().all(|s| s.why == "interrupted"));
}

/// The check looks at the last sequence and KV head, with a page that is not full.
#[test]
fn a_wrong_result_fails_the_check() {
    let (o, b) = (tiny(), CpuBackend::new());
    let mut rig = Rig::new(&b, &o, 3).unwrap();
    let kv = [rig.kv_set().unwrap(), rig.kv_set().unwrap()];
    for op in o.ops() {
        let case = rig.case(op, &kv).unwrap();
        let last = case.sets() - 1;
        case.launch(&rig, last).unwrap();
        let good = case.check(&rig, last).unwrap();
        assert!(good.passed, "{op:?}: {good:?}");
        assert_eq!((good.sequence, good.kv_head), (2, 1));
        spoil(&b, case.output()).unwrap();
        let wrong = case.check(&rig, last).unwrap();
        assert!(!wrong.passed, "{op:?} let a wrong result pass: {wrong:?}");
    }
}

/// Results of other inputs must not pass either: the check would be blind to launches that do nothing.
#[test]
fn a_stale_result_fails_the_check() {
    let (o, b) = (tiny(), CpuBackend::new());
    let mut rig = Rig::new(&b, &o, 1).unwrap();
    let kv = [rig.kv_set().unwrap(), rig.kv_set().unwrap()];
    for op in o.ops() {
        let case = rig.case(op, &kv).unwrap();
        assert!(case.sets() > 1, "{op:?}");
        case.launch(&rig, 0).unwrap();
        let stale = case.check(&rig, case.sets() - 1).unwrap();
        assert!(!stale.passed, "{op:?}: {stale:?}");
    }
}

/// Changes every element by a few percent (floats) or by one (indices).
fn spoil(b: &dyn Backend, t: &Tensor) -> std::result::Result<(), BackendError> {
    let mut values = crate::backend::reference::floats(b, t)?;
    let index = t.dtype() == DType::U32;
    values.iter_mut().for_each(|v| *v = if index { *v + 1.0 } else { *v * 1.05 });
    b.upload(t, &crate::backend::reference::encode(t.dtype(), &values))
}

#[test]
fn comparisons_know_nan_and_length() {
    let p = Pair { sequence: 0, kv_head: 0 };
    assert!(p.nmse(&[1.0, 2.0], &[1.0, 2.0], 0.0).passed);
    assert!(!p.nmse(&[f64::NAN, 2.0], &[1.0, 2.0], 1.0).passed);
    assert!(!p.nmse(&[1.0], &[1.0, 2.0], 1.0).passed);
    assert!(!p.nmse(&[], &[], 1.0).passed);
    let half = p.nmse(&[0.0, 1.0], &[1.0, 1.0], 1e-3);
    assert_eq!((half.value, half.passed), (0.5, false));
    assert_eq!(p.mismatches(&[1, 5, 3], &[1, 2, 3]).value, 1.0);
    assert_eq!(p.mismatches(&[1], &[1, 2, 3]).value, 2.0);
}

#[test]
fn json_holds_raw_samples_and_checks() {
    let o = KernelBench { batches: vec![1], repeats: 3, shares: vec![0.1], ..tiny() };
    let report = o.run(&CpuBackend::new(), &mut |_, _, _| true).unwrap();
    let json = serde_json::to_value(&report).unwrap();
    for key in ["version", "commit", "date", "device", "system"] {
        assert!(!json["environment"][key].is_null(), "{key}");
    }
    assert!(json["environment"]["device"]["driver"].is_string());
    assert!(json["bandwidth_gb_s"]["device_read"].as_f64().unwrap() > 0.0);
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for r in rows {
        assert_eq!(r["ms"]["samples"].as_array().unwrap().len(), 3);
        assert!(r["check"]["value"].is_number() && r["check"]["limit"].is_number());
        assert_eq!(r["check"]["passed"], true);
    }
}

#[test]
fn options_that_make_no_sense_are_sentences() {
    let refused = |o: KernelBench, word: &str| {
        let e = o.run(&CpuBackend::new(), &mut |_, _, _| true).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    refused(KernelBench { depth: 0, ..tiny() }, "--depth");
    refused(KernelBench { batches: vec![0], ..tiny() }, "--batch");
    refused(KernelBench { kv_heads: 0, ..tiny() }, "--kv-heads");
    refused(KernelBench { heads: 5, ..tiny() }, "--heads");
    refused(KernelBench { head_dim: 12, ..tiny() }, "--head-dim");
    refused(KernelBench { dims: 64, ..tiny() }, "--dims");
    refused(KernelBench { shares: vec![2.0], ..tiny() }, "--share");
    refused(KernelBench { dtype: DType::I8, ..tiny() }, "floats");
    refused(KernelBench { repeats: 0, ..tiny() }, "-r 1");
}
