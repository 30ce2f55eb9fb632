//! `longsight devices`: what this machine can run on.

use super::args::Format;
use super::interrupt::Interrupt;
use super::ui;
use crate::backend::{Backend, BackendError, Capabilities, open_all};
use crate::names::option_name;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Args)]
pub struct DevicesArgs {
    /// Skip the bandwidth measurement (about a second per device)
    #[arg(long)]
    no_measure: bool,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

pub fn devices(a: DevicesArgs) -> Result<ExitCode> {
    // Never armed: Ctrl-C ends it with the exit code of every other command.
    Interrupt::install();
    let found = open_all();
    let mut rows = Vec::new();
    for (name, device) in &found {
        match device {
            Ok(b) => {
                let (text, row) = describe(b, !a.no_measure);
                if a.format == Format::Table {
                    ui::print(&text)?;
                }
                rows.push(row);
            }
            Err(e) if a.format == Format::Table => {
                ui::print(&format!("{name:<5} not usable: {}\n", reason(e)))?;
            }
            Err(e) => {
                rows.push(serde_json::json!({ "backend": name, "unavailable": reason(e) }));
            }
        }
    }
    let opened: Vec<&str> =
        found.iter().filter_map(|(_, b)| Some(b.as_ref().ok()?.caps().device.as_str())).collect();
    for c in others(&opened) {
        match a.format {
            Format::Table => {
                let (of, name, software) = (c.backend, &c.device, software(&c));
                ui::print(&format!("{of:<5} {name} (choose it with --device){software}\n"))?;
            }
            Format::Json => rows.push(serde_json::json!({ "capabilities": c })),
        }
    }
    if a.format == Format::Json {
        ui::print(&(serde_json::to_string_pretty(&rows)? + "\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Why a backend cannot be used, without its name.
fn reason(e: &BackendError) -> String {
    match e {
        BackendError::Unavailable { reason, .. } => reason.clone(),
        e => e.to_string(),
    }
}

/// Adapters and GPUs besides the ones that `wgpu` and `cuda` open.
fn others(opened: &[&str]) -> Vec<Capabilities> {
    let mut all = crate::backend::list();
    // The first GPU of CUDA is open whatever it is called.
    if let Some(first) = all.iter().position(|c| c.backend == "cuda") {
        all.remove(first);
    }
    all.retain(|c| c.backend == "cuda" || !opened.contains(&c.device.as_str()));
    all
}

/// What there is to say of a driver without a device.
fn software(c: &Capabilities) -> &'static str {
    if c.software { " (a software driver: -d cpu is faster)" } else { "" }
}

/// A device as lines of text and as JSON.
fn describe(b: &Arc<dyn Backend>, measure: bool) -> (String, serde_json::Value) {
    let c = b.caps();
    let bandwidth = measure.then(|| b.bandwidth());
    let memory = c.memory.map_or("memory size unknown".into(), ui::bytes);
    let free = b.free_memory().map_or(String::new(), |f| format!(" ({} free)", ui::bytes(f)));
    let subgroup = match c.subgroup {
        (0, 0) => "none".into(),
        (a, b) if a == b => a.to_string(),
        (a, b) => format!("{a} to {b}"),
    };
    let storage: Vec<_> = c.storage.iter().map(|d| d.name()).collect();
    let mut lines = vec![
        format!("{:<5} {}", c.backend, c.device),
        format!("      driver         {}{}", c.driver, software(c)),
        format!("      memory         {memory}{free}, {}", option_name(&c.topology)),
        format!("      storage        {}", storage.join(", ")),
        format!(
            "      f16 arithmetic {}, subgroups {subgroup}, matrix units {}",
            if c.f16 { "yes" } else { "no" },
            c.tensor_cores
        ),
    ];
    if c.max_binding < u64::MAX / 4 {
        lines.push(format!("      largest buffer {}", ui::bytes(c.max_binding)));
    }
    match &bandwidth {
        Some(Ok(w)) => lines.push(format!(
            "      measured       device read {:.0} GB/s, host to device {:.1} GB/s",
            w.device_read, w.host_to_device
        )),
        Some(Err(e)) => lines.push(format!("      measured       failed: {e}")),
        None => {}
    }
    let row = serde_json::json!({
        "capabilities": c,
        "free_memory": b.free_memory(),
        "bandwidth_gb_s": bandwidth.and_then(Result::ok),
    });
    (lines.join("\n") + "\n", row)
}
