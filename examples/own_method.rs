//! A selection method of your own, from outside the crate.
//!
//! The method here is `ruler`: sinks, recent tokens, and an evenly spread sample of everything between. It never
//! looks at the query or the keys, so it is the floor that a scorer has to beat; its audit is printed next to that
//! of the built-in `sparcas` at the same budget. What a method consists of:
//!
//! 1. a [`Selector`] that writes one score per (sequence, KV head, token) and leaves the rest (forced tokens, exact
//!    top-k) to [`pool_and_pick`]; a scorer that reads keys would record `cx.backend.score_dims` first;
//! 2. a factory that makes one selector per layer;
//! 3. a [`Plan`] whose layers say [`Scorer::Custom`].
//!
//! ```text
//! cargo run --release --example own_method -- [model] [device]
//! ```
//!
//! `model`: a folder, a `.gguf` file, a hub id, or `smollm2` (the default, fetched once). `device`: `auto` (the
//! default), `cpu`, `wgpu` or `cuda`.

use anyhow::{Context, Result};
use longsight::backend::{Backend, DType, HeadPool, PAGE, Tensor};
use longsight::engine::{AuditConfig, AuditSummary, Engine, SeqId, WantLogits};
use longsight::select::{
    LayerContext, LayerPlan, LayerShape, Plan, Role, Scorer, SelectError, Selection, Selector,
    Variant, pool_and_pick,
};
use std::sync::Arc;

const TEXT: &str = include_str!("../assets/demo.txt");
/// Tokens of the text that are used.
const CONTEXT: usize = 4096;
/// Audited decode steps.
const STEPS: usize = 16;

/// Scores a token by its position alone: the number of times that 2 divides it, like the marks of a ruler.
///
/// The top-k of such scores are all multiples of the smallest power of two whose multiples fit the budget, and the
/// first of the next finer marks: the stride widens by itself as the text grows.
struct Ruler {
    plan: LayerPlan,
    /// f32 `[slots, kv_heads, stride]`, the shape of the score buffer.
    marks: Tensor,
}

impl Ruler {
    fn new(b: &dyn Backend, shape: &LayerShape, plan: &LayerPlan) -> Result<Self, SelectError> {
        let stride = shape.capacity.next_multiple_of(PAGE);
        let rows = shape.slots * shape.kv_heads;
        let marks = b.alloc(DType::F32, rows * stride, "ruler marks")?;
        let bytes: Vec<u8> = (0..rows)
            .flat_map(|_| 0..stride as u32)
            .flat_map(|token| (token.trailing_zeros() as f32).to_le_bytes())
            .collect();
        b.upload(&marks, &bytes)?;
        Ok(Ruler { plan: plan.clone(), marks })
    }
}

impl Selector for Ruler {
    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        _q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        // All layers share the buffer and forcing tokens writes to it, so every call starts from the marks again.
        cx.backend.copy(&self.marks, &cx.scratch.scores)?;
        pool_and_pick(cx, &self.plan, out)
    }
}

/// The factory. A program with several methods of its own would look at the plan's `Scorer::Custom` name here.
fn ruler(
    b: &dyn Backend,
    shape: &LayerShape,
    plan: &LayerPlan,
) -> Result<Box<dyn Selector>, SelectError> {
    Ok(Box::new(Ruler::new(b, shape, plan)?))
}

/// `base` with its sparse layers handed to the ruler: the same budget and forced tokens, the same dense layers (the
/// first two by default).
fn ruler_plan(base: &Plan) -> Plan {
    let mut plan = Plan { method: "ruler".into(), ..base.clone() };
    for layer in plan.layers.iter_mut().filter(|l| l.role == Role::Select) {
        layer.scorer = Scorer::Custom { name: "ruler".into() };
        // One score row per KV head, nothing to pool: the softmax pools read per-head logits instead.
        layer.pool = HeadPool::SumLogit;
    }
    plan
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "smollm2".into());
    let device = args.next().unwrap_or_else(|| "auto".into());

    let mut engine = Engine::builder()
        .model(model)
        .device(device)
        .method(Variant::Sparcas.into())
        .selector(Arc::new(ruler))
        .audit(AuditConfig::every(1))
        .context(CONTEXT)
        // The prefilled sequence and its fork. They share all pages but those that the fork writes.
        .sequences(2)
        .kv_tokens(CONTEXT + STEPS + 2 * PAGE)
        .build()?;

    let adds_bos = engine.tokenizer().adds_bos();
    let mut tokens = engine.tokenizer().encode(TEXT, adds_bos)?;
    tokens.truncate(CONTEXT);
    let cached = tokens.len().checked_sub(STEPS).context("the text is too short")?;
    let (prompt, next) = tokens.split_at(cached);
    let text = engine.open_sequence()?;
    engine.prefill(text, prompt, WantLogits::None, |_, _| (), |_| true)?;

    println!("{cached} tokens cached, {STEPS} decode steps audited\n");
    println!("{:<10} {:>10} {:>10} {:>14}", "method", "mass kept", "worst", "output error");
    let sparcas = engine.plan().clone();
    for plan in [ruler_plan(&sparcas), sparcas] {
        let name = plan.method.clone();
        let audit = audited(&mut engine, text, plan, next)?;
        let (_, worst) = audit.worst_layer().context("no layer was sparse at this length")?;
        println!(
            "{name:<10} {:>8.1} % {:>8.1} % {:>12.1} %",
            100.0 * audit.recall(),
            100.0 * worst,
            100.0 * audit.output_error()
        );
    }
    Ok(())
}

/// Decodes `next` on a fork of `text` under `plan`; what the audit found.
fn audited(engine: &mut Engine, text: SeqId, plan: Plan, next: &[u32]) -> Result<AuditSummary> {
    engine.set_plan(plan)?;
    let fork = engine.fork(text)?;
    for &token in next {
        engine.decode(fork, token)?;
    }
    engine.close(fork);
    Ok(AuditSummary::new(&engine.take_audits()))
}
