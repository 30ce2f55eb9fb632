//! One choice of tokens for several decode steps: against a selector that holds its lists on the host, alone, in
//! batches, after forks, and audited.

mod common;

use common::cache::backends;
use common::model::{CONTEXT, Model, dense, nmse, on_both, prompt, sparse};
use longsight::backend::reference::words;
use longsight::backend::{Backend, CompactSlice, DType, META_WORDS, Meta, Tensor, open};
use longsight::engine::{AuditConfig, Engine, SeqId, WantLogits, Work};
use longsight::select::{
    Given, LayerContext, LayerPlan, LayerShape, MethodSpec, ModelShape, Plan, Scorer, SelectError,
    Selection, Selector, SelectorFactory, Variant, build,
};
use std::collections::HashMap;
use std::sync::Arc;

const BUDGET: usize = 80;
/// Steps that share a choice.
const REUSE: usize = 3;
const PROMPT: usize = 150;
const STEPS: usize = 10;

/// Lists of a slot: tokens of the sequence when they were chosen, and the lists.
type Kept = (usize, Vec<Vec<u32>>);

/// The built-in selector of a layer, asked every third step; in between its lists, kept on the host, with every token
/// since.
struct Holder {
    inner: Box<dyn Selector>,
    chosen: Selection,
    kept: HashMap<usize, Kept>,
}

impl Selector for Holder {
    fn slice(&self) -> Option<CompactSlice<'_>> {
        self.inner.slice()
    }

    fn select(
        &mut self,
        cx: &LayerContext<'_>,
        q: &Tensor,
        out: &Selection,
    ) -> Result<(), SelectError> {
        let b = cx.backend;
        assert_eq!(cx.seqs.n, 1);
        let meta = words(b, &cx.seqs.meta.slice(0, META_WORDS))?;
        let (slot, tokens) = (meta[Meta::SLOT] as usize, meta[Meta::KV_LEN] as usize);
        if self.kept.get(&slot).is_none_or(|(at, _)| tokens - at >= REUSE) {
            self.inner.select(cx, q, &self.chosen)?;
            let (k, rows) = (self.chosen.k, self.chosen.rows_per_seq);
            let (indices, counts) =
                (words(b, &self.chosen.indices)?, words(b, &self.chosen.counts)?);
            let list = |r: usize| indices[r * k..][..counts[r] as usize].to_vec();
            self.kept.insert(slot, (tokens, (0..rows).map(list).collect()));
        }
        let (at, lists) = &self.kept[&slot];
        let mut indices = vec![0u32; out.rows_per_seq * out.k];
        let mut counts = Vec::new();
        for (list, row) in lists.iter().zip(indices.chunks_exact_mut(out.k)) {
            let all: Vec<u32> = list.iter().copied().chain(*at as u32..tokens as u32).collect();
            row[..all.len()].copy_from_slice(&all);
            counts.push(all.len() as u32);
        }
        b.upload(&out.indices.slice(0, indices.len()), bytemuck::cast_slice(&indices))?;
        Ok(b.upload(&out.counts.slice(0, counts.len()), bytemuck::cast_slice(&counts))?)
    }
}

fn holders(inner: Plan) -> SelectorFactory {
    Arc::new(move |b: &dyn Backend, shape: &LayerShape, _: &LayerPlan| {
        let plan = &inner.layers[shape.layer];
        let (k, rows) = (plan.budget.tokens, plan.lists(shape.heads, shape.kv_heads));
        let room = |n| b.alloc(DType::U32, n, "lists");
        let chosen =
            Selection { indices: room(rows * k)?, counts: room(rows)?, k, rows_per_seq: rows };
        let inner = build(b, shape, plan, Given::default())?.expect("a layer that selects");
        Ok(Box::new(Holder { inner, chosen, kept: HashMap::new() }) as Box<dyn Selector>)
    })
}

/// The method on the cpu with its choices held by [`Holder`]s.
fn reference(model: &Model, spec: &MethodSpec, layers: usize) -> Engine {
    let cpu = open("cpu").unwrap();
    let shape = model.engine(&cpu, &dense());
    let c = shape.decoder().config();
    let windows = vec![None; layers];
    let (heads, kv_heads, head_dim) = (c.n_heads, c.n_kv_heads, c.head_dim);
    let of =
        ModelShape { model: "", windows: &windows, heads, kv_heads, head_dim, importance: None };
    let inner = spec.plan(&of, CONTEXT).unwrap();
    let mut outer = inner.clone();
    for p in &mut outer.layers {
        // Dense as long as the original, then room for the tokens since.
        p.budget.dense_below = p.budget.dense_until();
        p.budget.tokens += REUSE - 1;
        if p.selects() {
            p.scorer = Scorer::Custom { name: "holder".into() };
        }
    }
    let builder = model.builder(&cpu, spec).summaries_for(std::slice::from_ref(spec));
    builder.selector(holders(inner)).plan(outer).build().unwrap()
}

fn start(engine: &mut Engine, seed: u32, tokens: usize) -> SeqId {
    let seq = engine.open_sequence().unwrap();
    let text = prompt(seed, tokens as u32);
    engine.prefill(seq, &text, WantLogits::None, |_, _| (), |_| true).unwrap();
    seq
}

fn steps(engine: &mut Engine, seq: SeqId, n: usize) -> Vec<Vec<f32>> {
    prompt(77, n as u32).into_iter().map(|t| engine.decode(seq, t).unwrap()).collect()
}

fn held(spec: MethodSpec) -> MethodSpec {
    MethodSpec { reuse: Some(REUSE), ..spec }.with_read_options_only()
}

#[test]
fn a_choice_is_held_as_on_the_host() {
    const LAYERS: usize = 3;
    let model = Model::deep(LAYERS);
    let few = |v| MethodSpec { sinks: Some(0), recent: Some(1), ..sparse(v, 20) };
    let specs = [
        sparse(Variant::Oracle, BUDGET),
        sparse(Variant::Sparcas, BUDGET),
        sparse(Variant::SparcasInt8, BUDGET),
        sparse(Variant::SparcasRecommended, BUDGET),
        MethodSpec { correct: Some(false), ..sparse(Variant::Sparq, BUDGET) },
        few(Variant::Kascade),
        few(Variant::Lessismore),
    ];
    for spec in specs {
        let spec = spec.with_read_options_only();
        let mut host = reference(&model, &spec, LAYERS);
        let seq = start(&mut host, 5, PROMPT);
        let want = steps(&mut host, seq, STEPS);
        for dev in backends() {
            let run = |spec: &MethodSpec| {
                let mut engine = model.engine(&dev, spec);
                let seq = start(&mut engine, 5, PROMPT);
                steps(&mut engine, seq, STEPS)
            };
            let (every, got) = (run(&spec), run(&held(spec.clone())));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let far = nmse(got, want);
                assert!(far <= 1e-10, "{:?} on {}, step {i}: {far:e}", spec.variant, dev.name());
            }
            // The first step chooses either way; later ones differ from choosing afresh.
            assert!(every[0] == got[0], "{:?} on {}", spec.variant, dev.name());
            let far = (1..STEPS).map(|i| nmse(&got[i], &every[i])).fold(0.0, f64::max);
            assert!(far > 1e-6, "{:?} on {}: {far:e}", spec.variant, dev.name());
        }
    }
}

/// One step a choice is no other plan, and a budget for all tokens is dense attention.
#[test]
fn once_is_always_and_everything_is_dense() {
    for (model, dev) in on_both(3) {
        let mut exact = model.engine(&dev, &dense());
        let seq = start(&mut exact, 4, PROMPT);
        let want = steps(&mut exact, seq, 4);
        for m in model.methods() {
            let spec = sparse(m.variant, BUDGET).with_read_options_only();
            let once = MethodSpec { reuse: Some(1), ..spec.clone() };
            let [a, b] = [spec, once.with_read_options_only()].map(|s| {
                let mut engine = model.engine(&dev, &s);
                let seq = start(&mut engine, 4, PROMPT);
                (engine.plan().clone(), steps(&mut engine, seq, 4))
            });
            assert!(a == b, "{} of {} on {}", m.name, model.kind(), dev.name());
            let mut all = model.engine(&dev, &held(sparse(m.variant, CONTEXT)));
            let seq = start(&mut all, 4, PROMPT);
            // Caches keep keys in pieces that methods ask for, which changes the order of sums.
            for (got, want) in steps(&mut all, seq, 4).iter().zip(&want) {
                let far = nmse(got, want);
                assert!(far <= 1e-10, "{} of {} on {}: {far:e}", m.name, model.kind(), dev.name());
            }
        }
    }
}

/// Sequences that choose at different steps, side by side and each alone.
#[test]
fn what_else_is_in_a_step_makes_no_difference() {
    let model = Model::deep(3);
    let methods = [Variant::Sparcas, Variant::SparcasPaper, Variant::Kascade, Variant::Refined];
    for (dev, variant) in backends().iter().flat_map(|d| methods.map(|v| (d, v))) {
        let spec = MethodSpec { update: Some(4), ..held(sparse(variant, BUDGET)) };
        let mut spec = spec.with_read_options_only();
        if matches!(variant, Variant::Kascade | Variant::Refined) {
            (spec.sinks, spec.recent) = (Some(0), Some(1));
        }
        let alone = |seed: u32, tokens: usize, n: usize| {
            let mut engine = model.engine(dev, &spec);
            let seq = start(&mut engine, seed, tokens);
            steps(&mut engine, seq, n)
        };
        let mut engine = model.engine(dev, &spec);
        // The third crosses its threshold within the test.
        let lengths = [(1, PROMPT), (2, 181), (3, BUDGET - 2)];
        let ahead = [1, 0, 2];
        let seqs = lengths.map(|(seed, n)| start(&mut engine, seed, n));
        let text = prompt(77, (STEPS + 2) as u32);
        let mut got: Vec<Vec<Vec<f32>>> =
            (0..3).map(|i| steps(&mut engine, seqs[i], ahead[i])).collect();
        for step in 0..STEPS {
            let tokens = [0, 1, 2].map(|i| [text[step + ahead[i]]]);
            // Orders change as well.
            let order = [[0, 1, 2], [2, 0, 1], [1, 2, 0]][step % 3];
            let work = order.map(|i| Work {
                seq: seqs[i],
                tokens: &tokens[i],
                decode: true,
                logits: WantLogits::Last,
            });
            engine.step(&work, |w, _, l| got[order[w]].push(l.to_vec())).unwrap();
        }
        for (i, (seed, n)) in lengths.into_iter().enumerate() {
            let want = alone(seed, n, STEPS + ahead[i]);
            for (step, (got, want)) in got[i].iter().zip(&want).enumerate() {
                let far = nmse(got, want);
                let what = format!("{variant:?} on {}, sequence {i}, step {step}", dev.name());
                assert!(far <= 1e-10, "{what}: {far:e}");
            }
        }
    }
}

#[test]
fn a_fork_within_a_choice_continues_with_the_same_bits() {
    for (model, dev) in on_both(3) {
        for m in model.methods() {
            let mut engine = model.engine(&dev, &held(sparse(m.variant, BUDGET)));
            let origin = start(&mut engine, 4, PROMPT);
            for ahead in 1..=REUSE {
                steps(&mut engine, origin, ahead);
                let fork = engine.fork(origin).unwrap();
                let text = prompt(9, 5);
                // In turns, so that neither may read what the other holds.
                for token in text {
                    let want = engine.decode(origin, token).unwrap();
                    let got = engine.decode(fork, token).unwrap();
                    assert_eq!(
                        got,
                        want,
                        "{} of {} on {}, {ahead} ahead",
                        m.name,
                        model.kind(),
                        dev.name()
                    );
                }
                engine.close(fork);
            }
        }
    }
}

#[test]
fn held_lists_are_audited_like_others() {
    let model = Model::new();
    for dev in backends() {
        let spec = held(sparse(Variant::Sparcas, BUDGET));
        let audit = AuditConfig::every(1);
        let mut engine = model.builder(&dev, &spec).audit(audit).build().unwrap();
        let seq = start(&mut engine, 4, PROMPT);
        steps(&mut engine, seq, 6);
        let audits = engine.take_audits();
        assert_eq!(audits.len(), 2 * 6, "{}", dev.name());
        for a in audits {
            assert!(a.recall.iter().all(|r| *r > 0.0 && *r <= 1.0), "{}: {a:?}", dev.name());
        }
    }
}
