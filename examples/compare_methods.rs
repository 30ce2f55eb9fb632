//! Every built-in method on the same cached text: what it reads, and what that costs in likelihood.
//!
//! One prefill; then for each method a fork of the sequence decodes the next tokens of the text as they are
//! written (teacher forcing). The table gives the mean negative log-likelihood in nats per token, its difference to
//! dense attention, and the KV bytes that one decode step reads by the plan's formula.
//!
//! ```text
//! cargo run --release --example compare_methods -- [model] [device]
//! ```
//!
//! `model`: a folder, a `.gguf` file, a hub id, or `smollm2` (the default, fetched once). `device`: `auto` (the
//! default), `cpu`, `wgpu` or `cuda`. 64 tokens show how it is done, not which method is best: for that, score many
//! texts.

use anyhow::{Context, Result};
use longsight::backend::PAGE;
use longsight::engine::{Engine, SeqId, WantLogits};
use longsight::select::{METHODS, MethodSpec, Variant};

const TEXT: &str = include_str!("../assets/demo.txt");
/// Tokens of the text that are used.
const CONTEXT: usize = 4096;
/// Tokens decoded and scored with each method.
const STEPS: usize = 64;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "smollm2".into());
    let device = args.next().unwrap_or_else(|| "auto".into());

    // SparDA's weights are trained for one model each, and NOSA's are part of its models.
    let trained = |v: Variant| matches!(v, Variant::Sparda | Variant::Nosa);
    let specs: Vec<MethodSpec> =
        METHODS.iter().map(|m| m.variant).filter(|v| !trained(*v)).map(Into::into).collect();
    let mut engine = Engine::builder()
        .model(model)
        .device(device)
        .method(Variant::Dense.into())
        // The int8 key copy and the key statistics are written while the text is prefilled: without them in the
        // cache, `set_plan` refuses the methods that read them.
        .summaries_for(&specs)
        .context(CONTEXT)
        // The prefilled sequence and its fork. They share all pages but those that the fork writes.
        .sequences(2)
        .kv_tokens(CONTEXT + STEPS + 2 * PAGE)
        .build()?;

    let adds_bos = engine.tokenizer().adds_bos();
    let mut tokens = engine.tokenizer().encode(TEXT, adds_bos)?;
    tokens.truncate(CONTEXT);
    let cached = tokens.len().checked_sub(STEPS + 1).context("the text is too short")?;
    let (prompt, next) = tokens.split_at(cached);

    let text = engine.open_sequence()?;
    engine.prefill(text, prompt, WantLogits::None, |_, _| (), |_| true)?;
    println!("{cached} tokens cached, {STEPS} scored\n");
    println!("{:<20} {:>10} {:>10} {:>12}", "method", "NLL", "- dense", "KV MB/step");

    let dense = mean_nll(&mut engine, text, &Variant::Dense.into(), next)?;
    row(&engine, dense, dense, cached);
    for spec in specs.iter().filter(|s| s.variant != Variant::Dense) {
        let nll = mean_nll(&mut engine, text, spec, next)?;
        row(&engine, nll, dense, cached);
    }
    Ok(())
}

/// Decodes all but the last of `next` on a fork of `text`; mean NLL of the token that follows each.
fn mean_nll(engine: &mut Engine, text: SeqId, spec: &MethodSpec, next: &[u32]) -> Result<f64> {
    let c = engine.checkpoint().config();
    let plan = spec.plan(&c.plan_shape(engine.fingerprint()), engine.context())?;
    engine.set_plan(plan)?;
    let fork = engine.fork(text)?;
    let mut sum = 0.0;
    for pair in next.windows(2) {
        let logits = engine.decode(fork, pair[0])?;
        sum += nll(&logits, pair[1])?;
    }
    engine.close(fork);
    Ok(sum / (next.len() - 1) as f64)
}

/// `log sum_i exp(logits[i]) - logits[token]`.
fn nll(logits: &[f32], token: u32) -> Result<f64> {
    let at = *logits.get(token as usize).context("a token outside the vocabulary")?;
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    Ok(max + sum.ln() - f64::from(at))
}

/// Prints the line of the method that runs.
fn row(engine: &Engine, nll: f64, dense: f64, cached: usize) {
    let mb = engine.bytes_read(cached) as f64 / 1e6;
    println!("{:<20} {nll:>10.4} {:>+10.4} {mb:>12.2}", engine.plan().method, nll - dense);
}
