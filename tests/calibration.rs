//! Tracing and calibration on the tiny random model: what a trace shows, and that interrupted runs end like
//! uninterrupted ones.

mod common;

use common::model::{CONTEXT, Model, dense, on_both, prompt, sparse};
use common::program::{Home, text};
use longsight::backend::{DType, open};
use longsight::calibrate::{
    CalibrateError, Calibration, Choice, Objective, OwnTile, Settings, Statistics, gather,
};
use longsight::engine::{Engine, EngineError, LayerTrace, TraceParts, WantLogits};
use longsight::model::{LayerWeight, Weight};
use longsight::select::{Role, SelectError, Variant};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

const ALL: TraceParts = TraceParts { residual: true, normed: true, heads: true };

fn traced(engine: &mut Engine, tokens: &[u32], parts: TraceParts) -> Vec<LayerTrace> {
    let mut layers = Vec::new();
    engine.trace(tokens, parts, |l| layers.push(l), |_| true).unwrap();
    layers
}

fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let most = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(most < 2e-4, "{most}");
}

/// The projection of the traced inputs by the checkpoint's own rows, rotated as the checkpoint says.
fn projected(engine: &Engine, layer: &LayerTrace, weight: LayerWeight) -> Vec<f32> {
    let c = engine.decoder().config();
    let w = engine.checkpoint().read(Weight::Layer(layer.layer, weight)).unwrap();
    let (d, half) = (c.head_dim, c.head_dim / 2);
    let mut out = Vec::new();
    for (i, x) in layer.normed.chunks_exact(c.hidden).enumerate() {
        let y = w.chunks_exact(c.hidden).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>());
        let y: Vec<f32> = y.collect();
        for head in y.chunks_exact(d) {
            let angle = |p: usize| (layer.first + i) as f32 * c.inv_freq()[p];
            let turned = (0..d).map(|j| {
                let (sin, cos) = angle(j % half).sin_cos();
                if j < half {
                    head[j] * cos - head[j + half] * sin
                } else {
                    head[j] * cos + head[j - half] * sin
                }
            });
            out.extend(turned);
        }
    }
    out
}

#[test]
fn a_trace_shows_what_the_layers_compute_in_the_checkpoints_order() {
    let tokens = prompt(1, 40);
    for (model, dev) in on_both(2) {
        let mut engine = model.builder(&dev, &dense()).chunk(16).build().unwrap();
        let layers = traced(&mut engine, &tokens, ALL);
        let seen: Vec<_> = layers.iter().map(|l| (l.layer, l.first, l.rows)).collect();
        assert_eq!(
            seen,
            [(0, 0, 16), (1, 0, 16), (0, 16, 16), (1, 16, 16), (0, 32, 8), (1, 32, 8)]
        );
        let c = engine.decoder().config().clone();
        let embed = engine.checkpoint().read(Weight::Embed).unwrap();
        for layer in &layers {
            close(&layer.q, &projected(&engine, layer, LayerWeight::Q));
            close(&layer.k, &projected(&engine, layer, LayerWeight::K));
            assert_ne!(layer.x, layer.attended);
            let norm = engine.checkpoint().read(Weight::Layer(layer.layer, LayerWeight::AttnNorm));
            let norm = norm.unwrap();
            for (i, (x, y)) in
                layer.x.chunks_exact(c.hidden).zip(layer.normed.chunks_exact(c.hidden)).enumerate()
            {
                let mean = x.iter().map(|x| x * x).sum::<f32>() / c.hidden as f32;
                let rms = (mean + c.norm_eps as f32).sqrt();
                close(y, &x.iter().zip(&norm).map(|(x, n)| x / rms * n).collect::<Vec<_>>());
                if layer.layer == 0 {
                    let token = tokens[layer.first + i] as usize;
                    close(x, &embed[token * c.hidden..][..c.hidden]);
                }
            }
        }
        // Parts that nobody asked for are not copied, and the sequence is closed.
        let heads = traced(&mut engine, &tokens, TraceParts { heads: true, ..Default::default() });
        assert!(heads.iter().all(|l| l.x.is_empty() && l.normed.is_empty()));
        assert_eq!(heads[3].q, layers[3].q);
        let open: Vec<_> = (0..3).map(|_| engine.open_sequence().unwrap()).collect();
        open.into_iter().for_each(|s| engine.close(s));
        // The order in which keys are stored does not show.
        let sorted = model.builder(&dev, &sparse(Variant::Sparcas, 40)).calibrate(true);
        let dir = tempfile::tempdir().unwrap();
        let mut sorted = sorted.key_order_dir(dir.path()).chunk(16).build().unwrap();
        assert_ne!(sorted.decoder().key_order().pairs, engine.decoder().key_order().pairs);
        for (a, b) in traced(&mut sorted, &tokens, ALL).iter().zip(&layers) {
            close(&a.q, &b.q);
            close(&a.k, &b.k);
        }
    }
}

#[test]
fn a_trace_changes_nothing_and_can_be_stopped() {
    let model = Model::new();
    let dev = open("cpu").unwrap();
    let mut engine = model.builder(&dev, &dense()).chunk(16).build().unwrap();
    let tokens = prompt(2, 40);
    let logits = |engine: &mut Engine| {
        let seq = engine.open_sequence().unwrap();
        let mut last = Vec::new();
        let keep = |_: usize, l: &[f32]| last = l.to_vec();
        engine.prefill(seq, &tokens, WantLogits::Last, keep, |_| true).unwrap();
        engine.close(seq);
        last
    };
    let before = logits(&mut engine);
    let stopped = engine.trace(&tokens, ALL, |_| (), |done| done < 16);
    assert!(matches!(stopped, Err(EngineError::Interrupted)));
    let long = vec![1; CONTEXT + 1];
    let long = engine.trace(&long, ALL, |_| (), |_| true);
    assert!(matches!(long, Err(EngineError::ContextTooLong { .. })));
    assert_eq!(logits(&mut engine), before);
}

fn texts(n: u32) -> Vec<Vec<u32>> {
    (0..n).map(|seed| prompt(seed, 120)).collect()
}

fn cpu_engine(model: &Model) -> Engine {
    let dev = open("cpu").unwrap();
    model.builder(&dev, &dense()).chunk(32).sequences(1).build().unwrap()
}

fn small(engine: &Engine) -> Settings {
    Settings { tile: 16, keys: 8, ..Settings::of(engine) }
}

fn choice() -> Choice {
    Choice { objective: Objective::Low, weigh: false, anchors: Some(1), share: 0.95 }
}

fn run(
    engine: &mut Engine,
    texts: &[Vec<u32>],
    settings: &Settings,
    state: Option<&Path>,
) -> Result<Statistics, CalibrateError> {
    gather(engine, texts, settings, state, &|_, _| true)
}

#[test]
fn a_calibration_that_was_stopped_ends_like_one_that_was_not() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let (texts, settings) = (texts(3), small(&engine));
    let whole = run(&mut engine, &texts, &settings, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("k.state");
    // In the first text's comparison, in the second text's reading, in the third's comparison.
    for (stop, texts_done) in [(200, 0), (300, 1), (700, 2)] {
        let stopped = gather(&mut engine, &texts, &settings, Some(&state), &|done, _| done < stop);
        assert!(matches!(stopped, Err(CalibrateError::Engine(EngineError::Interrupted))));
        assert_eq!(state.exists(), texts_done > 0, "{stop}");
    }
    let reads = AtomicUsize::new(0);
    let count = |done: u64, all: u64| {
        assert!(done <= all && done >= 480, "{done} of {all}: two texts are done");
        reads.fetch_add(1, Ordering::Relaxed);
        true
    };
    let resumed = gather(&mut engine, &texts, &settings, Some(&state), &count).unwrap();
    assert_eq!(resumed, whole);
    assert!(reads.into_inner() > 2);
    let make = |s: &Statistics| Calibration::new("m", s, choice()).unwrap();
    assert_eq!(make(&resumed), make(&whole));

    // A state of something else is refused by a sentence that says what differs.
    let refused = |settings: &Settings, texts: &[Vec<u32>], what: &str| {
        let mut engine = cpu_engine(&model);
        let e = run(&mut engine, texts, settings, Some(&state)).unwrap_err();
        let other =
            matches!(e, CalibrateError::OtherRun { .. } | CalibrateError::OtherSettings { .. });
        assert!(other && e.to_string().contains(what) && e.to_string().contains("k.state"), "{e}");
    };
    refused(&Settings { keys: 9, ..settings.clone() }, &texts, "\n  keys: was ");
    refused(&Settings { model: "another".into(), ..settings.clone() }, &texts, "another");
    let own = OwnTile::Published;
    refused(&Settings { own, ..settings.clone() }, &texts, "own: was right, is published");
    refused(&settings, &texts[..2], "prompts: was 3, is 2");
    let [a, b, c] = [0, 1, 2].map(|i: usize| texts[i].clone());
    refused(&settings, &[b, a.clone(), c], "texts: was one with hash ");
    refused(&settings, &[a[..110].to_vec()], "tokens: was 120, is 110");
    std::fs::write(&state, b"junk").unwrap();
    let e = run(&mut engine, &texts, &settings, Some(&state)).unwrap_err().to_string();
    assert!(e.contains("cannot read") && e.contains("k.state"), "{e}");
}

#[test]
fn calibrations_that_cannot_be_are_refused() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let (texts, settings) = (texts(1), small(&engine));
    for bad in [
        Settings { tile: 0, ..settings.clone() },
        Settings { keys: 0, ..settings.clone() },
        Settings { permille: 1000, ..settings.clone() },
        Settings { keys: 119, ..settings.clone() },
        Settings { keys: usize::MAX, ..settings.clone() },
    ] {
        let e = run(&mut engine, &texts, &bad, None).unwrap_err();
        assert!(matches!(e, CalibrateError::BadOption(_)), "{bad:?}: {e}");
    }
    let s = run(&mut engine, &texts, &settings, None).unwrap();
    for anchors in [Some(0), Some(3)] {
        assert!(Calibration::new("m", &s, Choice { anchors, ..choice() }).is_err());
    }
    for share in [-0.1, 1.1, f64::NAN] {
        assert!(Calibration::new("m", &s, Choice { anchors: None, share, ..choice() }).is_err());
    }
    let none = Statistics::new(vec![0, 1], 2);
    assert!(Calibration::new("m", &none, choice()).is_err());
}

#[test]
fn a_calibration_names_an_anchor_and_a_head_for_every_layer() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let settings = small(&engine);
    let s = run(&mut engine, &texts(2), &settings, None).unwrap();
    let sim = s.similarity(Objective::Low).unwrap();
    let one = Calibration::new("m", &s, choice()).unwrap();
    assert_eq!((&one.anchors[..], &one.from[..]), (&[0][..], &[0, 0][..]));
    assert_eq!(one.head_maps, [vec![0, 1], sim.head_map(0, 1)]);
    assert_eq!(one.table.len(), 2);
    assert_eq!(one.table[1], (vec![0, 1], 1.0));
    assert!(one.table[0].1 > 0.5 && one.table[0].1 < 1.0, "{:?}", one.table);
    let all = Choice { anchors: None, share: 1.0, ..choice() };
    assert_eq!(Calibration::new("m", &s, all).unwrap().from, [0, 1]);
    // Attention turns the stream of this model, and weights are the columns' factors.
    assert!(one.importance.iter().all(|w| *w > 0.0 && *w < 1.0), "{:?}", one.importance);
    let weighed = Calibration::new("m", &s, Choice { weigh: true, ..choice() }).unwrap();
    let want = one.similarity[0][1] * one.importance[1];
    assert!((weighed.similarity[0][1] - want).abs() < 1e-12);
}

/// Written densely, whatever the engine's plan is.
#[test]
fn generated_tokens_are_part_of_the_statistics() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let prompts = small(&engine);
    let settings = Settings { generated: 9, ..prompts.clone() };
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("s.state");
    let want = run(&mut engine, &texts(3), &settings, None).unwrap();
    assert_ne!(want, run(&mut engine, &texts(3), &prompts, None).unwrap());
    run(&mut engine, &texts(2), &settings, Some(&state)).unwrap();
    assert_eq!(run(&mut engine, &texts(3), &settings, Some(&state)).unwrap(), want);
    let e = run(&mut engine, &texts(3), &prompts, Some(&state)).unwrap_err().to_string();
    assert!(e.contains("\n  generated: was 9, is 0\n"), "{e}");
    let dev = open("cpu").unwrap();
    let mut window =
        model.builder(&dev, &sparse(Variant::Window, 32)).chunk(32).sequences(1).build().unwrap();
    let plan = window.plan().clone();
    assert_eq!(run(&mut window, &texts(3), &settings, None).unwrap(), want);
    assert_eq!(*window.plan(), plan);
    // More than the context holds is refused, not cut.
    let settings = Settings { generated: CONTEXT, ..settings };
    assert!(run(&mut engine, &texts(1), &settings, None).is_err());
}

#[test]
fn a_calibrated_plan_loads_and_runs() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let settings = small(&engine);
    let s = run(&mut engine, &texts(2), &settings, None).unwrap();
    let c = engine.decoder().config().clone();
    let fingerprint = engine.fingerprint().to_string();
    let shape = c.plan_shape(&fingerprint);
    let found = Calibration::new(engine.fingerprint(), &s, choice()).unwrap();
    let plan = found.plan(&"kascade:budget=24".parse().unwrap(), &shape, CONTEXT).unwrap();
    let head_map = found.head_maps[1].clone();
    assert_eq!(plan.layers[0].role, Role::DenseAnchor);
    assert_eq!(plan.layers[1].role, Role::Reuse { from: 0, head_map, refine: None });
    let json = serde_json::to_vec(&plan).unwrap();
    engine.set_plan(serde_json::from_slice(&json).unwrap()).unwrap();
    assert_eq!(engine.greedy_tokens(&prompt(9, 60), 4).unwrap().len(), 4);
    // One list for all heads needs no map; a method without anchors no calibration; another model another one.
    let pooled = found.plan(&"kascade-pooled".parse().unwrap(), &shape, CONTEXT).unwrap();
    let head_map = vec![0, 0];
    assert_eq!(pooled.layers[1].role, Role::Reuse { from: 0, head_map, refine: None });
    let e = found.plan(&"sparcas".parse().unwrap(), &shape, CONTEXT).unwrap_err().to_string();
    assert!(e.contains("sparcas") && e.contains("share no lists"), "{e}");
    let other = Calibration::new("another", &s, choice()).unwrap();
    let e = other.plan(&"kascade".parse().unwrap(), &shape, CONTEXT).unwrap_err();
    assert!(matches!(e, SelectError::WrongModel { .. }), "{e}");
}

#[test]
fn the_program_calibrates_and_runs_the_plan() {
    let home = Home::new();
    let (model, words) = (home.model(), "It was a bright cold day in April. ".repeat(60));
    let text_file = home.file("a.txt", words.as_bytes());
    let (plan, report) = (text(&home.path("k.json")), text(&home.path("report.json")));
    let command = |more: &[&str]| -> Vec<String> {
        let base = ["calibrate", "-m", &model, "--device", "cpu", "--dtype", "f32", "--text"];
        let rest = [&text_file, "--tokens", "256", "--prompts", "3", "--keys", "16", "-o", &plan];
        [&base[..], &rest[..], more].concat().iter().map(ToString::to_string).collect()
    };
    fn words_of(command: &[String]) -> Vec<&str> {
        command.iter().map(String::as_str).collect()
    }
    let first = command(&["--anchors", "1", "--report", &report]);
    let done = home.run(&words_of(&first));
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.out.contains("1 anchors of 2 layers, from 3 pieces: 0"), "{}", done.out);
    assert!(home.path("k.json.state").exists() && home.path("report.json").exists());
    let read = || std::fs::read(home.path("k.json")).unwrap();
    let before = read();
    // Another choice from the same statistics, then the first again.
    let both = command(&["--anchors", "2", "--format", "json", "--objective", "min"]);
    assert_eq!(home.run(&words_of(&both)).json()["anchors"], serde_json::json!([0, 1]));
    assert_ne!(read(), before);
    home.run(&words_of(&first));
    assert_eq!(read(), before);
    let long = "A b c. ".repeat(60);
    let run = ["run", "-m", &model, "--device", "cpu", "-n", "3", "--plan", &plan, &long];
    assert_eq!(home.run(&run).code, Some(0));
    home.refused(&words_of(&command(&["--tile", "16"])), &["k.json.state", "tile: was 32, is 16"]);
    home.refused(&words_of(&command(&["--method", "window"])), &["window", "share no lists"]);
}

#[test]
fn weights_of_another_dtype_are_another_run() {
    let model = Model::new();
    let engine = cpu_engine(&model);
    let dev = open("cpu").unwrap();
    let half = model.builder(&dev, &dense()).dtype(DType::F16).build().unwrap();
    assert_ne!(Settings::of(&engine), Settings::of(&half));
}
