//! Training of Forecast matrices on the tiny random model: what it learns, what it writes, and that an interrupted run
//! ends like an uninterrupted one.

mod common;

use common::model::{Model, dense, prompt, sparse};
use common::program::{Home, text};
use longsight::backend::open;
use longsight::calibrate::CalibrateError;
use longsight::engine::{Engine, EngineError, LayerTrace, TraceParts, WantLogits};
use longsight::forecast::{
    Decay, Forecast, Grid, Schedule, Start, Teacher, TrainSettings, held_out, train,
};
use longsight::model::{LayerWeight, Weight};
use longsight::select::Variant;
use std::sync::atomic::{AtomicUsize, Ordering};

fn texts(n: u32) -> Vec<Vec<u32>> {
    (0..n).map(|seed| prompt(seed, 120)).collect()
}

fn cpu_engine(model: &Model) -> Engine {
    let dev = open("cpu").unwrap();
    model.builder(&dev, &dense()).chunk(32).sequences(1).build().unwrap()
}

const GRID: Grid = Grid { window: 8, stride: 4, block: 8, init: 1, local: 1, budget: 6 };

fn train_settings(engine: &Engine, texts: &[Vec<u32>]) -> TrainSettings {
    let mut s = TrainSettings { grid: GRID, ..TrainSettings::of(engine, texts) };
    s.optimizer.rate = 5e-3;
    s
}

#[test]
fn training_lowers_the_loss_and_finds_more_of_the_teachers_blocks() {
    [Model::new(), Model::nosa(2)].iter().for_each(trains);
}

fn trains(model: &Model) {
    let mut engine = cpu_engine(model);
    let all = texts(5);
    let (seen, unseen) = all.split_at(4);
    for (start, teacher) in [(Start::Uniform, Teacher::Fine), (Start::Queries, Teacher::Plain)] {
        let settings = TrainSettings { start, teacher, ..train_settings(&engine, seen) };
        let mut reports = Vec::new();
        let each = |r| reports.push(r);
        let (forecast, losses) =
            train(&mut engine, seen, 40, &settings, None, each, &|| true).unwrap();
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (first, last) = (mean(&losses[..4]), mean(&losses[36..]));
        assert!(last < 0.9 * first, "{start:?}: {first} to {last}");
        assert_eq!((reports.len(), reports[39].step, reports[39].loss), (40, 40, losses[39]));
        let before = Forecast::new(engine.checkpoint(), start, 0).unwrap();
        let matrices = (&forecast, &before);
        let found = held_out(&mut engine, unseen, matrices, GRID, teacher, 1, &|| true).unwrap();
        assert_eq!(found.len(), 2);
        for l in &found {
            assert!(l.samples > 50 && (l.teacher.recall - 1.0).abs() < 1e-9, "{l:?}");
            for s in [l.forecast, l.untrained, l.lookahead, l.own_query, l.previous, l.random] {
                assert!(
                    s.recall > 0.0 && s.recall <= 1.0 && s.mass > 0.0 && s.mass <= 1.0,
                    "{l:?}"
                );
            }
        }
        // The first layer has no layer before: its own queries, so the teacher's picks but for rounding.
        assert!(found[0].lookahead.recall > 0.99, "{:?}", found[0]);
        assert!(found[1].lookahead.recall < 0.99, "{:?}", found[1]);
        let recall =
            |f: fn(&longsight::forecast::LayerRecall) -> f64| -> f64 { found.iter().map(f).sum() };
        let (trained, random) = (recall(|l| l.forecast.recall), recall(|l| l.random.recall));
        assert!(trained > random, "{trained} {random}");
    }
}

#[test]
fn a_training_that_was_stopped_ends_like_one_that_was_not() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let texts = texts(3);
    let settings = TrainSettings { batch: 2, every: 3, ..train_settings(&engine, &texts) };
    let (whole, losses) = train(&mut engine, &texts, 5, &settings, None, |_| (), &|| true).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("f.state");
    let asked = AtomicUsize::new(0);
    // Stopped while the third step learns.
    let steps_done = AtomicUsize::new(0);
    let each = |r: longsight::forecast::StepReport| steps_done.store(r.step, Ordering::Relaxed);
    let go_on =
        || steps_done.load(Ordering::Relaxed) < 2 || asked.fetch_add(1, Ordering::Relaxed) < 6;
    let stopped = train(&mut engine, &texts, 5, &settings, Some(&state), each, &go_on);
    assert!(matches!(stopped, Err(CalibrateError::Engine(EngineError::Interrupted))));
    let mut steps = Vec::new();
    let each = |r: longsight::forecast::StepReport| steps.push(r.step);
    let (resumed, again) =
        train(&mut engine, &texts, 5, &settings, Some(&state), each, &|| true).unwrap();
    assert_eq!(steps, [3, 4, 5]);
    assert_eq!((resumed, again), (whole, losses));
    let other = TrainSettings { every: 2, ..settings };
    let e = train(&mut engine, &texts, 5, &other, Some(&state), |_| (), &|| true).unwrap_err();
    assert!(matches!(e, CalibrateError::OtherSettings { .. }), "{e}");
    assert!(e.to_string().contains("\n  every: was 3, is 2\n"), "{e}");
    assert_eq!(e.to_string().lines().count(), 3, "{e}");
}

/// Texts that are kept, partly or not at all: the same run, asked for less often where they are kept.
#[test]
fn what_is_kept_of_a_text_changes_nothing() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let texts = texts(3);
    let mut run = |memory: u64| {
        let settings =
            TrainSettings { batch: 2, every: 3, memory, ..train_settings(&engine, &texts) };
        let asked = AtomicUsize::new(0);
        let go_on = || asked.fetch_add(1, Ordering::Relaxed) < usize::MAX;
        let out = train(&mut engine, &texts, 8, &settings, None, |_| (), &go_on).unwrap();
        (out, asked.into_inner())
    };
    let (all, few) = run(u64::MAX);
    // A text of 120 tokens of which every third is learned from takes 100 KB and more.
    for memory in [0, 150_000] {
        let (anew, many) = run(memory);
        assert_eq!(anew, all, "{memory} bytes");
        assert!(many > few, "{memory} bytes: {many} {few}");
    }
}

#[test]
fn the_step_size_follows_its_schedule() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let texts = texts(2);
    let plain = train_settings(&engine, &texts);
    let run = |engine: &mut Engine, schedule: Schedule, rate: f32, steps: usize| {
        let mut settings = TrainSettings { schedule, ..plain.clone() };
        settings.optimizer.rate = rate;
        train(engine, &texts, steps, &settings, None, |_| (), &|| true)
    };
    let constant = Schedule::default();
    let warm = Schedule { warmup: 4, ..constant };
    // The first of four steps is as large as one of a quarter of the rate; without a warm-up it is not.
    let (first, _) = run(&mut engine, warm, 5e-3, 1).unwrap();
    assert_eq!(first, run(&mut engine, constant, 5e-3 / 4.0, 1).unwrap().0);
    assert_ne!(first, run(&mut engine, constant, 5e-3, 1).unwrap().0);
    // A cosine starts like a constant and is behind it at the end.
    let cosine = Schedule { decay: Decay::Cosine, steps: 6, ..constant };
    let of = |engine: &mut Engine, s: Schedule, steps| run(engine, s, 5e-3, steps).unwrap().0;
    assert_eq!(of(&mut engine, cosine, 1), of(&mut engine, constant, 1));
    assert_ne!(of(&mut engine, cosine, 6), of(&mut engine, constant, 6));
    let e = run(&mut engine, cosine, 5e-3, 7).unwrap_err().to_string();
    assert!(e.contains("after 6 steps"), "{e}");
}

#[test]
fn forecasts_are_saved_under_the_published_names() {
    let model = Model::new();
    let engine = cpu_engine(&model);
    let c = engine.decoder().config();
    let forecast = Forecast::new(engine.checkpoint(), Start::Uniform, 3).unwrap();
    assert_ne!(forecast, Forecast::new(engine.checkpoint(), Start::Uniform, 4).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("forecast.safetensors");
    let grid = serde_json::to_string(&GRID).unwrap();
    forecast.save(&path, c, engine.fingerprint(), &[("grid", grid)]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let attention = "model.layers.0.self_attn";
    let future = format!("{attention}.q_future_proj.weight");
    assert_eq!(names, [&format!("{attention}.q_curr_proj.weight"), &future]);
    assert_eq!(file.tensor(&future).unwrap().shape(), [2 * 16, 64]);
    let saved = longsight::model::Forecast::open(&path, c, engine.fingerprint()).unwrap();
    let matrices = (0..c.n_layers).map(|l| saved.matrix(l).unwrap()).collect();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let grid: Grid = serde_json::from_str(&header.metadata().as_ref().unwrap()["grid"]).unwrap();
    assert_eq!((Forecast { matrices }, grid), (forecast, GRID));
    let open = |path, model| longsight::model::Forecast::open(path, c, model);
    let e = open(&path, "another").unwrap_err().to_string();
    assert!(e.contains("another"), "{e}");
    assert!(open(&dir.path().join("none"), "x").is_err());
}

#[test]
fn the_program_trains_and_goes_on() {
    let home = Home::new();
    let (model, words) = (home.model(), "It was a bright cold day in April. ".repeat(60));
    let text_file = home.file("a.txt", words.as_bytes());
    let (a, b) = (text(&home.path("a.safetensors")), text(&home.path("b.safetensors")));
    let command = |output: &str, steps: &str| -> Vec<String> {
        let base = ["train-forecast", "-m", &model, "--device", "cpu", "--dtype", "f32", "--text"];
        let sizes = ["--tokens", "400", "--pieces", "2", "--blocks", "4", "--local-blocks", "1"];
        let rest = ["--every", "4", "--steps", steps, "--format", "json", "-o", output];
        [&base[..], &[&text_file], &sizes, &rest].concat().iter().map(ToString::to_string).collect()
    };
    let run = |output: &str, steps: &str| {
        let command = command(output, steps);
        home.run(&command.iter().map(String::as_str).collect::<Vec<_>>()).json()
    };
    let whole = run(&a, "4");
    assert_eq!(whole["losses"].as_array().unwrap().len(), 4);
    assert_eq!(whole["layers"].as_array().unwrap().len(), 2);
    run(&b, "1");
    assert_eq!(run(&b, "4"), whole);
    let arrays = |path: &str| {
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<_> =
            file.tensors().into_iter().map(|(n, t)| (n, t.data().to_vec())).collect();
        all.sort();
        all
    };
    assert_eq!(arrays(&a), arrays(&b));
    let mut other = command(&b, "4");
    other.extend(["--rate", "0.1"].map(String::from));
    let other: Vec<&str> = other.iter().map(String::as_str).collect();
    home.refused(&other, &["b.safetensors.state", "0.1"]);
}

/// What the next layer would ask if this layer did nothing: then the forecast is exact.
#[test]
fn a_start_from_queries_is_the_mean_query_of_the_layer_itself() {
    let model = Model::new();
    let mut engine = cpu_engine(&model);
    let tokens = prompt(4, 20);
    let forecast = Forecast::new(engine.checkpoint(), Start::Queries, 0).unwrap();
    let parts = TraceParts { residual: true, normed: true, heads: true };
    let mut layers: Vec<LayerTrace> = Vec::new();
    engine.trace(&tokens, parts, |l| layers.push(l), |_| true).unwrap();
    let c = engine.decoder().config();
    // Position 0 is not rotated: the projection itself shows.
    let x = &layers[0].normed[..c.hidden];
    for (r, row) in forecast.matrices[0].chunks_exact(c.hidden).enumerate() {
        let (head, dim) = (r / c.head_dim, r % c.head_dim);
        let got: f32 = row.iter().zip(x).map(|(w, x)| w * x).sum();
        let q = |g: usize| layers[0].q[(head * 2 + g) * c.head_dim + dim];
        assert!((got - (q(0) + q(1)) / 2.0).abs() < 1e-4);
    }
    // Layer 1 reads another stream than layer 0: by hand from layer 0's stream and layer 1's norm and projection.
    let stream = &layers[0].x[..c.hidden];
    let mean = stream.iter().map(|x| x * x).sum::<f32>() / c.hidden as f32;
    let norm = engine.checkpoint().read(Weight::Layer(1, LayerWeight::AttnNorm)).unwrap();
    let rms = (mean + c.norm_eps as f32).sqrt();
    let input: Vec<f32> = stream.iter().zip(&norm).map(|(x, n)| x / rms * n).collect();
    let w = engine.checkpoint().read(Weight::Layer(1, LayerWeight::Q)).unwrap();
    let q = |i: usize| -> f32 {
        w[i * c.hidden..][..c.hidden].iter().zip(&input).map(|(w, x)| w * x).sum()
    };
    for (r, row) in forecast.matrices[1].chunks_exact(c.hidden).enumerate() {
        let (head, dim) = (r / c.head_dim, r % c.head_dim);
        let got: f32 = row.iter().zip(x).map(|(w, x)| w * x).sum();
        let first = head * 2 * c.head_dim + dim;
        assert!((got - (q(first) + q(first + c.head_dim)) / 2.0).abs() < 1e-3);
    }
}

/// The lookahead that needs no file decides like a file of matrices before training.
#[test]
fn sparda_runs_without_training() {
    let model = Model::new();
    let dev = open("cpu").unwrap();
    let text = prompt(21, 200);
    let builder = || model.builder(&dev, &sparse(Variant::Sparda, 128)).forecast(None);
    let mut engine = builder().lookahead(true).build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f.safetensors");
    let untrained = Forecast::new(engine.checkpoint(), Start::Queries, 0).unwrap();
    untrained.save(&path, engine.decoder().config(), engine.fingerprint(), &[]).unwrap();
    let mut from_file = builder().forecast(path).build().unwrap();
    let mut random = builder().forecast(model.forecast()).build().unwrap();
    let logits = |engine: &mut Engine| {
        let seq = engine.open_sequence().unwrap();
        let mut out = Vec::new();
        let last = |_: usize, l: &[f32]| out = l.to_vec();
        engine.prefill(seq, &text, WantLogits::Last, last, |_| true).unwrap();
        engine.decode(seq, 7).unwrap()
    };
    let want = logits(&mut from_file);
    assert_eq!(logits(&mut engine), want);
    assert_ne!(logits(&mut random), want);
}
