//! Layers that reuse each other's tokens, in a whole (tiny, random) model of six layers in f32, on every backend under
//! test. Against the reference ops they run in `methods_table.rs`.

mod common;

use common::cache::backends;
use common::model::{CONTEXT, Model, nmse, prompt};
use longsight::backend::{Backend, HeadPool, Share};
use longsight::engine::{AuditConfig, Engine, EngineError, WantLogits};
use longsight::model::LayerAudit;
use longsight::select::{Budget, MethodSpec, Plan, Refine, Role, Scorer, SelectError};
use std::sync::Arc;

const LAYERS: usize = 6;
const TOKENS: u32 = 150;

fn spec(text: &str) -> MethodSpec {
    text.parse().unwrap()
}

fn engine(model: &Model, dev: &Arc<dyn Backend>, method: &str) -> Engine {
    model.engine(dev, &spec(method))
}

/// Logits of five decode steps after a prompt, under `plan` where one is given.
fn run(engine: &mut Engine, plan: Option<&Plan>) -> Vec<f32> {
    if let Some(plan) = plan {
        engine.set_plan(plan.clone()).unwrap();
    }
    let tokens = prompt(21, TOKENS + 5);
    let (text, next) = tokens.split_at(TOKENS as usize);
    let seq = engine.open_sequence().unwrap();
    engine.prefill(seq, text, WantLogits::None, |_, _| (), |_| true).unwrap();
    let logits = next.iter().flat_map(|&t| engine.decode(seq, t).unwrap()).collect();
    engine.close(seq);
    logits
}

/// The plan with every layer that reuses another edited.
fn edited(plan: &Plan, edit: impl Fn(&mut Vec<u8>, &mut Option<Refine>)) -> Plan {
    let mut plan = plan.clone();
    for layer in &mut plan.layers {
        if let Role::Reuse { head_map, refine, .. } = &mut layer.role {
            edit(head_map, refine);
        }
    }
    plan
}

/// Where every layer is an anchor nothing is reused: what is left is top-k of pooled exact scores.
#[test]
fn anchors_everywhere_are_the_oracle() {
    let model = Model::deep(LAYERS);
    for dev in backends() {
        let every = format!("kascade:anchors={LAYERS}:budget=40");
        let got = run(&mut engine(&model, &dev, &every), None);
        let oracle =
            "oracle:pool=mean-softmax:budget=40:sinks=0:recent=1:dense-layers=1:dense-below=0";
        let want = run(&mut engine(&model, &dev, oracle), None);
        assert_eq!(got, want, "{}", dev.name());
        let few = run(&mut engine(&model, &dev, "kascade:anchors=2:budget=40"), None);
        assert!(nmse(&few, &want) > 1e-4, "{}: reuse changes nothing", dev.name());
    }
}

/// With every layer an anchor, the scorer of the anchors is that of the method that it comes from.
#[test]
fn anchors_score_as_other_methods_do() {
    let model = Model::deep(LAYERS);
    for dev in backends() {
        for (scorer, other) in [
            ("sorted", "sparcas:pool=mean-softmax:sinks=0:recent=1:dims=8"),
            ("int8", "sparcas-int8:pool=mean-softmax:sinks=0:recent=1:dims=8"),
            ("dims", "sparq:pool=mean-softmax:sinks=0:recent=1:dims=8:correct=false"),
            ("blocks", "quest:sinks=0:recent=1"),
        ] {
            let run_of = |anchors: usize| {
                let spec = format!("kascade:anchors={anchors}:budget=48:scorer={scorer}");
                run(&mut engine(&model, &dev, &spec), None)
            };
            let other = format!("{other}:budget=48:dense-layers=1:dense-below=0");
            let want = run(&mut engine(&model, &dev, &other), None);
            assert_eq!(run_of(LAYERS), want, "{scorer} on {}", dev.name());
            let few = nmse(&run_of(2), &want);
            assert!(few > 1e-4, "{scorer} on {}: reuse changes nothing", dev.name());
        }
    }
}

/// A layer that is handed every token chooses for itself, whatever the order in which it is handed the lists.
#[test]
fn refining_all_tokens_is_choosing() {
    let model = Model::deep(LAYERS);
    for dev in backends() {
        for (every, some) in [
            ("kascade:anchors=6:budget=40", "kascade:anchors=2:budget=40:candidates=250"),
            (
                "kascade:anchors=6:budget=40:pool=none:sinks=2:recent=3",
                "kascade:anchors=2:budget=40:pool=none:sinks=2:recent=3:candidates=250",
            ),
            (
                "kascade:anchors=6:budget=40:pool=max-logit",
                "kascade:anchors=2:budget=40:pool=max-logit:candidates=250",
            ),
            (
                "kascade-pooled:anchors=6:budget=40",
                "kascade-pooled:anchors=2:budget=40:candidates=250",
            ),
        ] {
            let want = run(&mut engine(&model, &dev, every), None);
            let mut refined = engine(&model, &dev, some);
            let plan = refined.plan().clone();
            let got = run(&mut refined, None);
            let what = format!("{some} on {}", dev.name());
            assert!(nmse(&got, &want) < 1e-9, "{what}: {}", nmse(&got, &want));
            if plan.layers[0].pool != HeadPool::AllSoftmax {
                for map in [[1, 0], [1, 1]] {
                    let other = edited(&plan, |head_map, _| *head_map = map.to_vec());
                    let got = run(&mut refined, Some(&other));
                    assert!(nmse(&got, &want) < 1e-9, "{what}, heads {map:?}");
                }
            }
            // Fewer candidates do leave something out.
            let fewer = edited(&plan, |_, refine| {
                refine.iter_mut().for_each(|r| r.candidates = 45);
            });
            let far = nmse(&run(&mut refined, Some(&fewer)), &want);
            assert!(far > 1e-4, "{what}: {far}");
        }
    }
}

/// Maps that name the same lists give the same attention, others do not.
#[test]
fn head_maps_name_lists() {
    let model = Model::deep(LAYERS);
    for dev in backends() {
        let mut e = engine(&model, &dev, "kascade:anchors=2:budget=40");
        let plan = e.plan().clone();
        let mut with = |map: [u8; 2]| run(&mut e, Some(&edited(&plan, |m, _| *m = map.to_vec())));
        let maps = [[0, 1], [1, 0], [0, 0], [1, 1]];
        let all = maps.map(&mut with);
        assert_eq!(with([0, 1]), all[0], "{}: the same plan again", dev.name());
        for (i, a) in all.iter().enumerate() {
            for b in &all[..i] {
                assert!(nmse(a, b) > 1e-5, "{}: two of {maps:?} are alike", dev.name());
            }
        }
        // One list for all heads, named by a map: what the pool over all heads gives by itself.
        let mut pooled = engine(&model, &dev, "kascade-pooled:anchors=2:budget=40");
        let Role::Reuse { head_map, .. } = &pooled.plan().layers[1].role else { panic!() };
        assert_eq!(*head_map, [0, 0]);
        let plan = pooled.plan().clone();
        let want = run(&mut pooled, None);
        // The same lists from an anchor whose layer attends to everything.
        let mut dense = plan.clone();
        dense.layers[3].role = Role::DenseAnchor;
        assert!(nmse(&run(&mut pooled, Some(&dense)), &want) > 1e-5);
    }
}

/// A share of the length is the fixed budget of that many tokens.
#[test]
fn a_share_is_a_budget_that_follows_the_length() {
    let model = Model::deep(LAYERS);
    let tokens = prompt(21, TOKENS + 1);
    let (text, next) = (&tokens[..TOKENS as usize], tokens[TOKENS as usize]);
    for dev in backends() {
        let one = |method: &str| {
            let mut e = engine(&model, &dev, method);
            let seq = e.open_sequence().unwrap();
            e.prefill(seq, text, WantLogits::None, |_, _| (), |_| true).unwrap();
            e.decode(seq, next).unwrap()
        };
        for anchors in ["anchors=2", "anchors=6", "anchors=2:candidates=100"] {
            // 151 tokens: a quarter is 37, less than 20 are never taken.
            let share = one(&format!("kascade:{anchors}:percent=25:budget-min=20"));
            assert_eq!(share, one(&format!("kascade:{anchors}:budget=37")), "{anchors}");
            let least = one(&format!("kascade:{anchors}:percent=1:budget-min=20"));
            assert_eq!(least, one(&format!("kascade:{anchors}:budget=20")), "{anchors}");
            assert_ne!(share, least, "{anchors}");
        }
    }
}

#[test]
fn the_audit_covers_layers_that_reuse() {
    let model = Model::deep(LAYERS);
    let audit = AuditConfig::every(1);
    for dev in backends() {
        let audits = |method: &str| -> Vec<LayerAudit> {
            let mut e = model.builder(&dev, &spec(method)).audit(audit).build().unwrap();
            run(&mut e, None);
            e.take_audits()
        };
        let mean = |audits: &[LayerAudit]| {
            let all = || audits.iter().flat_map(|a| &a.recall);
            all().sum::<f32>() / all().count() as f32
        };
        let few = audits("kascade:anchors=2:budget=20");
        // The first anchor attends to everything: there is nothing to audit.
        let layers: Vec<usize> = few[..5].iter().map(|a| a.layer).collect();
        assert_eq!(layers, [1, 2, 3, 4, 5]);
        assert!(few.iter().flat_map(|a| &a.recall).all(|r| (0.0..1.0).contains(r)), "{few:?}");
        let most = audits("kascade:anchors=2:budget=140");
        let every = audits("kascade:anchors=6:budget=20");
        let again = audits("kascade:anchors=2:budget=20:candidates=80");
        let [few, most, every, again] = [&few, &most, &every, &again].map(|a| mean(a));
        assert!(few < again && again < every && every < most, "{few} {again} {every} {most}");
        assert!(most > 0.9, "{most}");
    }
}

/// Sequences on both sides of the dense threshold in one step answer as they do alone.
#[test]
fn long_and_short_sequences_share_a_step() {
    use longsight::engine::Work;
    let model = Model::deep(LAYERS);
    for dev in backends() {
        for method in [
            "kascade:anchors=2:budget=60",
            "kascade-pooled:anchors=2:budget=60:candidates=70",
            "refined:anchors=2:budget=60:dense-below=0",
        ] {
            let texts = [prompt(1, 90), prompt(2, 30), prompt(3, 140)];
            let open = |e: &mut Engine, text: &[u32]| {
                let seq = e.open_sequence().unwrap();
                e.prefill(seq, text, WantLogits::None, |_, _| (), |_| true).unwrap();
                seq
            };
            let mut e = engine(&model, &dev, method);
            let alone = texts.each_ref().map(|text| {
                let seq = open(&mut e, text);
                let logits = e.decode(seq, 65).unwrap();
                e.close(seq);
                logits
            });
            let seqs = texts.each_ref().map(|text| open(&mut e, text));
            let logits = WantLogits::Last;
            let work = seqs.map(|seq| Work { seq, tokens: &[65], decode: true, logits });
            let mut together = [const { Vec::new() }; 3];
            e.step(&work, |i, _, l| together[i] = l.to_vec()).unwrap();
            for (one, with) in alone.iter().zip(&together) {
                assert!(nmse(with, one) < 1e-9, "{method} on {}", dev.name());
            }
        }
    }
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let model = Model::deep(LAYERS);
    let dev = &backends()[0];
    let mut e = engine(&model, dev, "kascade:anchors=2:budget=40");
    let good = e.plan().clone();
    let mut reason = |plan: Plan| match e.set_plan(plan) {
        Err(EngineError::Select(
            e @ (SelectError::BadPlan { .. } | SelectError::WrongModel { .. }),
        )) => e.to_string(),
        other => panic!("{other:?}"),
    };
    let text = reason(Plan { model: "another".into(), ..good.clone() });
    assert!(text.contains("made for model another"), "{text}");
    let text = reason(edited(&good, |map, _| map.push(0)));
    assert!(text.contains("3 entries for 2 KV heads"), "{text}");
    let text = reason(edited(&good, |map, _| map[0] = 2));
    assert!(text.contains("names list 2"), "{text}");
    let mut plan = good.clone();
    plan.layers[3].role = Role::Dense;
    assert!(reason(plan).contains("no earlier layer that selects"));
    let mut plan = good.clone();
    let share = Some(Share { permille: 500, at_least: 40 });
    plan.layers[4].budget = Budget { share, ..plan.layers[4].budget };
    assert!(reason(plan).contains("must have its budget"));
    let mut plan = good;
    plan.layers[4].scorer = Scorer::Exact;
    assert!(reason(plan).contains("a scorer of its own"));
    assert_eq!(e.plan().layers.len(), LAYERS);
    assert!(e.context() >= CONTEXT);
}
