//! `longsight devices`: what this machine can run on.

use super::args::Format;
use super::ui;
use crate::backend::{Backend, open_all};
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
    let found = open_all();
    let mut rows = Vec::new();
    for (name, device) in &found {
        match device {
            Ok(b) => rows.push(describe(b, !a.no_measure, a.format == Format::Table)),
            Err(e) if a.format == Format::Table => println!("{name:<5} not usable: {e}"),
            Err(e) => {
                rows.push(serde_json::json!({ "backend": name, "unavailable": e.to_string() }));
            }
        }
    }
    if a.format == Format::Json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(b: &Arc<dyn Backend>, measure: bool, print: bool) -> serde_json::Value {
    let c = b.caps();
    let bandwidth = measure.then(|| b.bandwidth());
    if print {
        let memory = c.memory.map_or("memory size unknown".into(), ui::bytes);
        let free = b.free_memory().map_or(String::new(), |f| format!(" ({} free)", ui::bytes(f)));
        let subgroup = match c.subgroup {
            (0, 0) => "none".into(),
            (a, b) if a == b => a.to_string(),
            (a, b) => format!("{a} to {b}"),
        };
        let storage: Vec<_> = c.storage.iter().map(|d| d.name()).collect();
        println!("{:<5} {}", c.backend, c.device);
        println!("      driver         {}", c.driver);
        println!("      memory         {memory}{free}, {:?}", c.topology);
        println!("      storage        {}", storage.join(", "));
        println!(
            "      f16 arithmetic {}, subgroups {subgroup}, matrix units {}",
            if c.f16 { "yes" } else { "no" },
            c.tensor_cores
        );
        println!("      largest buffer {}", ui::bytes(c.max_binding));
        match &bandwidth {
            Some(Ok(w)) => println!(
                "      measured       device read {:.0} GB/s, host to device {:.1} GB/s",
                w.device_read, w.host_to_device
            ),
            Some(Err(e)) => println!("      measured       failed: {e}"),
            None => {}
        }
    }
    serde_json::json!({
        "capabilities": c,
        "free_memory": b.free_memory(),
        "bandwidth_gb_s": bandwidth.and_then(Result::ok),
    })
}
