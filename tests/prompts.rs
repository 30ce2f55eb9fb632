//! Prompts that are read sparsely, in a whole (tiny, random) model in f32, on every backend under test.

mod common;
#[allow(dead_code)]
#[path = "conformance/oracle.rs"]
mod oracle;

use common::cache::backends;
use common::model::{Model, dense, nmse, on_both, prompt, sparse};
use longsight::backend::{Backend, DType};
use longsight::engine::{Engine, Request, WantLogits, Work};
use longsight::eval::{Sample, evaluate};
use longsight::select::{MethodSpec, Variant};
use oracle::{Fault, Oracle};
use std::sync::Arc;

const LAYERS: usize = 4;
const TOKENS: u32 = 150;

fn spec(text: &str) -> MethodSpec {
    text.parse().unwrap()
}

/// Logits of every row of a prompt, read in chunks.
fn read(model: &Model, dev: &Arc<dyn Backend>, spec: &MethodSpec, chunk: usize) -> Vec<f32> {
    let mut engine = model.builder(dev, spec).chunk(chunk).build().unwrap();
    let seq = engine.open_sequence().unwrap();
    let mut all = Vec::new();
    let each = |_: usize, l: &[f32]| all.extend_from_slice(l);
    engine.prefill(seq, &prompt(21, TOKENS), WantLogits::All, each, |_| true).unwrap();
    all
}

/// The same rows, each one a decode step.
fn decoded(model: &Model, dev: &Arc<dyn Backend>, spec: &MethodSpec) -> Vec<f32> {
    let mut engine = model.engine(dev, spec);
    let seq = engine.open_sequence().unwrap();
    prompt(21, TOKENS).into_iter().flat_map(|t| engine.decode(seq, t).unwrap()).collect()
}

/// A method that leaves most of 150 tokens out.
fn small(variant: Variant) -> MethodSpec {
    match variant {
        Variant::Kascade | Variant::KascadePooled => {
            MethodSpec { sinks: Some(0), recent: Some(1), ..sparse(variant, 20) }
        }
        _ => sparse(variant, 80),
    }
}

/// A row that chooses for itself chooses what its decode step would.
#[test]
fn tiles_of_one_row_are_decode_steps() {
    for (model, dev) in on_both(LAYERS) {
        let exact = read(&model, &dev, &dense(), 64);
        for m in model.methods().filter(|m| m.variant.takes("tile")) {
            let spec = small(m.variant);
            let want = decoded(&model, &dev, &spec);
            let got = read(&model, &dev, &MethodSpec { tile: Some(1), ..spec }, 64);
            let what = format!("{} of {} on {}", m.name, model.kind(), dev.name());
            assert!(nmse(&got, &want) < 1e-9, "{what}: {}", nmse(&got, &want));
            assert!(nmse(&got, &exact) > 1e-3, "{what} leaves nothing out");
        }
    }
}

/// Tiles of several rows against the float64 reference ops; where chunks end makes no difference as long as they end
/// with a tile.
#[test]
fn tiles_agree_with_the_reference() {
    let model = Model::deep(LAYERS);
    let reference: Arc<dyn Backend> = Arc::new(Oracle::new(Fault::None, vec![DType::F32], false));
    let cases = [
        "kascade:anchors=2:tile=8:budget=20",
        "kascade:anchors=0+1+3:tile=16:percent=20:budget-min=24",
        "kascade:anchors=2:tile=8:budget=20:prompt-dense=2",
        "kascade-pooled:anchors=2:tile=8:budget=20",
        "oracle:pool=mean-softmax:tile=8:budget=24:sinks=2:recent=1:dense-layers=1:dense-below=0",
        "window:tile=8:budget=24:sinks=4:dense-layers=0:dense-below=0",
    ];
    let mut seen: Vec<Vec<f32>> = vec![read(&model, &reference, &dense(), 64)];
    for case in cases {
        let want = read(&model, &reference, &spec(case), 64);
        for other in &seen {
            assert!(nmse(&want, other) > 1e-4, "{case} is another method");
        }
        for dev in backends() {
            for chunk in [64, 16] {
                let got = read(&model, &dev, &spec(case), chunk);
                let far = nmse(&got, &want);
                assert!(far < 1e-9, "{case} in chunks of {chunk} on {}: {far}", dev.name());
            }
        }
        seen.push(want);
    }
}

/// Where the budget holds a tile's whole past, nothing is left out.
#[test]
fn a_budget_for_all_is_dense() {
    let model = Model::deep(LAYERS);
    for dev in backends() {
        let want = read(&model, &dev, &dense(), 64);
        for case in ["kascade:tile=32:budget=150", "kascade-pooled:tile=8:percent=100"] {
            let far = nmse(&read(&model, &dev, &spec(case), 64), &want);
            assert!(far < 1e-10, "{case} on {}: {far}", dev.name());
        }
        // Rolling: tiles of the first 40 tokens see all of them; later ones do not.
        let got = read(&model, &dev, &spec("kascade:tile=8:percent=10:budget-min=40"), 64);
        let width = want.len() / TOKENS as usize;
        let far = nmse(&got[..40 * width], &want[..40 * width]);
        assert!(far < 1e-10, "{}: {far}", dev.name());
        assert!(nmse(&got[48 * width..], &want[48 * width..]) > 1e-4);
    }
}

/// Sequences that prefill and one that decodes in the same step answer as they do alone.
#[test]
fn prompts_and_decode_steps_share_a_step() {
    let model = Model::deep(LAYERS);
    let method = spec("kascade:anchors=2:tile=8:budget=20");
    let (long, other) = (prompt(21, TOKENS), prompt(5, 60));
    for dev in backends() {
        let mut engine = model.engine(&dev, &method);
        let start = |engine: &mut Engine| {
            let seq = engine.open_sequence().unwrap();
            engine.prefill(seq, &long[..149], WantLogits::None, |_, _| (), |_| true).unwrap();
            seq
        };
        let a = start(&mut engine);
        let want_a = engine.decode(a, long[149]).unwrap();
        let b = engine.open_sequence().unwrap();
        let mut want_b = Vec::new();
        let each = |_: usize, l: &[f32]| want_b.extend_from_slice(l);
        engine.prefill(b, &other, WantLogits::Last, each, |_| true).unwrap();
        engine.close(a);
        engine.close(b);

        let (a, b) = (start(&mut engine), engine.open_sequence().unwrap());
        let work = [
            Work { seq: b, tokens: &other, decode: false, logits: WantLogits::Last },
            Work { seq: a, tokens: &long[149..], decode: true, logits: WantLogits::Last },
        ];
        let mut got = [Vec::new(), Vec::new()];
        engine.step(&work, |i, _, l| got[i] = l.to_vec()).unwrap();
        assert!(nmse(&got[0], &want_b) < 1e-10 && nmse(&got[1], &want_a) < 1e-10, "{}", dev.name());
    }
}

/// A context shorter than a tile has a plan too.
#[test]
fn short_contexts_have_room_for_a_tile() {
    let model = Model::deep(LAYERS);
    let dev = &backends()[0];
    let built = model.builder(dev, &spec("kascade:tile=32")).context(18).build();
    assert!(built.is_ok(), "{}", built.unwrap_err());
}

#[test]
fn plans_that_cannot_read_prompts_are_refused() {
    let model = Model::deep(LAYERS);
    let dev = &backends()[0];
    for (case, part) in [
        ("sparcas:tile=8", "take tile 1"),
        ("oracle:tile=8", "take tile 1"),
        ("kascade:tile=300", "give 1 to 256"),
        ("kascade:tile=32:budget=30", "do not fit a budget of 30"),
        ("kascade:tile=8:candidates=200:budget=20", "refine candidates read prompts densely"),
    ] {
        let e = model.builder(dev, &spec(case)).build().unwrap_err().to_string();
        assert!(e.contains(part), "{case}: {e}");
    }
    assert!("refined:tile=8".parse::<MethodSpec>().is_err());
}

/// An evaluation reads the prompt with each method that wants to, and a kept sequence is not handed to another plan.
#[test]
fn what_was_read_sparsely_belongs_to_its_plan() {
    let model = Model::deep(LAYERS);
    let dev = &backends()[0];
    let method = spec("kascade:anchors=2:tile=8:budget=20");
    let mut engine = model.engine(dev, &method);
    let sparse = engine.plan().clone();
    let mut dense_prompt = sparse.clone();
    dense_prompt.layers.iter_mut().for_each(|l| l.tile = None);
    let tokens = prompt(21, TOKENS);
    let sample =
        Sample { name: "s".into(), tokens: tokens.clone(), decode_from: 140, score_from: 141 };
    let plans =
        [("sparse".to_string(), sparse.clone()), ("dense prompt".into(), dense_prompt.clone())];
    let mut rows = Vec::new();
    evaluate(&mut engine, &[sample], &plans, None, |_, _| true, |done| rows = done).unwrap();
    engine.set_plan(sparse.clone()).unwrap();
    let seq = engine.open_sequence().unwrap();
    engine.prefill(seq, &tokens[..140], WantLogits::None, |_, _| (), |_| true).unwrap();
    let logits = engine.decode(seq, tokens[140]).unwrap();
    engine.close(seq);
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f32 = logits.iter().map(|l| (l - max).exp()).sum();
    let nll = sum.ln() + max - logits[tokens[141] as usize];
    assert!((rows[1].nlls[0] - nll).abs() < 1e-5, "{} {nll}", rows[1].nlls[0]);
    assert!((rows[2].nlls[0] - nll).abs() > 1e-4, "a dense prompt is another one");

    // Prompt tokens that a kept sequence spares the next request.
    let spared = |engine: &mut Engine| {
        let request =
            Request { keep: true, ..Request::tokens(tokens[..100].to_vec()).max_tokens(1) };
        let mut generation = engine.generate(request).unwrap();
        while generation.next().is_some() {}
        generation.stats().unwrap().reused_tokens
    };
    spared(&mut engine);
    assert!(spared(&mut engine) > 0, "the same plan");
    engine.set_plan(sparse).unwrap();
    assert!(spared(&mut engine) > 0, "the same plan, set again");
    engine.set_plan(dense_prompt).unwrap();
    assert_eq!(spared(&mut engine), 0);
}
