//! Every op on every backend found, against the f64 reference.
//!
//! Names are `backend::op::case`. The binary needs no other file, so it can be taken to another machine. A run of all
//! cases on all backends fails where README.md's table of ops says something else.
//! Environment: `LONGSIGHT_BACKENDS=cpu,wgpu` restricts (and `oracle` adds the reference itself);
//! `LONGSIGHT_REQUIRE=wgpu` makes absence a failure; `LONGSIGHT_CONFORMANCE_JSON=path` writes the results;
//! `LONGSIGHT_SUPPORT_TABLE=write` writes the README's table instead of comparing it.

#[path = "conformance/mod.rs"]
mod conformance;

use conformance::oracle::{Fault, Oracle};
use conformance::report::{End, Report, Row, run};
use conformance::table;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use longsight::backend::{Backend, Capabilities, DType, open, open_all};
use std::process::ExitCode;
use std::sync::Arc;

type Found = (String, Arc<dyn Backend>);

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // One device, one queue: cases run one after the other unless asked otherwise.
    args.test_threads = args.test_threads.or(Some(1));
    // Only a whole run says something about the table.
    let whole = args.filter.is_none()
        && args.skip.is_empty()
        && !(args.list || args.ignored || args.bench)
        && list("LONGSIGHT_BACKENDS").is_none();
    let report = Report::default();
    let (found, absent) = discover();
    let mut trials = harness_trials();
    let required = list("LONGSIGHT_REQUIRE").unwrap_or_default();
    for name in required {
        let here = found.iter().any(|(n, _)| *n == name);
        let why = absent.iter().find(|a| a.starts_with(&name)).cloned();
        trials.push(Trial::test(format!("{name}::found"), move || match here {
            true => Ok(()),
            false => Err(why.unwrap_or_else(|| format!("{name} was not looked for")).into()),
        }));
    }
    for (name, dev) in &found {
        trials.extend(backend_trials(name, dev, &report));
    }
    let conclusion = libtest_mimic::run(&args, trials);
    let devices: Vec<(String, Capabilities)> =
        found.iter().map(|(n, d)| (n.clone(), d.caps().clone())).collect();
    let wrote =
        write("LONGSIGHT_CONFORMANCE_JSON", || report.json(&devices, &absent)).and_then(|()| {
            match whole && !conclusion.has_failed() {
                true => table::check(&report.rows(), write_table()),
                false if write_table() => Err("the support table needs a run of all cases".into()),
                false => Ok(()),
            }
        });
    match wrote {
        Ok(()) => conclusion.exit_code(),
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn write_table() -> bool {
    std::env::var("LONGSIGHT_SUPPORT_TABLE").is_ok_and(|v| v == "write")
}

fn list(variable: &str) -> Option<Vec<String>> {
    let value = std::env::var(variable).ok()?;
    Some(value.split(',').map(|s| s.trim().to_string()).filter(|s| !s.is_empty()).collect())
}

fn write(variable: &str, text: impl FnOnce() -> String) -> Result<(), String> {
    let Ok(path) = std::env::var(variable) else { return Ok(()) };
    std::fs::write(&path, text()).map_err(|e| format!("{variable}: cannot write {path}: {e}"))
}

/// The backends to test, and a line for each that is absent.
fn discover() -> (Vec<Found>, Vec<String>) {
    let all = match list("LONGSIGHT_BACKENDS") {
        None => open_all(),
        Some(names) => names.into_iter().map(|n| (n.clone(), open_named(&n))).collect(),
    };
    let (mut found, mut absent) = (Vec::new(), Vec::new());
    for (name, opened) in all {
        match opened {
            Ok(dev) => {
                eprintln!("{name}: {}, {}", dev.caps().device, dev.caps().driver);
                found.push((name, dev));
            }
            Err(e) => {
                eprintln!("{name}: absent ({e})");
                absent.push(format!("{name}: {e}"));
            }
        }
    }
    (found, absent)
}

fn open_named(name: &str) -> longsight::backend::Result<Arc<dyn Backend>> {
    let floats = vec![DType::F32, DType::F16, DType::BF16];
    match name {
        "oracle" => Ok(Arc::new(Oracle::new(Fault::None, floats, true))),
        _ => open(name),
    }
}

fn backend_trials(name: &str, dev: &Arc<dyn Backend>, report: &Report) -> Vec<Trial> {
    let one = |case: conformance::Case| {
        let (dev, report, backend) = (dev.clone(), report.clone(), name.to_string());
        Trial::ignorable_test(format!("{name}::{}::{}", case.op, case.name), move || {
            let row = run(dev, &backend, case);
            let end = row.end.clone();
            report.add(row);
            match end {
                End::Pass => Ok(Completion::Completed),
                End::Unsupported(why) => Ok(Completion::ignored_with(why)),
                End::Fail(why) => Err(why.into()),
            }
        })
    };
    conformance::cases(dev.caps()).into_iter().map(one).collect()
}

/// The harness itself: a right backend passes, each kind of wrong one is caught.
fn harness_trials() -> Vec<Trial> {
    let caught: &[(Fault, &str, &str)] = &[
        (Fault::PastTheEnd, "rms_norm", "wrote what it must leave alone"),
        (Fault::PastTheEnd, "kv_append", "wrote what it must leave alone"),
        (Fault::Beside, "attend_dense", "wrote what it must leave alone"),
        (Fault::Beside, "select_dims", "wrote what it must leave alone"),
        (Fault::Skip, "merge", "element"),
        (Fault::Skip, "top_k", "element"),
        (Fault::Inexact, "linear", "NMSE"),
        (Fault::Inexact, "gather_rows", "exactly"),
        (Fault::Inexact, "top_k", "exactly"),
        (Fault::OneElement, "swiglu", "swiglu"),
        (Fault::OneElement, "rope", "rope"),
        (Fault::Restless, "score_dims", "differ"),
        (Fault::Gullible, "top_k", "accepted"),
    ];
    let mut trials = Vec::new();
    for (fault, op, want) in caught.iter().copied() {
        let name = format!("harness::catches::{fault:?}_in_{op}").to_lowercase();
        trials.push(Trial::test(name, move || {
            let rows = oracle_rows(fault, op);
            // Some cases cannot see a fault (it leaves their inputs as they are); one that does names it.
            let caught = rows.iter().filter(|r| matches!(&r.end, End::Fail(w) if w.contains(want)));
            match caught.count() {
                0 => Err(Failed::from(format!("no case of {op} fails with {want:?}"))),
                _ => Ok(()),
            }
        }));
    }
    trials.push(Trial::test("harness::support_table", || Ok(table::self_test()?)));
    for op in ["rms_norm", "force", "merge", "select_dims"] {
        trials.push(Trial::test(format!("harness::passes::{op}"), move || {
            let failed = |r: &Row| r.end != End::Pass;
            match oracle_rows(Fault::None, op).into_iter().find(failed) {
                Some(row) => Err(format!("{}: {:?}", row.name, row.end).into()),
                None => Ok(()),
            }
        }));
    }
    trials
}

/// The f32 cases of an op (at most a dozen, and the error cases) on a faulty oracle.
fn oracle_rows(fault: Fault, op: &str) -> Vec<Row> {
    let dev: Arc<dyn Backend> = Arc::new(Oracle::new(fault, vec![DType::F32], false));
    let cases = conformance::cases(dev.caps()).into_iter().filter(|c| c.op == op);
    let (errors, plain): (Vec<_>, Vec<_>) = cases.partition(|c| c.name.starts_with("bad_"));
    let some = plain.into_iter().filter(|c| !c.name.contains("long")).take(12);
    some.chain(errors).map(|case| run(dev.clone(), "oracle", case)).collect()
}
