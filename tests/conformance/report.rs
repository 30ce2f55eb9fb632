//! Results of a run, and as JSON.

use super::Case;
use super::rig::{Failure, Measured, Rig};
use longsight::backend::{Backend, Capabilities};
use serde_json::json;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// How a case ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    Pass,
    Unsupported(String),
    Fail(String),
}

impl End {
    /// In reports.
    pub fn name(&self) -> &'static str {
        match self {
            End::Pass => "pass",
            End::Unsupported(_) => "unsupported",
            End::Fail(_) => "fail",
        }
    }
}

/// One case on one backend.
#[derive(Clone, Debug)]
pub struct Row {
    pub backend: String,
    pub op: &'static str,
    pub name: String,
    pub dtype: &'static str,
    pub end: End,
    /// The output nearest to its tolerance.
    pub worst: Option<Measured>,
    pub seconds: f64,
}

/// Runs a case on a fresh rig; a panic is a failure.
pub fn run(dev: Arc<dyn Backend>, backend: &str, case: Case) -> Row {
    let start = Instant::now();
    let mut rig = Rig::new(dev, &format!("{}::{}", case.op, case.name));
    let end = match catch_unwind(AssertUnwindSafe(|| (case.body)(&mut rig))) {
        Ok(Ok(())) => End::Pass,
        Ok(Err(Failure::Unsupported(why))) => End::Unsupported(why),
        Ok(Err(Failure::Failed(why))) => End::Fail(why),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            End::Fail(format!("panic: {}", text.unwrap_or("without a message")))
        }
    };
    let share = |m: &Measured| if m.nmse == 0.0 { 0.0 } else { m.nmse / m.tolerance };
    let worst = rig.measured.into_iter().max_by(|a, b| share(a).total_cmp(&share(b)));
    Row {
        backend: backend.into(),
        op: case.op,
        name: case.name,
        dtype: case.dtype.name(),
        end,
        worst,
        seconds: start.elapsed().as_secs_f64(),
    }
}

/// What the run collects.
#[derive(Clone, Default)]
pub struct Report(Arc<Mutex<Vec<Row>>>);

impl Report {
    pub fn add(&self, row: Row) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(row);
    }

    /// What has run so far.
    pub fn rows(&self) -> Vec<Row> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The results with the devices that gave them.
    pub fn json(&self, devices: &[(String, Capabilities)], absent: &[String]) -> String {
        let results: Vec<_> = self
            .rows()
            .iter()
            .map(|r| {
                let why = match &r.end {
                    End::Pass => None,
                    End::Unsupported(why) | End::Fail(why) => Some(why),
                };
                json!({
                    "name": format!("{}::{}::{}", r.backend, r.op, r.name),
                    "backend": r.backend,
                    "op": r.op,
                    "dtype": r.dtype,
                    "ok": r.end == End::Pass,
                    "outcome": r.end.name(),
                    "reason": why,
                    "tensor": r.worst.as_ref().map(|m| &m.tensor),
                    "nmse": r.worst.as_ref().map(|m| m.nmse),
                    "tolerance": r.worst.as_ref().map(|m| m.tolerance),
                    "seconds": (r.seconds * 1e3).round() / 1e3,
                })
            })
            .collect();
        let devices: Vec<_> =
            devices.iter().map(|(name, caps)| json!({ "name": name, "caps": caps })).collect();
        let all = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": std::env::var("LONGSIGHT_COMMIT").ok(),
            "devices": devices,
            "absent": absent,
            "results": results,
        });
        format!("{all:#}\n")
    }
}
