//! Methods that choose blocks of tokens (Quest, ArkVale, InfLLM-V2, SparDA), op by op and in a whole tiny model, on
//! every backend under test: the lists of their selectors are those of the formulas, written out here once more.

mod common;

use common::cache::{Data, Heads, Layer, backends};
use common::forecast;
use common::model::{CONTEXT, Model, dense, prompt, sparse};
use common::select::{mean_queries, select, summaries};
use longsight::backend::reference::floats;
use longsight::backend::{DType, HeadPool, ScoreSummaries, Summaries, SummaryKind};
use longsight::engine::{Engine, EngineError, WantLogits};
use longsight::model::{Checkpoint, ModelError};
use longsight::select::{MethodSpec, SelectError, Variant};
use std::ops::Range;

const HEADS: Heads = Heads { query: 6, kv: 2, dim: 32 };
/// Lengths around the edges of windows, pages and blocks.
const LENGTHS: [usize; 11] = [66, 79, 80, 127, 128, 129, 191, 192, 193, 320, 333];

fn spec(variant: Variant, budget: usize) -> MethodSpec {
    MethodSpec {
        budget: Some(budget),
        dense_layers: Some(0),
        dense_below: Some(0),
        ..variant.into()
    }
}

/// Dimension `i` of the keys of `tokens` for a KV head.
fn column(data: &Data, head: usize, tokens: Range<usize>, i: usize) -> Vec<f64> {
    data.k[tokens].iter().map(|k| f64::from(k[head * HEADS.dim + i])).collect()
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// The box of a page: its bounds, or its cuboid of means.
fn page_box(column: &[f64], cuboid: bool) -> (f64, f64) {
    let lo = column.iter().copied().fold(f64::INFINITY, f64::min);
    let hi = column.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !cuboid {
        return (lo, hi);
    }
    let centre = (lo + hi) / 2.0;
    let r = mean(&column.iter().map(|k| (k - centre).abs()).collect::<Vec<_>>());
    (centre - r, centre + r)
}

/// Score of a page for one query head.
fn page_score(data: &Data, h: usize, tokens: Range<usize>, cuboid: bool) -> f64 {
    let dim = |i: usize| {
        let q = f64::from(data.q[h * HEADS.dim + i]);
        let (lo, hi) = page_box(&column(data, h / HEADS.group(), tokens.clone(), i), cuboid);
        (q * lo).max(q * hi)
    };
    (0..HEADS.dim).map(dim).sum::<f64>() / (HEADS.dim as f64).sqrt()
}

/// Logits of a vector against the complete windows of 32 keys every 16.
fn window_logits(data: &Data, head: usize, q: &[f32]) -> Vec<f64> {
    let n = data.k.len();
    let windows = if n < 32 { 0 } else { (n - 32) / 16 + 1 };
    let logit = |j: usize| -> f64 {
        let dim = |(i, q): (usize, &f32)| {
            f64::from(*q) * mean(&column(data, head, 16 * j..16 * j + 32, i))
        };
        q.iter().enumerate().map(dim).sum()
    };
    (0..windows).map(logit).collect()
}

/// Block scores of a KV head: InfLLM-V2's, or those of the mean query as a Forecast.
fn block_scores(data: &Data, head: usize, forecast: bool) -> Vec<f64> {
    let d = HEADS.dim;
    let mut windows = if forecast {
        let q = mean_queries(&data.q, HEADS.kv, d);
        window_logits(data, head, &q[head * d..][..d])
    } else {
        Vec::new()
    };
    for h in (head * HEADS.group()..(head + 1) * HEADS.group()).filter(|_| !forecast) {
        let logits = window_logits(data, head, &data.q[h * d..][..d]);
        let p: Vec<f64> = logits.iter().map(|s| (s / (d as f64).sqrt()).exp()).collect();
        windows.resize(p.len(), 0.0);
        let sum: f64 = p.iter().sum();
        windows.iter_mut().zip(p).for_each(|(w, p)| *w += p / sum);
    }
    let block = |b: usize| {
        let around = (4 * b).saturating_sub(1)..(4 * b + 4).min(windows.len());
        around.map(|j| windows[j]).fold(f64::NEG_INFINITY, f64::max)
    };
    (0..data.k.len().div_ceil(64)).map(block).collect()
}

/// Tokens of the best `k` blocks, those of `forced` first.
fn tokens(scores: &[f64], forced: &[usize], k: usize, unit: usize, n: usize) -> Vec<u32> {
    let score = |b: &usize| if forced.contains(b) { f64::INFINITY } else { scores[*b] };
    let mut order: Vec<usize> =
        (0..scores.len()).filter(|b| score(b) != f64::NEG_INFINITY).collect();
    order.sort_by(|a, b| score(b).total_cmp(&score(a)));
    order.truncate(k);
    order.sort_unstable();
    order.iter().flat_map(|b| b * unit..((b + 1) * unit).min(n)).map(|j| j as u32).collect()
}

#[test]
fn pages_are_those_with_the_highest_boxes() {
    for n in LENGTHS {
        let data = Data::random(n as u64, HEADS, n);
        for (variant, page, pool) in [
            (Variant::Quest, 16, HeadPool::SumLogit),
            (Variant::Quest, 16, HeadPool::None),
            (Variant::Quest, 64, HeadPool::SumLogit),
            (Variant::Arkvale, 16, HeadPool::SumLogit),
            (Variant::Arkvale, 32, HeadPool::None),
        ] {
            let pages = 1.max(64 / page);
            let spec = MethodSpec {
                unit: Some(page),
                pool: Some(pool),
                sinks: Some(0),
                recent: Some(0),
                ..spec(variant, pages * page)
            };
            let cuboid = variant == Variant::Arkvale;
            let rows = if pool == HeadPool::None { HEADS.query } else { HEADS.kv };
            let list = |row: usize| {
                let heads = row * HEADS.query / rows..(row + 1) * HEADS.query / rows;
                let score = |p: usize| -> f64 {
                    let range = p * page..((p + 1) * page).min(n);
                    heads.clone().map(|h| page_score(&data, h, range.clone(), cuboid)).sum()
                };
                let scores: Vec<f64> = (0..n.div_ceil(page)).map(score).collect();
                tokens(&scores, &[], pages, page, n)
            };
            let want: Vec<Vec<u32>> = (0..rows).map(list).collect();
            for dev in backends() {
                let l = Layer::filled(&dev, &data, 16);
                let got = select(&l, &data.q, &spec).lists;
                assert_eq!(got, want, "{variant:?} {page} {pool:?}, {n} tokens on {}", dev.name());
            }
        }
    }
}

#[test]
fn blocks_are_those_with_the_highest_windows() {
    for n in LENGTHS {
        let data = Data::random(1000 + n as u64, HEADS, n);
        let last = (n - 1) / 64;
        for variant in [Variant::Infllm2, Variant::Sparda] {
            // Blocks of the budget; sinks and recent tokens, and the blocks that they force.
            for (k, sinks, recent, forced) in [
                (1, 0, 1, vec![last]),
                (2, 0, 1, vec![last]),
                (3, 64, 65, vec![0, last, last.saturating_sub(1)]),
                (4, 1, 65, vec![0, last, last.saturating_sub(1)]),
                (96, 64, 2049, (0..=last).collect()),
            ] {
                let spec = MethodSpec {
                    sinks: Some(sinks),
                    recent: Some(recent),
                    ..spec(variant, 64 * k)
                };
                let list = |head| {
                    let scores = block_scores(&data, head, variant == Variant::Sparda);
                    tokens(&scores, &forced, k, 64, n)
                };
                let want: Vec<Vec<u32>> = (0..HEADS.kv).map(list).collect();
                for dev in backends() {
                    let l = Layer::filled(&dev, &data, 32);
                    let got = select(&l, &data.q, &spec).lists;
                    let what = format!("{variant:?}, {k} blocks of {n} tokens on {}", dev.name());
                    assert_eq!(got, want, "{what}");
                }
            }
        }
    }
}

/// Quest's score is never below the largest logit of the page; ArkVale's may be.
#[test]
fn bounds_are_at_least_the_largest_logit() {
    let n = 203;
    for seed in 0..5 {
        let data = Data::random(seed, HEADS, n);
        for page in [16, 32, 64] {
            for dev in backends() {
                let l = Layer::filled(&dev, &data, 32);
                let kind = SummaryKind::Bounds { page };
                let kept = summaries(&l, n, kind);
                let stride = kind.count(n);
                let scores = l.alloc(DType::F32, HEADS.query * stride);
                let p = ScoreSummaries {
                    q: &l.q,
                    seqs: l.seqs(),
                    summaries: Summaries { data: &kept, kind },
                    n_pages: l.pool().n_pages,
                    heads: HEADS.query,
                    kv_heads: HEADS.kv,
                    head_dim: HEADS.dim,
                    from: 0,
                    dims: HEADS.dim,
                    scale: 1.0 / (HEADS.dim as f32).sqrt(),
                    scores: &scores,
                    stride,
                };
                dev.score_summaries(&p).unwrap();
                let scores = floats(&*dev, &scores).unwrap();
                for h in 0..HEADS.query {
                    for (g, logits) in data.logits(h).chunks(page).enumerate() {
                        let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let score = scores[h * stride + g];
                        assert!(score >= best - 1e-5, "{score} for a page with {best}");
                    }
                }
            }
        }
    }
}

/// Logits of a prompt's last token and of the decode steps after it.
fn logits(engine: &mut Engine, text: &[u32], steps: usize) -> Vec<f32> {
    let seq = engine.open_sequence().unwrap();
    let mut all = Vec::new();
    let each = |_: usize, l: &[f32]| all.extend_from_slice(l);
    let (prompt, rest) = text.split_at(text.len() - steps);
    engine.prefill(seq, prompt, WantLogits::Last, each, |_| true).unwrap();
    for token in rest {
        all.extend(engine.decode(seq, *token).unwrap());
    }
    engine.close(seq);
    all
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// The projections follow the order of the keys that they meet.
#[test]
fn the_order_of_keys_leaves_block_methods_alone() {
    let model = Model::new();
    let text = prompt(31, 220);
    for dev in backends() {
        for variant in [Variant::Sparda, Variant::Infllm2, Variant::Quest] {
            let spec = sparse(variant, 80);
            let dir = tempfile::tempdir().unwrap();
            let mut plain = model.engine(&dev, &spec);
            let sorted = model.builder(&dev, &spec).calibrate(true).key_order_dir(dir.path());
            let sorted = sorted.summaries_for(&[sparse(Variant::Sparcas, 80)]);
            // Once measured by this engine, once read from the file.
            for mut sorted in [sorted.build().unwrap(), {
                let again = model.builder(&dev, &spec).calibrate(true).key_order_dir(dir.path());
                again.summaries_for(&[sparse(Variant::Sparcas, 80)]).build().unwrap()
            }] {
                let order = |e: &Engine| e.decoder().key_order().pairs.clone();
                assert_ne!(order(&sorted), order(&plain), "nothing was sorted");
                let (a, b) = (logits(&mut plain, &text, 40), logits(&mut sorted, &text, 40));
                let off = worst(&a, &b);
                assert!(off <= 1e-4, "{variant:?} on {}: {off}", dev.name());
            }
            // The comparison can fail: what is left out matters.
            let all = logits(&mut model.engine(&dev, &dense()), &text, 40);
            assert!(worst(&logits(&mut plain, &text, 40), &all) > 1e-3, "{variant:?}");
        }
    }
}

/// Shared and copied pages, and texts that were cut, bring the right summaries along.
#[test]
fn forks_and_reused_texts_decode_like_fresh_ones() {
    let model = Model::new();
    let text = prompt(32, 230);
    for dev in backends() {
        for variant in [Variant::Quest, Variant::Arkvale, Variant::Infllm2, Variant::Sparda] {
            let mut engine = model.engine(&dev, &sparse(variant, 80));
            let want = logits(&mut engine, &text, 60);
            let origin = engine.open_sequence().unwrap();
            // Ends inside a page, a window and a run of 16.
            engine.prefill(origin, &text[..170], WantLogits::None, |_, _| (), |_| true).unwrap();
            let fork = engine.fork(origin).unwrap();
            // The origin goes on with another text in what was the shared page.
            for token in prompt(33, 20) {
                engine.decode(origin, token).unwrap();
            }
            let vocab = want.len() / 61;
            for (i, token) in text[170..].iter().enumerate() {
                let got = engine.decode(fork, *token).unwrap();
                let want = &want[(i + 1) * vocab..][..vocab];
                assert_eq!(got, want, "{variant:?} on {}, step {i}", dev.name());
            }
        }
    }
}

#[test]
fn sparda_without_a_forecast_is_refused() {
    let model = Model::new();
    let dev = longsight::backend::open("cpu").unwrap();
    let spec = sparse(Variant::Sparda, 80);
    let said = model.builder(&dev, &spec).forecast(None).build().unwrap_err().to_string();
    assert!(said.contains("--forecast") && said.contains("longsight train-forecast"), "{said}");
    // Neither can a running engine switch to it.
    let builder = model.builder(&dev, &sparse(Variant::Infllm2, 80)).forecast(None);
    let mut engine = builder.build().unwrap();
    let c = engine.decoder().config();
    let plan = spec.plan(&c.plan_shape(engine.fingerprint()), CONTEXT).unwrap();
    let e = engine.set_plan(plan).unwrap_err();
    assert!(matches!(e, EngineError::Select(SelectError::NoForecast { .. })), "{e}");
    assert_eq!(engine.plan().method, "infllm2", "a refused plan changes nothing");
}

#[test]
fn forecasts_of_other_models_and_damaged_ones_are_refused() {
    let model = Model::new();
    let dev = longsight::backend::open("cpu").unwrap();
    let checkpoint = Checkpoint::open(&model.path()).unwrap();
    let (c, own) = (checkpoint.config(), checkpoint.fingerprint());
    let (shape, all) = (forecast::shape(c), forecast::random(c, 1));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f.safetensors");
    let build = || {
        let builder = model.builder(&dev, &sparse(Variant::Sparda, 80)).forecast(path.clone());
        match builder.build() {
            Ok(_) => None,
            Err(EngineError::Model(e)) => Some(e),
            Err(e) => panic!("{e}"),
        }
    };
    assert!(matches!(build(), Some(ModelError::NoForecast { .. })));
    forecast::write(&path, shape, Some("0123456789abcdef"), &all);
    let e = build().expect("another model's");
    let said = e.to_string();
    assert!(matches!(e, ModelError::WrongForecast { .. }) && said.contains(&own), "{said}");
    assert!(said.contains("0123456789abcdef") && said.contains("train-forecast"), "{said}");
    // Published files name no model; their sizes must do.
    for model in [None, Some(&*own)] {
        forecast::write(&path, shape, model, &all);
        assert!(build().is_none());
    }
    forecast::write(&path, [shape[1], shape[0]], Some(&own), &all);
    assert!(matches!(build(), Some(ModelError::ShapeMismatch { .. })));
    for missing in [0, 1] {
        let mut some = all.clone();
        let (name, _) = some.remove(missing);
        forecast::write(&path, shape, Some(&own), &some);
        match build() {
            Some(ModelError::MissingTensor { name: n, .. }) => assert_eq!(n, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    // The last layer's projection has no use.
    forecast::write(&path, shape, Some(&own), &all[..all.len() - 1].to_vec());
    assert!(build().is_none());
    let bytes = std::fs::read(&path).unwrap();
    for cut in [4, 40, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        assert!(build().is_some(), "{cut} bytes");
    }
}

/// Two matrices that differ give other answers: the weights of the file are used, for the layers they are for.
#[test]
fn every_matrix_of_a_forecast_decides() {
    let model = Model::new();
    let dev = longsight::backend::open("cpu").unwrap();
    let checkpoint = Checkpoint::open(&model.path()).unwrap();
    let (c, text) = (checkpoint.config(), prompt(34, 240));
    let dir = tempfile::tempdir().unwrap();
    let run = |matrices: &forecast::Matrices| {
        let path = dir.path().join("f.safetensors");
        forecast::write(&path, forecast::shape(c), None, matrices);
        let builder = model.builder(&dev, &sparse(Variant::Sparda, 128)).forecast(path);
        logits(&mut builder.build().unwrap(), &text, 40)
    };
    let all = forecast::random(c, 5);
    let want = run(&all);
    assert_eq!(run(&all), want);
    for (i, differs) in [(0, true), (1, true), (2, false)] {
        let mut changed = all.clone();
        changed[i].1.iter_mut().for_each(|x| *x = -*x);
        assert_eq!(run(&changed) != want, differs, "{}", all[i].0);
    }
}
