//! Methods, sequences and requests of a whole (tiny, random) model in f32, on every backend under test.
//!
//! Replayed steps are in `replay.rs`, what single ops must satisfy in `methods_ops.rs`.

mod common;

use common::cache::backends;
use common::model::{CONTEXT, Model, dense, on_both, prompt, sparse};
use longsight::backend::{BackendError, DType};
use longsight::engine::{
    Engine, EngineError, Event, Finish, Request, Sampler, Sampling, Scheduler, SeqId, Stats,
    WantLogits,
};
use longsight::model::{Checkpoint, Tokenizer};
use longsight::select::{MethodSpec, SelectError, Variant};

/// Caches a prompt; the last token's logits.
fn read(engine: &mut Engine, seq: SeqId, tokens: &[u32]) -> Vec<f32> {
    let mut last = Vec::new();
    let keep = |_: usize, l: &[f32]| last = l.to_vec();
    engine.prefill(seq, tokens, WantLogits::Last, keep, |_| true).unwrap();
    last
}

/// `n` greedy tokens after `logits`, and the logits after each.
fn continued(
    engine: &mut Engine,
    seq: SeqId,
    mut logits: Vec<f32>,
    n: usize,
) -> (Vec<u32>, Vec<Vec<f32>>) {
    let mut greedy = Sampler::new(Sampling::default());
    let (mut tokens, mut all) = (Vec::new(), Vec::new());
    for _ in 0..n {
        assert!(logits.iter().all(|l| l.is_finite()), "logits that are not finite");
        tokens.extend(greedy.sample(&logits));
        logits = engine.decode(seq, tokens[tokens.len() - 1]).unwrap();
        all.push(logits.clone());
    }
    (tokens, all)
}

/// Greedy tokens and their logits in a sequence of their own.
fn answer(engine: &mut Engine, tokens: &[u32], n: usize) -> (Vec<u32>, Vec<Vec<f32>>) {
    let seq = engine.open_sequence().unwrap();
    let logits = read(engine, seq, tokens);
    let answer = continued(engine, seq, logits, n);
    engine.close(seq);
    answer
}

/// The tokens of requests that run together.
fn together(engine: &mut Engine, prompts: &[Vec<u32>], n: usize) -> Vec<Vec<u32>> {
    let mut scheduler = Scheduler::new(engine);
    for p in prompts {
        scheduler.submit(Request::tokens(p.clone()).max_tokens(n)).unwrap();
    }
    let mut answers = vec![Vec::new(); prompts.len()];
    while !scheduler.is_idle() {
        for event in scheduler.step().unwrap() {
            if let Event::Piece { request, piece } = event {
                answers[request].extend(piece.token);
            }
        }
    }
    answers
}

fn generate(engine: &mut Engine, request: Request) -> (Vec<u32>, Stats) {
    let mut generation = engine.generate(request).unwrap();
    let tokens = generation.by_ref().filter_map(|piece| piece.unwrap().token).collect();
    (tokens, generation.stats().unwrap().clone())
}

#[test]
fn runs_over_three_refresh_intervals_repeat_token_for_token() {
    let model = Model::new();
    let spec = MethodSpec { update: Some(4), ..sparse(Variant::SparcasPaper, 40) };
    let p = prompt(1, 100);
    for dev in backends() {
        let mut engine = model.engine(&dev, &spec);
        let first = answer(&mut engine, &p, 13);
        // Another sequence in between leaves state behind in the slot.
        answer(&mut engine, &prompt(2, 150), 5);
        assert_eq!(answer(&mut engine, &p, 13), first, "{}: the same engine", dev.name());
        let mut fresh = model.engine(&dev, &spec);
        assert_eq!(answer(&mut fresh, &p, 13), first, "{}: a fresh engine", dev.name());
    }
}

#[test]
fn a_budget_of_the_whole_text_gives_the_tokens_of_dense() {
    let p = prompt(3, 150);
    for (model, dev) in on_both(3) {
        let want = answer(&mut model.engine(&dev, &dense()), &p, 16);
        for m in model.methods() {
            let got = answer(&mut model.engine(&dev, &sparse(m.variant, CONTEXT)), &p, 16);
            assert_eq!(got.0, want.0, "{} of {} on {}", m.name, model.kind(), dev.name());
            if m.variant != Variant::Dense {
                // A budget below the length does run sparsely.
                let few = answer(&mut model.engine(&dev, &sparse(m.variant, 80)), &p, 1);
                assert_ne!(few.1[0], want.1[0], "{} of {} on {}", m.name, model.kind(), dev.name());
            }
        }
    }
}

#[test]
fn a_fork_decodes_like_its_origin() {
    let small = [4, 8].map(|bits| {
        let slice_bits = Some(bits);
        ("labels", MethodSpec { slice_bits, ..sparse(Variant::DoubleSparsity, 80) })
    });
    for (model, dev) in on_both(3) {
        let own = model.methods().map(|m| (m.name, sparse(m.variant, 80)));
        for (name, spec) in &own.chain(small.clone()).collect::<Vec<_>>() {
            let mut engine = model.engine(&dev, spec);
            let origin = engine.open_sequence().unwrap();
            // Ends inside a page, which both then write.
            let logits = read(&mut engine, origin, &prompt(4, 100));
            let fork = engine.fork(origin).unwrap();
            let want = continued(&mut engine, origin, logits.clone(), 12);
            let got = continued(&mut engine, fork, logits, 12);
            assert_eq!(got.0, want.0, "{name} of {} on {}", model.kind(), dev.name());
            assert_eq!(engine.cached(fork).unwrap(), 112);
        }
    }
}

/// Dimensions are chosen at steps 0 and 8, in the second layer also at 4 and 12 (the recommended method: when
/// coverage falls far, or after 8). A fork at step 5 keeps them, column by column, and the slice built for them.
#[test]
fn a_fork_within_a_refresh_interval_continues_with_the_same_bits() {
    let model = Model::new();
    let [paper, groups] = [Variant::SparcasPaper, Variant::SparcasGroups].map(|v| sparse(v, 80));
    let every = |spec| MethodSpec { update: Some(8), ..spec };
    let recommended =
        MethodSpec { beta: Some(0.5), ..every(sparse(Variant::SparcasRecommended, 80)) };
    for dev in backends() {
        let measured = [Variant::DoubleSparsity, Variant::Loki, Variant::Sparq];
        let others = measured.map(|v| sparse(v, 80));
        let chosen = [every(paper.clone()), recommended.clone(), every(groups.clone())];
        for spec in chosen.into_iter().chain(others) {
            let mut engine = model.engine(&dev, &spec);
            // The fork gets a slot that holds what another sequence left there.
            let [first, origin] = [1, 2].map(|_| engine.open_sequence().unwrap());
            let logits = read(&mut engine, first, &prompt(16, 130));
            continued(&mut engine, first, logits, 6);
            engine.close(first);
            let logits = read(&mut engine, origin, &prompt(17, 100));
            let (_, so_far) = continued(&mut engine, origin, logits, 5);
            let fork = engine.fork(origin).unwrap();
            let logits = so_far[4].clone();
            let want = continued(&mut engine, origin, logits.clone(), 12);
            let got = continued(&mut engine, fork, logits, 12);
            let same = want.1.iter().zip(&got.1).take_while(|(a, b)| a == b).count();
            assert_eq!(same, 12, "{} on {}: steps with the same bits", spec.name(), dev.name());
        }
    }
}

#[test]
fn requests_run_together_answer_as_one_by_one() {
    let model = Model::new();
    let prompts = [prompt(5, 5), prompt(6, 130), prompt(7, 70)];
    for dev in backends() {
        for variant in [
            Variant::Dense,
            Variant::Sparcas,
            Variant::SparcasRecommended,
            Variant::Kascade,
            Variant::Refined,
            Variant::Quest,
            Variant::Sparda,
            Variant::Random,
            Variant::Sparq,
            Variant::DoubleSparsity,
            Variant::Loki,
            Variant::Lessismore,
        ] {
            // The short text stays dense beside the sparse ones.
            let spec = sparse(variant, 69);
            let all = together(&mut model.engine(&dev, &spec), &prompts, 12);
            assert!(all.concat().len() > 12, "{all:?}");
            for (p, tokens) in prompts.iter().zip(&all) {
                let alone = together(&mut model.engine(&dev, &spec), std::slice::from_ref(p), 12);
                assert_eq!(alone[0], *tokens, "{variant:?}, {} tokens", p.len());
            }
        }
    }
}

#[test]
fn chunk_sizes_give_the_same_tokens() {
    let model = Model::new();
    let p = prompt(8, 150);
    for dev in backends() {
        for variant in [
            Variant::Dense,
            Variant::SparcasRecommended,
            Variant::Arkvale,
            Variant::Infllm2,
            Variant::Sparda,
            Variant::Sparq,
            Variant::DoubleSparsity,
            Variant::Loki,
        ] {
            let run = |chunk| {
                let spec = sparse(variant, 80);
                answer(&mut model.builder(&dev, &spec).chunk(chunk).build().unwrap(), &p, 12).0
            };
            let whole = run(512);
            for chunk in [1, 7] {
                assert_eq!(run(chunk), whole, "{variant:?} on {}, {chunk}", dev.name());
            }
        }
    }
}

/// The measured key order is saved in the cache folder, which a variable of the process names: the test runs
/// itself again with that variable set.
#[test]
fn the_order_of_keys_leaves_the_logits_alone() {
    const NAME: &str = "the_order_of_keys_leaves_the_logits_alone";
    const INNER: &str = "LONGSIGHT_TEST_INNER";
    if std::env::var_os(INNER).is_none() {
        let cache = tempfile::tempdir().unwrap();
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env("LONGSIGHT_CACHE", cache.path())
            .env(INNER, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&run.stdout);
        let errors = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success() && text.contains("1 passed"), "{text}{errors}");
        return;
    }
    let model = Model::new();
    let p = prompt(9, 150);
    // As many tokens as there are: attention is dense, but the keys are sorted.
    let spec = sparse(Variant::Sparcas, CONTEXT);
    for dev in backends() {
        let mut plain = model.engine(&dev, &spec);
        let mut sorted = model.builder(&dev, &spec).calibrate(true).build().unwrap();
        let order = |e: &Engine| e.decoder().key_order().pairs.clone();
        assert_ne!(order(&sorted), order(&plain), "nothing was sorted");
        let again = model.builder(&dev, &spec).calibrate(true).build().unwrap();
        assert_eq!(order(&again), order(&sorted), "the saved order");
        let mut logits = [Vec::new(), Vec::new()];
        for (engine, rows) in [&mut plain, &mut sorted].into_iter().zip(&mut logits) {
            let seq = engine.open_sequence().unwrap();
            let each = |_: usize, l: &[f32]| rows.extend_from_slice(l);
            engine.prefill(seq, &p, WantLogits::All, each, |_| true).unwrap();
            rows.extend(engine.decode(seq, 65).unwrap());
        }
        let [a, b] = &logits;
        assert_eq!(a.len(), b.len());
        let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max);
        assert!(worst <= 1e-4, "{}: logits differ by {worst}", dev.name());
    }
}

#[test]
fn a_plan_whose_summaries_are_not_kept_is_refused() {
    let model = Model::new();
    let variants = [
        Variant::SparcasInt8,
        Variant::SparcasRecommended,
        Variant::Sparcas,
        Variant::Quest,
        Variant::Sparq,
        Variant::Loki,
    ];
    let specs = variants.map(|v| sparse(v, 80));
    let needed = [
        "the int8 key copy",
        "key statistics",
        "energy-sorted keys",
        "summaries of the keys",
        "the sums of the values",
        "a profile of this model's keys",
    ];
    for dev in backends() {
        // Dense needs no order, so none is measured; the second engine's order was the caller's choice.
        let mut without = model.builder(&dev, &dense()).calibrate(true).build().unwrap();
        let mut with = model.builder(&dev, &dense()).summaries_for(&specs).build().unwrap();
        for (spec, needed) in specs.iter().zip(needed) {
            let model = without.decoder().config().plan_shape(without.fingerprint());
            let plan = spec.plan(&model, CONTEXT).unwrap();
            match without.set_plan(plan.clone()) {
                Err(EngineError::Select(SelectError::MissingSummary { what, .. })) => {
                    assert_eq!(what, needed);
                }
                other => panic!("{}: {other:?}", spec.name()),
            }
            assert_eq!(without.plan().method, "dense", "a refused plan changes nothing");
            with.set_plan(plan).unwrap();
            answer(&mut with, &prompt(10, 100), 3);
        }
    }
}

#[test]
fn a_kept_sequence_is_reused_and_answers_the_same() {
    let model = Model::new();
    let start = prompt(11, 100);
    let longer = [start.clone(), prompt(12, 20)].concat();
    let request = |tokens: &[u32]| Request::tokens(tokens.to_vec()).max_tokens(8);
    for dev in backends() {
        let measured = [Variant::DoubleSparsity, Variant::Loki];
        let others = [Variant::Dense, Variant::Sparcas, Variant::Quest, Variant::Infllm2];
        for variant in others.into_iter().chain(measured) {
            let spec = sparse(variant, 80);
            let (want, fresh) = generate(&mut model.engine(&dev, &spec), request(&longer));
            assert_eq!(fresh.reused_tokens, 0);
            let mut engine = model.engine(&dev, &spec);
            let mut first = request(&start);
            first.keep = true;
            generate(&mut engine, first);
            let (got, stats) = generate(&mut engine, request(&longer));
            assert!((100..120).contains(&stats.reused_tokens), "{stats:?}");
            assert_eq!(got, want, "{variant:?} on {}", dev.name());
        }
    }
}

#[test]
fn more_tokens_than_the_context_are_refused() {
    let model = Model::new();
    for dev in backends() {
        let mut engine = model.builder(&dev, &dense()).context(64usize).build().unwrap();
        let too_long = |e: &EngineError| matches!(e, EngineError::ContextTooLong { limit: 64, .. });
        let error = engine.generate(Request::tokens(prompt(13, 64))).unwrap_err();
        assert!(too_long(&error), "{error}");
        assert!(error.to_string().contains("64 tokens"), "{error}");
        // The last free place is used, then the answer ends.
        let (tokens, stats) = generate(&mut engine, Request::tokens(prompt(13, 63)));
        assert_eq!((tokens.len(), stats.finish), (2, Some(Finish::Context)));
        let seq = engine.open_sequence().unwrap();
        read(&mut engine, seq, &prompt(14, 64));
        let error = engine.decode(seq, 1).unwrap_err();
        assert!(too_long(&error), "{error}");
        assert_eq!(engine.cached(seq).unwrap(), 64, "a refused step changes nothing");
    }
}

#[test]
fn open_files_are_not_opened_again() {
    let model = Model::new();
    for dev in backends() {
        let want = answer(&mut model.engine(&dev, &dense()), &prompt(18, 40), 4);
        let checkpoint = Checkpoint::open(&model.path()).unwrap();
        let tokenizer = Tokenizer::for_checkpoint(&checkpoint).unwrap();
        let files = model.builder(&dev, &dense()).model("/no/such/model");
        let mut engine = files.checkpoint(checkpoint).tokenizer(tokenizer).build().unwrap();
        assert_eq!(answer(&mut engine, &prompt(18, 40), 4), want, "{}", dev.name());
    }
}

#[test]
fn a_seed_repeats_its_tokens() {
    let model = Model::new();
    for dev in backends() {
        let mut engine = model.engine(&dev, &dense());
        let mut draw = |seed| {
            let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            let request = Request::tokens(prompt(15, 40)).max_tokens(24).sampling(sampling);
            generate(&mut engine, request).0
        };
        let first = draw(7);
        assert_eq!(draw(7), first, "{}", dev.name());
        assert_ne!(draw(8), first, "{}", dev.name());
    }
}

#[test]
fn more_memory_than_the_machine_has_is_an_error() {
    let dev = longsight::backend::open("cpu").unwrap();
    let installed = dev.caps().memory.map_or(1 << 46, |bytes| bytes as usize);
    for len in [installed / 2, usize::MAX / 2] {
        match dev.alloc(DType::F32, len, "the test's buffer") {
            Err(e @ BackendError::OutOfMemory { .. }) => {
                assert!(e.to_string().contains("the test's buffer"), "{e}");
            }
            other => panic!("{len} numbers: {other:?}"),
        }
    }
}
