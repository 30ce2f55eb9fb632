//! A question about a long text: build an engine, stream the answer, look at what sparsity saved and cost.
//!
//! ```text
//! cargo run --release --example quickstart -- [model] [device]
//! ```
//!
//! `model`: a folder, a `.gguf` file, a hub id, or `smollm2` (the default, fetched once). `device`: `auto` (the
//! default), `cpu`, `wgpu` or `cuda`.

use anyhow::{Context, Result};
use longsight::engine::{AuditConfig, Engine, Request};
use std::io::Write;

/// Some 4,500 tokens of a novel with one sentence that is not in it.
const TEXT: &str = include_str!("../assets/demo.txt");
const QUESTION: &str = "Question: Where was the key of the garden gate kept?";
/// Room for the text, the question and the answer, in tokens.
const CONTEXT: usize = 8192;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "smollm2".into());
    let device = args.next().unwrap_or_else(|| "auto".into());

    // The default method is SparCas on sorted keys. Every fourth step all sparse layers are audited: their
    // selection is compared with dense attention over the same cache.
    let mut engine = Engine::builder()
        .model(model)
        .device(device)
        .context(CONTEXT)
        .audit(AuditConfig::every(4))
        .build()?;
    for note in engine.notes() {
        eprintln!("note: {note}");
    }
    println!("{} on {}", engine.plan().method, engine.backend().caps().device);

    let prompt = format!("{TEXT}\n\n{QUESTION}");
    // A model without a chat template gets the text as it is.
    let request =
        if engine.template().is_some() { Request::chat(prompt) } else { Request::text(prompt) };
    let mut answer = engine.generate(request.max_tokens(64))?;
    for piece in answer.by_ref() {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!("\n");

    let stats = answer.stats().cloned().context("the answer has not ended")?;
    println!("prompt   {} tokens in {:.1} s", stats.prompt_tokens, stats.prefill_seconds);
    println!(
        "answer   {} tokens in {:.1} s after the first",
        stats.generated_tokens, stats.decode_seconds
    );
    println!(
        "KV read  {:.1} MB in the last step, dense attention reads {:.1} MB",
        stats.kv_bytes as f64 / 1e6,
        stats.kv_bytes_dense as f64 / 1e6
    );
    let audit = answer.audit();
    match audit.worst_layer() {
        Some((layer, recall)) => println!(
            "audit    attention mass kept {:.1} % (layer {layer}: {:.1} %), output error {:.1} %",
            100.0 * audit.recall(),
            100.0 * recall,
            100.0 * audit.output_error()
        ),
        None => println!("audit    no sparse step was audited"),
    }
    Ok(())
}
