//! The audit and the sparse path of a whole (tiny, random) model against attention computed here in f64.

mod common;

use common::cache::backends;
use common::model::{Model, dense, prompt, sparse};
use common::tiny::Tiny;
use longsight::backend::{Backend, BackendError, HeadPool};
use longsight::engine::{AuditConfig, Doubling, Engine, EngineError, Request, SeqId, WantLogits};
use longsight::model::{Arch, LayerAudit, LayerWeight, Weight};
use longsight::select::{
    Anchors, Given, LayerPlan, LayerShape, MethodSpec, Scorer, SelectError, SelectorFactory,
    Variant, build,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const EVERY_STEP: Option<AuditConfig> = Some(AuditConfig::every(1));

fn read(engine: &mut Engine, tokens: &[u32]) -> SeqId {
    let seq = engine.open_sequence().unwrap();
    engine.prefill(seq, tokens, WantLogits::None, |_, _| (), |_| true).unwrap();
    seq
}

/// What the audit measures raises the budget where too little was kept, for the steps that follow.
#[test]
fn too_little_mass_doubles_the_budget() {
    let model = Model::new();
    let text = prompt(4, 200);
    for dev in backends() {
        for (variant, tokens) in [(Variant::Sparcas, 20), (Variant::Kascade, 20)] {
            let method = MethodSpec { sinks: Some(0), recent: Some(1), ..sparse(variant, tokens) };
            let run = |least: Option<f32>| {
                let audit = AuditConfig { min_recall: least, ..AuditConfig::every(2) };
                let builder = model.builder(&dev, &method).audit(audit);
                let mut engine = builder.build().unwrap();
                let request = Request::tokens(text.clone()).max_tokens(12);
                let mut answer = engine.generate(request).unwrap();
                let got: Vec<_> = answer.by_ref().filter_map(|p| p.unwrap().token).collect();
                let audit = answer.audit();
                drop(answer);
                (got, audit.doubling.doubled, engine.plan().clone())
            };
            let (plain, never, plan) = run(None);
            assert_eq!((never, run(Some(1e-6)).1), (0, 0));
            // 20, 40, 80, 160, and then all of 512.
            let (got, times, dense) = run(Some(1.0));
            assert_eq!((got.len(), plain.len()), (12, 12));
            assert!(times >= 4, "{times}");
            assert!(plan.layers.iter().any(|l| l.sparse()));
            assert!(dense.layers.iter().all(|l| !l.sparse()), "{dense:?}");
        }
    }
}

/// Lists of more than so many tokens are refused: by a device that is full, or by one that fails.
fn lists_up_to(most: Arc<AtomicUsize>, full: bool) -> SelectorFactory {
    Arc::new(move |b: &dyn Backend, shape: &LayerShape, plan: &LayerPlan| {
        if plan.budget.tokens > most.load(Ordering::Relaxed) {
            let what = "token lists".to_string();
            return Err(SelectError::Backend(match full {
                true => BackendError::OutOfMemory { what, need: 2, free: 1 },
                false => BackendError::Driver { backend: "cpu", reason: what },
            }));
        }
        let plan = LayerPlan { scorer: Scorer::Exact, ..plan.clone() };
        Ok(build(b, shape, &plan, Given::default())?.expect("a layer that selects"))
    })
}

#[test]
fn a_full_device_keeps_the_budget_and_says_so() {
    let model = Model::new();
    let dev = &backends()[0];
    let method = MethodSpec { sinks: Some(0), recent: Some(1), ..sparse(Variant::Oracle, 20) };
    let mut plan = model.engine(dev, &method).plan().clone();
    for layer in &mut plan.layers {
        layer.scorer = Scorer::Custom { name: "limited".into() };
    }
    let build = |most: &Arc<AtomicUsize>, full: bool| {
        let audit = AuditConfig { min_recall: Some(1.0), ..AuditConfig::every(2) };
        let builder = model.builder(dev, &method).plan(plan.clone()).audit(audit);
        builder.selector(lists_up_to(most.clone(), full)).build().unwrap()
    };
    let answer = |engine: &mut Engine| {
        let mut answer = engine.generate(Request::tokens(prompt(4, 200)).max_tokens(12)).unwrap();
        let pieces: Result<Vec<_>, EngineError> = answer.by_ref().collect();
        (pieces.map(|p| p.iter().filter(|p| p.token.is_some()).count()), answer.audit().doubling)
    };
    let most = Arc::new(AtomicUsize::new(40));
    let mut engine = build(&most, true);
    let (tokens, found) = answer(&mut engine);
    assert_eq!(tokens.unwrap(), 12);
    // 20, 40, and no 80 in the other five audits.
    assert_eq!(found, Doubling { doubled: 1, unmeasured: false, no_room: 5 });
    assert!(engine.plan().layers.iter().all(|l| l.budget.tokens == 40));
    // Later there is room.
    most.store(80, Ordering::Relaxed);
    let (tokens, found) = answer(&mut engine);
    assert_eq!((tokens.unwrap(), found.doubled), (12, 1));
    assert!(engine.plan().layers.iter().all(|l| l.budget.tokens == 80));

    let (tokens, _) = answer(&mut build(&Arc::new(AtomicUsize::new(40)), false));
    let driver = |e: &BackendError| matches!(e, BackendError::Driver { .. });
    assert!(
        matches!(&tokens, Err(EngineError::Select(SelectError::Backend(e))) if driver(e)),
        "{tokens:?}"
    );
}

/// What the model's first layer does for the last of some tokens.
struct FirstLayer {
    tiny: Tiny,
    /// RMS-normalised embeddings.
    x: Vec<Vec<f64>>,
}

impl FirstLayer {
    fn new(tokens: &[u32]) -> FirstLayer {
        let mut layer = FirstLayer { tiny: Tiny::new(Arch::Llama, false, 3), x: Vec::new() };
        let hidden = layer.tiny.config.hidden;
        let (table, norm) = (layer.weight(Weight::Embed), layer.layer(LayerWeight::AttnNorm));
        let row = |&t: &u32| {
            let x = &table[t as usize * hidden..][..hidden];
            let mean = x.iter().map(|v| v * v).sum::<f64>() / hidden as f64;
            let scale = 1.0 / (mean + layer.tiny.config.norm_eps).sqrt();
            x.iter().zip(&norm).map(|(v, w)| v * scale * w).collect()
        };
        layer.x = tokens.iter().map(row).collect();
        layer
    }

    fn weight(&self, which: Weight) -> Vec<f64> {
        let (_, values) = self.tiny.weights.iter().find(|(w, _)| *w == which).unwrap();
        values.iter().map(|&v| f64::from(v)).collect()
    }

    fn layer(&self, which: LayerWeight) -> Vec<f64> {
        self.weight(Weight::Layer(0, which))
    }

    /// One head of a projection, per token.
    fn head(&self, which: LayerWeight, head: usize) -> Vec<Vec<f64>> {
        let (w, d) = (self.layer(which), self.tiny.config.head_dim);
        let hidden = self.tiny.config.hidden;
        let rows = || w.chunks_exact(hidden).skip(head * d).take(d);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum();
        self.x.iter().map(|x| rows().map(|r| dot(r, x)).collect()).collect()
    }

    /// Rotary embedding: dimension i turns with i + d / 2.
    fn rotated(&self, which: LayerWeight, head: usize) -> Vec<Vec<f64>> {
        let half = self.tiny.config.head_dim / 2;
        let mut all = self.head(which, head);
        for (position, x) in all.iter_mut().enumerate() {
            for i in 0..half {
                let freq = self.tiny.config.rope_theta.powf(-(i as f64) / half as f64);
                let (sin, cos) = (position as f64 * freq).sin_cos();
                let (a, b) = (x[i], x[i + half]);
                (x[i], x[i + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        all
    }

    /// Per query head the mass of `selected` tokens, and the relative error of the outputs over them.
    fn audit(&self, selected: &[usize]) -> (Vec<f64>, f64) {
        let c = &self.tiny.config;
        let (mut masses, mut wrong, mut norm) = (Vec::new(), 0.0, 0.0);
        for h in 0..c.n_heads {
            let kv = h / (c.n_heads / c.n_kv_heads);
            let q = self.rotated(LayerWeight::Q, h).pop().unwrap();
            let (k, v) = (self.rotated(LayerWeight::K, kv), self.head(LayerWeight::V, kv));
            let logit = |k: &Vec<f64>| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
            let weights: Vec<f64> =
                k.iter().map(|k| (logit(k) / (c.head_dim as f64).sqrt()).exp()).collect();
            let over = |tokens: &mut dyn Iterator<Item = usize>| {
                let (mut sum, mut out) = (0.0, vec![0.0; c.head_dim]);
                for j in tokens {
                    sum += weights[j];
                    out.iter_mut().zip(&v[j]).for_each(|(o, x)| *o += weights[j] * x);
                }
                out.iter_mut().for_each(|o| *o /= sum);
                (sum, out)
            };
            let (all, exact) = over(&mut (0..k.len()));
            let (part, sparse) = over(&mut selected.iter().copied());
            masses.push(part / all);
            wrong += exact.iter().zip(&sparse).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            norm += exact.iter().map(|a| a * a).sum::<f64>();
        }
        (masses, (wrong / norm).sqrt())
    }
}

/// A window's selection is known beforehand, so mass and error of the first layer follow from the weights.
#[test]
fn the_audit_finds_the_mass_and_error_of_a_known_selection() {
    let model = Model::new();
    let tokens = prompt(1, 101);
    let selected: Vec<usize> = (0..4).chain(101 - 36..101).collect();
    let (masses, error) = FirstLayer::new(&tokens).audit(&selected);
    assert!(masses.iter().all(|m| (0.1..0.9).contains(m)) && error > 0.1, "{masses:?}, {error}");
    for dev in backends() {
        let spec = MethodSpec { sinks: Some(4), ..sparse(Variant::Window, 40) };
        let mut engine = model.builder(&dev, &spec).audit(EVERY_STEP).build().unwrap();
        // Slot 0 holds another sequence.
        engine.open_sequence().unwrap();
        let seq = read(&mut engine, &tokens[..100]);
        engine.decode(seq, tokens[100]).unwrap();
        let audits = engine.take_audits();
        assert_eq!(audits.iter().map(|a| a.layer).collect::<Vec<_>>(), [0, 1]);
        let LayerAudit { recall, output_error, .. } = &audits[0];
        assert_eq!(recall.len(), masses.len());
        for (got, want) in recall.iter().zip(&masses) {
            assert!((f64::from(*got) - want).abs() < 1e-4, "{recall:?} {masses:?}");
        }
        assert!((f64::from(*output_error) - error).abs() < 1e-4, "{output_error} {error}");
    }
}

/// All tokens but one take the sparse path. The one that a head leaves out is the one with its smallest weight, so
/// at most one n-th of the mass is missing, and the logits are off by no larger share.
#[test]
fn all_but_one_token_is_almost_dense() {
    let model = Model::new();
    let (n, tokens) = (151, prompt(3, 151));
    for dev in backends() {
        let mut exact = model.engine(&dev, &dense());
        let seq = read(&mut exact, &tokens[..n - 1]);
        let want = exact.decode(seq, tokens[n - 1]).unwrap();
        let nmse = |budget: usize| {
            let spec = MethodSpec {
                pool: Some(HeadPool::None),
                recent: Some(1),
                sinks: Some(0),
                ..sparse(Variant::Oracle, budget)
            };
            let mut engine = model.builder(&dev, &spec).audit(EVERY_STEP).build().unwrap();
            let seq = read(&mut engine, &tokens[..n - 1]);
            let got = engine.decode(seq, tokens[n - 1]).unwrap();
            let diff: f64 = got.iter().zip(&want).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let nmse = diff / want.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
            (nmse, engine.take_audits())
        };
        let (off, audits) = nmse(n - 1);
        assert!(off > 0.0 && off < (1.0 / n as f64).powi(2), "{}: {off}", dev.name());
        assert_eq!(audits.len(), 2);
        for recall in audits.iter().flat_map(|a| &a.recall) {
            assert!(*recall < 1.0 && *recall >= 1.0 - 1.0 / n as f32, "{recall}");
        }
        let (far, _) = nmse(n / 4);
        assert!(far > 100.0 * off, "{}: {far} {off}", dev.name());
    }
}

/// What the probe finds on the host (lists, exact attention of every token) is what the audit finds on the device, for
/// methods with lists per KV head, of dimensions, of blocks, from another layer, and for all heads.
#[test]
fn probed_selections_hold_the_audited_mass() {
    let model = Model::deep(4);
    let tokens = prompt(2, 181);
    let group = 2;
    for dev in backends() {
        for variant in [
            Variant::Window,
            Variant::Oracle,
            Variant::SparcasPaper,
            Variant::SparcasGroups,
            Variant::Infllm2,
            Variant::Kascade,
            Variant::KascadePooled,
            Variant::Refined,
        ] {
            let anchors =
                matches!(variant, Variant::Kascade | Variant::KascadePooled | Variant::Refined);
            let spec = MethodSpec {
                anchors: anchors.then(|| "0+2".parse::<Anchors>().unwrap()),
                ..spec_of(variant)
            };
            let name = format!("{} {}", dev.name(), spec.name());
            let mut engine = model.builder(&dev, &spec).audit(EVERY_STEP).build().unwrap();
            // Slot 0 holds another sequence.
            engine.open_sequence().unwrap();
            let seq = read(&mut engine, &tokens[..178]);
            engine.set_probe(true);
            for (i, &token) in tokens[178..].iter().enumerate() {
                engine.decode(seq, token).unwrap();
                let (audits, probes) = (engine.take_audits(), engine.take_probes());
                assert!(!probes.is_empty(), "{name}");
                assert_eq!(
                    audits.iter().map(|a| a.layer).collect::<Vec<_>>(),
                    probes.iter().map(|p| p.layer).collect::<Vec<_>>(),
                    "{name}"
                );
                for (a, p) in audits.iter().zip(&probes) {
                    assert_eq!((p.selected.len(), p.attention.len(), p.dims.len()), (2, 2, 2));
                    for h in 0..2 {
                        let all = &p.attention[h];
                        assert_eq!(all.len(), 179 + i, "{name}");
                        let sum = |x: &mut dyn Iterator<Item = f32>| x.map(f64::from).sum::<f64>();
                        assert!((sum(&mut all.iter().copied()) - 1.0).abs() < 1e-4, "{name}");
                        let selected = &p.selected[h];
                        assert!(selected.is_sorted_by(|a, b| a < b), "{name}");
                        assert!(!selected.is_empty() && selected.len() < all.len(), "{name}");
                        let mass = sum(&mut selected.iter().map(|&t| all[t as usize]));
                        let heads = a.recall[h * group..(h + 1) * group].iter().copied();
                        let audited = sum(&mut heads.into_iter()) / group as f64;
                        assert!((mass - audited).abs() < 1e-4, "{name}: {mass} {audited}");
                        let dims = if variant == Variant::SparcasPaper
                            || variant == Variant::SparcasGroups
                        {
                            8
                        } else {
                            0
                        };
                        assert_eq!(p.dims[h].len(), dims, "{name}");
                    }
                }
            }
            engine.set_probe(false);
            engine.decode(seq, 1).unwrap();
            assert!(engine.take_probes().is_empty());
        }
    }
}

/// Sparse on texts of 180 tokens, with the options that the method reads.
fn spec_of(variant: Variant) -> MethodSpec {
    let spec = sparse(variant, if variant == Variant::Infllm2 { 128 } else { 64 });
    let spec = if variant == Variant::Kascade || variant == Variant::KascadePooled {
        MethodSpec { percent: Some(30.0), budget_min: Some(48), budget: None, ..spec }
    } else {
        spec
    };
    spec.with_read_options_only()
}
