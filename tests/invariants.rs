//! Invariants of the methods that no other test states, on every backend under test, and the page that lists all of
//! them: docs/invariants.md names a test for each, and each test that it names is in the tree.

mod common;

use common::cache::{Data, Heads, Layer, Picked, Rule, backends, upload};
use common::model::{Model, prompt};
use common::pick::{best, softmax};
use common::select::{attend, select};
use longsight::backend::reference::{floats, words};
use longsight::backend::{
    AttendDense, DType, HeadPool, LogitScale, META_WORDS, Meta, ScoreSource, ScoreTiles, Seqs,
    Tensor, open,
};
use longsight::engine::{LayerTrace, TraceParts, WantLogits};
use longsight::forecast::{Forecast, Start};
use longsight::kv::{KvCache, KvShape};
use longsight::select::{METHODS, MethodInfo, MethodSpec, Variant};
use std::path::Path;

const HEADS: Heads = Heads { query: 6, kv: 2, dim: 32 };
const TOKENS: usize = 203;

fn spec(variant: Variant, budget: usize) -> MethodSpec {
    MethodSpec {
        budget: Some(budget),
        dims: Some(8),
        dense_layers: Some(0),
        dense_below: Some(0),
        ..variant.into()
    }
}

fn sparse_methods() -> impl Iterator<Item = &'static MethodInfo> {
    METHODS.iter().filter(|m| m.variant != Variant::Dense)
}

fn assert_close(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() < 1e-5, "{what}: element {i} is {g} instead of {w}");
    }
}

/// Kascade, decode: what the query heads of a list give to all keys sums to their number.
#[test]
fn pooled_probabilities_of_a_decode_step_sum_to_the_heads() {
    let data = Data::random(1, HEADS, TOKENS);
    for dev in backends() {
        let l = Layer::filled(&dev, &data, HEADS.dim);
        for (pool, heads) in
            [(HeadPool::MeanSoftmax, HEADS.group()), (HeadPool::AllSoftmax, HEADS.query)]
        {
            let rule = Rule { pool, scale: LogitScale::InvSqrtDim, k: 1, forced: None };
            let logs = l.scores(ScoreSource::Lead { n: HEADS.dim }, rule);
            let logs = floats(&*dev, &logs).unwrap();
            for row in logs.chunks_exact(l.capacity) {
                let sum: f64 = row[..TOKENS].iter().map(|log| log.exp()).sum();
                assert!((sum - heads as f64).abs() < 1e-4, "{pool:?} on {}: {sum}", dev.name());
            }
        }
    }
}

/// A sequence's last `rows` tokens as the rows of one step.
fn tile<'a>(l: &'a Layer, meta: &'a Tensor, rows: usize, kv_len: usize) -> Seqs<'a> {
    let mut record = [0u32; META_WORDS];
    record[Meta::Q_LEN] = rows as u32;
    record[Meta::KV_LEN] = kv_len as u32;
    l.dev.upload(meta, bytemuck::cast_slice(&record)).unwrap();
    Seqs { meta, pages: l.seqs().pages, n: 1, max_kv: kv_len, max_q: rows, rows, settled: false }
}

/// Kascade, prompts: what a tile gives to earlier keys and to its own sums to its tokens times the heads of a list.
#[test]
fn the_mass_of_a_tile_and_its_own_keys_sum_to_its_rows() {
    let data = Data::random(2, HEADS, TOKENS);
    let scale = 1.0 / (HEADS.dim as f32).sqrt();
    for dev in backends() {
        let l = Layer::filled(&dev, &data, HEADS.dim);
        let meta = l.alloc(DType::U32, META_WORDS);
        // A whole tile, the first one, and one that the prompt ends in.
        for (rows, kv_len) in [(32, 160), (32, 32), (11, TOKENS)] {
            let numbers = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 40.0;
            let width = HEADS.query * HEADS.dim;
            let q = upload(&*dev, &(0..rows * width).map(numbers).collect::<Vec<_>>());
            let (out, lse) =
                (l.alloc(DType::F32, rows * width), l.alloc(DType::F32, rows * HEADS.query));
            let seqs = tile(&l, &meta, rows, kv_len);
            dev.attend_dense(&AttendDense {
                q: &q,
                seqs,
                cache: l.pool(),
                heads: HEADS.query,
                scale,
                window: None,
                splits: 1,
                out: &out,
                lse: Some(&lse),
                values: true,
                logits: None,
            })
            .unwrap();
            for (pool, lists) in [(HeadPool::MeanSoftmax, HEADS.kv), (HeadPool::AllSoftmax, 1)] {
                let scores = l.alloc(DType::F32, lists * l.capacity);
                dev.score_tiles(&ScoreTiles {
                    q: &q,
                    lse: &lse,
                    seqs,
                    cache: l.pool(),
                    heads: HEADS.query,
                    scale,
                    pool,
                    scores: &scores,
                    stride: l.capacity,
                })
                .unwrap();
                let want = (rows * HEADS.query / lists) as f64;
                for row in floats(&*dev, &scores).unwrap().chunks_exact(l.capacity) {
                    let (earlier, own) = row[..kv_len].split_at(kv_len - rows);
                    let [earlier, own] = [earlier, own].map(|x| x.iter().sum::<f64>());
                    let what = format!("{pool:?}, {rows} of {kv_len} on {}", dev.name());
                    assert!((earlier + own - want).abs() < 1e-3, "{what}: {earlier} and {own}");
                    // The first row of a tile sees one of its own keys at least, all rows of the first only those.
                    assert!(own > 0.0 && (earlier > 0.0) == (rows < kv_len), "{what}");
                }
            }
        }
    }
}

/// Dense attention in f64 with all tokens masked that are not on the head's list.
fn masked(data: &Data, lists: &[Vec<u32>]) -> Vec<f64> {
    let d = HEADS.dim;
    let of_head = |h: usize| -> Vec<f64> {
        let list = &lists[h * lists.len() / HEADS.query];
        let mut logits = data.logits(h);
        for (j, s) in logits.iter_mut().enumerate() {
            if !list.contains(&(j as u32)) {
                *s = f64::NEG_INFINITY;
            }
        }
        let p = softmax(&logits);
        let at = h / HEADS.group() * d;
        let dim = |i: usize| p.iter().zip(&data.v).map(|(p, v)| p * f64::from(v[at + i])).sum();
        (0..d).map(dim).collect()
    };
    (0..HEADS.query).flat_map(of_head).collect()
}

/// Whatever chooses: no token twice, none behind the end, and the output is that of dense attention under a mask.
#[test]
fn attention_over_a_list_is_dense_attention_under_a_mask() {
    for n in [150, 192, TOKENS] {
        let data = Data::random(n as u64, HEADS, n);
        for dev in backends() {
            let l = Layer::filled(&dev, &data, HEADS.dim);
            let dense = l.attend_dense();
            for m in sparse_methods() {
                let what = format!("{}, {n} tokens on {}", m.name, dev.name());
                let picked = select(&l, &data.q, &spec(m.variant, 80));
                for list in &picked.lists {
                    assert!(list.is_sorted_by(|a, b| a < b), "{what}: {list:?}");
                    assert!(list.iter().all(|j| (*j as usize) < n), "{what}: {list:?}");
                }
                let got = l.attend(&picked);
                assert_close(&got, &masked(&data, &picked.lists), &what);
                assert!(got.iter().zip(&dense).any(|(a, b)| (a - b).abs() > 1e-3), "{what}");
            }
        }
    }
}

/// A list is a set: its order is nothing that attention may depend on.
#[test]
fn the_order_of_a_list_leaves_attention_alone() {
    let data = Data::random(3, HEADS, TOKENS);
    for dev in backends() {
        let l = Layer::filled(&dev, &data, HEADS.dim);
        let mut picked = select(&l, &data.q, &spec(Variant::Oracle, 80));
        let want = l.attend(&picked);
        let mut all = words(&*dev, &picked.indices).unwrap();
        for (list, tokens) in all.chunks_exact_mut(picked.k).zip(&picked.lists) {
            let n = tokens.len();
            // 7 has no factor in common with 80.
            (0..n).for_each(|i| list[i] = tokens[(i * 7 + 3) % n]);
            assert!(!list[..n].is_sorted());
        }
        dev.upload(&picked.indices, bytemuck::cast_slice(&all)).unwrap();
        let Picked { indices, counts, k, .. } = picked;
        picked = Picked::read(&*dev, indices, counts, k);
        assert_close(&l.attend(&picked), &want, dev.name());
    }
}

/// SparQ's correction: a list of all tokens has the whole of the attention, and nothing is left to stand for.
#[test]
fn the_mean_value_of_nothing_changes_nothing() {
    let data = Data::random(4, HEADS, TOKENS);
    for dev in backends() {
        let l = Layer::filled(&dev, &data, HEADS.dim);
        let run = |budget: usize, correct: bool| {
            let spec = MethodSpec { correct: Some(correct), ..spec(Variant::Sparq, budget) };
            attend(&l, &data.q, &spec).1
        };
        assert_close(&run(256, true), &run(256, false), dev.name());
        let (with, without) = (run(80, true), run(80, false));
        let far = with.iter().zip(&without).any(|(a, b)| (a - b).abs() > 1e-2);
        assert!(far, "{}: 80 of {TOKENS} tokens have no correction either", dev.name());
    }
}

/// SparDA's pool mapping, written out: block `b` takes the best of windows `4b - 1` to `4b + 3` of complete windows.
fn forecast_blocks(
    f: &[f32],
    keys: &[f32],
    (head, kv_heads, d): (usize, usize, usize),
) -> Vec<f64> {
    let n = keys.len() / (kv_heads * d);
    let key = |j: usize, i: usize| f64::from(keys[(j * kv_heads + head) * d + i]);
    let window = |j: usize| -> f64 {
        let mean = |i: usize| (16 * j..16 * j + 32).map(|t| key(t, i)).sum::<f64>() / 32.0;
        f.iter().enumerate().map(|(i, f)| f64::from(*f) * mean(i)).sum()
    };
    let windows: Vec<f64> = (0..(n - 32) / 16 + 1).map(window).collect();
    let of_block = |b: usize| {
        let range = (4 * b).saturating_sub(1)..(4 * b + 4).min(windows.len());
        windows[range].iter().copied().fold(f64::NEG_INFINITY, f64::max)
    };
    (0..n.div_ceil(64)).map(of_block).collect()
}

/// The definition of a Forecast, in a running model: the matrix times the normed input, rotated at the query's position.
/// Layer 0's is checked with the mean of its own queries as the matrix, which the trace shows.
#[test]
fn a_forecast_is_the_rotated_product_with_the_normed_input() {
    let model = Model::new();
    for dev in backends() {
        let spec = MethodSpec {
            sinks: Some(0),
            recent: Some(1),
            budget: Some(128),
            dense_layers: Some(0),
            dense_below: Some(0),
            ..Variant::Sparda.into()
        };
        let mut engine = model.builder(&dev, &spec).forecast(None).lookahead(true).build().unwrap();
        let untrained = Forecast::new(engine.checkpoint(), Start::Queries, 0).unwrap();
        let c = engine.decoder().config().clone();
        let (d, kv) = (c.head_dim, c.n_kv_heads);
        let inv_freq = c.inv_freq();
        for n in [192, 193, 224, 240] {
            let text = prompt(21, n);
            let mut layers = vec![LayerTrace::default(); c.n_layers];
            let parts = TraceParts { normed: true, heads: true, residual: false };
            let each = |l: LayerTrace| {
                let to = &mut layers[l.layer];
                to.normed.extend(l.normed);
                to.k.extend(l.k);
            };
            engine.trace(&text, parts, each, |_| true).unwrap();
            let seq = engine.open_sequence().unwrap();
            let (last, before) = text.split_last().unwrap();
            engine.prefill(seq, before, WantLogits::None, |_, _| (), |_| true).unwrap();
            engine.set_probe(true);
            engine.decode(seq, *last).unwrap();
            let probes = engine.take_probes();
            engine.set_probe(false);
            engine.close(seq);
            assert_eq!(probes.len(), c.n_layers, "{}", dev.name());
            let position = n as usize - 1;
            for (target, probe) in probes.iter().enumerate() {
                let source = &layers[target.saturating_sub(1)].normed;
                let x = &source[position * c.hidden..][..c.hidden];
                for head in 0..kv {
                    let rows = untrained.matrices[target][head * d * c.hidden..].chunks(c.hidden);
                    let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
                    let mut f: Vec<f32> = rows.take(d).map(dot).collect();
                    for (i, freq) in inv_freq.iter().enumerate() {
                        let (sin, cos) = (position as f32 * freq).sin_cos();
                        let (a, b) = (f[i], f[i + d / 2]);
                        (f[i], f[i + d / 2]) = (a * cos - b * sin, b * cos + a * sin);
                    }
                    let scores = forecast_blocks(&f, &layers[target].k, (head, kv, d));
                    let own = position / 64;
                    let blocks = best(&scores, 2, |b| b == own);
                    let tokens = blocks.iter().flat_map(|b| b * 64..((b + 1) * 64).min(n));
                    let want: Vec<u32> = tokens.collect();
                    let what = format!("layer {target}, head {head}, {n} on {}", dev.name());
                    assert_eq!(probe.selected[head], want, "{what}: {scores:?}");
                }
            }
        }
    }
}

/// Bytes of keys and values of the published model: 32 layers of 2 KV heads of 128 dimensions in 16 bits.
#[test]
fn a_token_of_minicpm4_takes_32_kib() {
    let dev = open("cpu").unwrap();
    let shape = KvShape {
        n_layers: 32,
        kv_heads: 2,
        head_dim: 128,
        lead: 128,
        dtype: DType::BF16,
        n_pages: 2,
        slots: 1,
        int8_dims: 0,
        key_stats: false,
        value_stats: false,
    };
    let cache = KvCache::new(&*dev, shape).unwrap();
    let bytes = |t: &Tensor| t.len() * t.dtype().bytes();
    let all: usize = (0..32).map(|l| bytes(cache.pool(l).k) + bytes(cache.pool(l).v)).sum();
    assert_eq!(all / (2 * longsight::backend::PAGE), 32 << 10);
}

/// Each `path.rs::name` of the page is a test of that file: a function under `#[test]`, or the name of a case.
#[test]
fn every_test_that_the_page_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/invariants.md")).unwrap();
    assert!(page.is_ascii());
    let missing = |named: &str| -> Option<String> {
        let (file, name) = named.split_once("::")?;
        let why = match std::fs::read_to_string(root.join(file)) {
            Err(e) => e.to_string(),
            Ok(text) if is_test(&text, name) => return None,
            Ok(_) => "no such test".into(),
        };
        Some(format!("{named}: {why}"))
    };
    let named: Vec<&str> =
        page.split('`').skip(1).step_by(2).filter(|n| n.contains("::")).collect();
    assert!(named.len() > 40, "the page names {} tests", named.len());
    let missing: Vec<String> = named.iter().filter_map(|n| missing(n)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    // A line that names no test says why.
    for line in page.lines().filter(|l| l.starts_with("| ") && !l.contains("::")) {
        let known = ["| invariant |", "not here"].iter().any(|w| line.contains(w));
        assert!(known, "{line}");
    }
    assert!(!is_test("#[test]\nfn other() {}", "name") && !is_test("fn name() {}", "name"));
}

fn is_test(text: &str, name: &str) -> bool {
    let function = format!("fn {name}(");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let at = lines.iter().position(|l| l.starts_with(&function));
    let marked = |i: usize| lines[..i].iter().rev().take(2).any(|l| *l == "#[test]");
    at.is_some_and(marked)
        || text.contains(&format!("c.add(\"{}", name.replacen("::", "\", \"", 1)))
}
