//! Requests and sequences of a whole (tiny, random) model: slots, pages, ids, limits, and what is said at the end.

mod common;

use common::cache::backends;
use common::model::{CONTEXT, Model, dense, prompt, sparse};
use common::tiny::Tiny;
use longsight::backend::DType;
use longsight::engine::{
    Engine, EngineError, Event, Finish, Piece, Request, Sampling, Scheduler, Stats, WantLogits,
    Work,
};
use longsight::kv::PageError;
use longsight::model::{Arch, Quant, Weight};
use longsight::select::{METHODS, Variant};

/// What became of a request.
#[derive(Default)]
struct Answer {
    tokens: Vec<u32>,
    ends: Vec<Stats>,
}

/// Runs requests together to their ends.
fn together(engine: &mut Engine, requests: &[Request]) -> Vec<Answer> {
    let mut scheduler = Scheduler::new(engine);
    for r in requests {
        scheduler.submit(r.clone()).unwrap();
    }
    let mut answers: Vec<Answer> = requests.iter().map(|_| Answer::default()).collect();
    while !scheduler.is_idle() {
        for event in scheduler.step().unwrap() {
            match event {
                Event::Piece { request, piece } => answers[request].tokens.extend(piece.token),
                Event::Finished { request, stats, .. } => answers[request].ends.push(stats),
                Event::Prefilled { .. } => {}
            }
        }
    }
    answers
}

fn request(tokens: &[u32], max_tokens: usize) -> Request {
    Request::tokens(tokens.to_vec()).max_tokens(max_tokens)
}

fn kept(tokens: &[u32]) -> Request {
    Request { keep: true, ..request(tokens, 4) }
}

/// Tokens and measurements of one request.
fn run(engine: &mut Engine, request: Request) -> (Vec<u32>, Stats) {
    let mut answer = together(engine, &[request]).remove(0);
    assert_eq!(answer.ends.len(), 1);
    (answer.tokens, answer.ends.remove(0))
}

fn read(engine: &mut Engine, tokens: &[u32]) -> Result<(), EngineError> {
    let seq = engine.open_sequence()?;
    let done = engine.prefill(seq, tokens, WantLogits::None, |_, _| (), |_| true);
    engine.close(seq);
    done
}

fn is_bad_option<T: std::fmt::Debug>(result: Result<T, EngineError>, says: &str) {
    match result {
        Err(EngineError::BadOption(text)) => assert!(text.contains(says), "{text}"),
        other => panic!("{other:?}, wanted: {says}"),
    }
}

#[test]
fn a_request_without_a_slot_to_wait_for_is_an_error() {
    let model = Model::new();
    for dev in backends() {
        let mut engine = model.builder(&dev, &dense()).sequences(1).build().unwrap();
        let open = engine.open_sequence().unwrap();
        let mut answer = engine.generate(request(&prompt(1, 20), 4)).unwrap();
        assert!(matches!(answer.next(), Some(Err(EngineError::NoSlot(1)))));
        assert!(answer.next().is_none());
        drop(answer);
        engine.close(open);
        assert_eq!(run(&mut engine, request(&prompt(1, 20), 1)).1.finish, Some(Finish::Length));
    }
}

#[test]
fn kept_sequences_make_way() {
    let model = Model::new();
    for dev in backends() {
        let build = |slots, tokens| {
            let sized = model.builder(&dev, &dense()).sequences(slots);
            sized.kv_tokens(tokens).build().unwrap()
        };
        let pages = |e: &Engine| e.cache().allocator().free_pages();

        // For a slot.
        let mut engine = build(1, CONTEXT);
        run(&mut engine, kept(&prompt(2, 100)));
        assert_eq!(engine.greedy_tokens(&prompt(3, 30), 2).unwrap().len(), 2);
        run(&mut engine, kept(&prompt(2, 100)));
        let seq = engine.open_sequence().unwrap();
        assert_eq!(pages(&engine), 4);
        assert!(matches!(engine.open_sequence(), Err(EngineError::NoSlot(1))));
        engine.close(seq);

        // For a fork.
        let mut engine = build(2, CONTEXT);
        let seq = engine.open_sequence().unwrap();
        run(&mut engine, kept(&prompt(2, 100)));
        engine.fork(seq).unwrap();

        // For pages.
        let mut engine = build(2, CONTEXT);
        run(&mut engine, kept(&prompt(2, 150)));
        assert_eq!(pages(&engine), 1);
        read(&mut engine, &prompt(3, 200)).unwrap();
        assert_eq!(pages(&engine), 4);

        // On request.
        run(&mut engine, kept(&prompt(2, 150)));
        engine.forget_kept();
        assert_eq!(pages(&engine), 4);
    }
}

#[test]
fn another_conversation_that_only_starts_alike_is_not_cut() {
    let model = Model::new();
    let first = prompt(4, 100);
    let other = [&first[..20], &prompt(5, 60)].concat();
    let longer = [first.clone(), prompt(6, 10)].concat();
    for dev in backends() {
        for spec in [dense(), sparse(Variant::Sparcas, 80)] {
            let mut fresh = model.engine(&dev, &spec);
            let mut engine = model.builder(&dev, &spec).sequences(2).build().unwrap();
            run(&mut engine, kept(&first));
            let (tokens, stats) = run(&mut engine, request(&other, 8));
            assert_eq!((stats.reused_tokens, stats.prefill_tokens), (20, 60));
            assert_eq!(tokens, run(&mut fresh, request(&other, 8)).0);
            let (tokens, stats) = run(&mut engine, request(&longer, 8));
            assert!(stats.reused_tokens >= 100, "{stats:?}");
            assert_eq!(stats.prefill_tokens, 110 - stats.reused_tokens);
            assert_eq!(tokens, run(&mut fresh, request(&longer, 8)).0);
        }
    }
}

#[test]
fn in_a_full_cache_the_oldest_goes_on() {
    let model = Model::new();
    let requests = [7, 8, 9].map(|seed| request(&prompt(seed, 100), 60));
    for dev in backends() {
        let alone = requests.clone().map(|r| run(&mut model.engine(&dev, &dense()), r).0);
        assert!(alone.iter().all(|tokens| tokens.len() == 60), "{alone:?}");
        // Four pages; each request takes two at first and needs three in the end.
        let small = model.builder(&dev, &dense()).kv_tokens(256);
        let mut engine = small.build().unwrap();
        let got = together(&mut engine, &requests);
        let ends: Vec<Vec<_>> =
            got.iter().map(|a| a.ends.iter().map(|s| s.finish.unwrap()).collect()).collect();
        assert_eq!(ends, [[Finish::Length], [Finish::Context], [Finish::Length]]);
        assert_eq!([&got[0].tokens, &got[2].tokens], [&alone[0], &alone[2]]);
        let n = got[1].tokens.len();
        assert!(n > 20 && got[1].tokens == alone[1][..n], "{n}");
        assert_eq!(engine.cache().allocator().free_pages(), 4);
    }
}

#[test]
fn a_prompt_that_does_not_fit_yet_waits_and_is_read_again() {
    let model = Model::new();
    let requests = [request(&prompt(7, 100), 60), request(&prompt(8, 200), 20)];
    for dev in backends() {
        let alone = requests.clone().map(|r| run(&mut model.engine(&dev, &dense()), r).0);
        let small = model.builder(&dev, &dense()).kv_tokens(256).chunk(64);
        let got = together(&mut small.build().unwrap(), &requests);
        for (got, alone) in got.iter().zip(&alone) {
            assert_eq!(got.tokens, *alone);
            assert_eq!(got.ends[0].finish, Some(Finish::Length));
        }
    }
}

#[test]
fn pages_that_nobody_frees_are_an_error() {
    let model = Model::new();
    for dev in backends() {
        let mut engine = model.builder(&dev, &dense()).kv_tokens(256).build().unwrap();
        let open = engine.open_sequence().unwrap();
        engine.prefill(open, &prompt(1, 200), WantLogits::None, |_, _| (), |_| true).unwrap();
        let mut scheduler = Scheduler::new(&mut engine);
        scheduler.submit(request(&prompt(2, 100), 4)).unwrap();
        let error = scheduler.step().unwrap_err();
        assert!(matches!(error, EngineError::Cache(PageError { free: 0, .. })), "{error}");
        assert!(scheduler.is_idle());
    }
}

/// Draws answers until the first two tokens are what `wanted` asks for.
fn opening(engine: &mut Engine, wanted: impl Fn(u32) -> bool) -> (Request, u32, u32) {
    for seed in 0..2000 {
        let mut r = request(&prompt(1, 10), 2);
        r.sampling = Sampling { temperature: 2.0, seed, ..Sampling::default() };
        let (tokens, _) = run(engine, r.clone());
        if let [a, b] = tokens[..]
            && a != b
            && wanted(a)
        {
            return (r.max_tokens(9), a, b);
        }
    }
    panic!("no such answer");
}

#[test]
fn text_that_was_held_back_comes_when_a_stop_token_ends_the_answer() {
    let model = Model::new();
    for dev in backends() {
        let mut engine = model.engine(&dev, &dense());
        let mut tail = |mut r: Request, stop: &[&str], stop_token| {
            r.stop = stop.iter().map(|s| s.to_string()).collect();
            r.stop_tokens = vec![stop_token];
            let mut answer = engine.generate(r).unwrap();
            let pieces: Vec<Piece> = answer.by_ref().map(Result::unwrap).collect();
            assert_eq!(answer.stats().unwrap().finish, Some(Finish::Stop));
            assert_eq!(answer.stats().unwrap().decode_steps, 1);
            pieces.into_iter().map(|p| (p.token, p.text)).collect::<Vec<_>>()
        };
        let mut engine = model.engine(&dev, &dense());
        // The first token may begin the stop string.
        let (r, a, b) = opening(&mut engine, |t| (33..127).contains(&t));
        let text = char::from(a as u8).to_string();
        let got = tail(r, &[&format!("{text}ser:")], b);
        assert_eq!(got, [(Some(a), String::new()), (None, text)]);
        // The first token is the first byte of a character.
        let (r, a, b) = opening(&mut engine, |t| (0xc2..0xe0).contains(&t));
        let got = tail(r, &[], b);
        assert_eq!(got, [(Some(a), String::new()), (None, "\u{fffd}".into())]);
    }
}

#[test]
fn an_id_names_one_sequence_only() {
    let model = Model::new();
    let dev = &backends()[0];
    let mut engine = model.builder(dev, &dense()).sequences(1).build().unwrap();
    let old = engine.open_sequence().unwrap();
    engine.close(old);
    let new = engine.open_sequence().unwrap();
    assert_ne!(old, new);
    engine.close(old);
    assert_eq!(engine.cached(new).unwrap(), 0);
    let mut larger = model.engine(dev, &dense());
    for other in [0; 3].map(|_| larger.open_sequence().unwrap()) {
        engine.close(other);
        assert!(matches!(engine.cached(other), Err(EngineError::NoSequence(_))));
        assert!(engine.fork(other).is_err() && engine.decode(other, 1).is_err());
    }
    assert!(matches!(engine.decode(old, 1), Err(EngineError::NoSequence(0))));
    engine.decode(new, 1).unwrap();
}

#[test]
fn steps_that_make_no_sense_are_refused() {
    let model = Model::new();
    for dev in backends() {
        let mut engine = model.engine(&dev, &dense());
        let [a, b] = [0; 2].map(|_| engine.open_sequence().unwrap());
        let work = |seq, tokens, decode| Work { seq, tokens, decode, logits: WantLogits::None };
        let mut step = |work: &[Work<'_>], says: &str| {
            is_bad_option(engine.step(work, |_, _, _| ()), says);
        };
        step(&[work(a, &[1], true), work(b, &[], false)], "a token of each");
        step(&[work(a, &[1, 2], true)], "takes one token, not 2");
        step(&[work(a, &[1], true), work(b, &[2], true), work(a, &[3], true)], "once");
        step(&[work(a, &[1], true), work(b, &[5, 260], false)], "token 260 lies outside");
        step(&[work(a, &[1; 200], false), work(b, &[1; 200], false)], "at most 259 fit");
        assert_eq!([engine.cached(a).unwrap(), engine.cached(b).unwrap()], [0, 0]);
        is_bad_option(engine.generate(request(&[1, 260], 4)), "token 260 lies outside");
        assert!(matches!(engine.greedy_tokens(&[], 4), Err(EngineError::EmptyPrompt)));
        let hot = Sampling { temperature: f32::NAN, ..Sampling::default() };
        is_bad_option(engine.generate(request(&[1], 4).sampling(hot)), "temperature");
    }
}

#[test]
fn limits_hold_to_the_token() {
    let model = Model::new();
    let too_long = |result: Result<_, EngineError>, most: usize| match result {
        Err(EngineError::ContextTooLong { limit, .. }) => assert_eq!(limit, most),
        other => panic!("{other:?}"),
    };
    for dev in backends() {
        // The slice of chosen dimensions is laid out by the context.
        let spec = sparse(Variant::SparcasPaper, 40);
        let want = model.engine(&dev, &spec).greedy_tokens(&prompt(1, 90), 10).unwrap();
        let mut engine = model.builder(&dev, &spec).context(100).chunk(usize::MAX).build().unwrap();
        assert_eq!((engine.context(), engine.chunk()), (100, 100));
        assert_eq!(engine.greedy_tokens(&prompt(1, 90), 10).unwrap(), want);
        let seq = engine.open_sequence().unwrap();
        let long = prompt(1, 300);
        too_long(engine.prefill(seq, &long, WantLogits::None, |_, _| (), |_| true), 100);
        too_long(engine.prefill(seq, &long[..101], WantLogits::None, |_, _| (), |_| true), 100);
        assert_eq!(engine.cached(seq).unwrap(), 0);
        read(&mut engine, &long[..100]).unwrap();

        // A sequence alone may not need more pages than there are.
        let mut engine = model.builder(&dev, &dense()).kv_tokens(70).build().unwrap();
        too_long(engine.generate(request(&prompt(1, 70), 4)).map(|_| ()), 70);
        run(&mut engine, request(&prompt(1, 69), 4));

        // No list is longer than a sequence, whatever the budget.
        for m in METHODS.iter().filter(|m| m.variant != Variant::Nosa) {
            let spec = sparse(m.variant, 1 << 40).with_read_options_only();
            if let Err(e) = model.builder(&dev, &spec).context(100).build() {
                panic!("{}: {e}", m.name);
            }
        }

        let build = || model.builder(&dev, &dense());
        is_bad_option(build().sequences(usize::MAX).build(), "more than");
        is_bad_option(build().sequences(1 << 40).build(), "more than");
        is_bad_option(build().kv_tokens(usize::MAX).build(), "more than");
        is_bad_option(build().kv_tokens(0).build(), "at least");
        let endless = build().context(usize::MAX).build();
        assert!(matches!(endless, Err(EngineError::BadContext { most: 512, .. })));
    }
}

#[test]
fn logits_that_are_not_finite_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new(Arch::Llama, false, 3);
    for (_, values) in tiny.weights.iter_mut().filter(|(w, _)| *w == Weight::Output) {
        values.fill(f32::NAN);
    }
    tiny.write_hf(dir.path(), Quant::F32, 1);
    for dev in backends() {
        let model = Engine::builder().model(dir.path().display().to_string());
        let model = model.backend(dev.clone()).dtype(DType::F32).method(dense());
        let mut engine = model.context(CONTEXT).build().unwrap();
        let error = engine.generate(request(&prompt(1, 10), 4)).unwrap().next();
        assert!(matches!(error, Some(Err(EngineError::NoFiniteLogit))), "{error:?}");
        let error = engine.greedy_tokens(&prompt(1, 10), 4);
        assert!(matches!(error, Err(EngineError::NoFiniteLogit)), "{error:?}");
        // Each request ends by itself, and nothing of it is kept.
        for answer in together(&mut engine, &[kept(&prompt(1, 10)), kept(&prompt(2, 200))]) {
            let ends: Vec<_> = answer.ends.iter().map(|s| s.finish).collect();
            assert_eq!(ends, [Some(Finish::NoFiniteLogit)]);
        }
        assert_eq!(run(&mut engine, request(&prompt(1, 10), 4)).1.reused_tokens, 0);
    }
}

#[test]
fn statistics_count_what_was_run() {
    let model = Model::new();
    let start = prompt(2, 100);
    for dev in backends() {
        let mut engine = model.builder(&dev, &dense()).chunk(30).build().unwrap();
        let (tokens, s) = run(&mut engine, Request { keep: true, ..request(&start, 6) });
        assert_eq!((s.prompt_tokens, s.reused_tokens, s.prefill_tokens), (100, 0, 100));
        assert_eq!((s.generated_tokens, s.decode_steps), (6, 5));
        assert!(s.prefill_seconds > 0.0 && s.decode_seconds > 0.0);
        // The same again, up to a token that ends the answer: it takes a step, but is not part of it.
        let last = tokens[5];
        let before = tokens.iter().position(|&t| t == last).unwrap();
        let (_, s) = run(&mut engine, Request { stop_tokens: vec![last], ..request(&start, 6) });
        assert_eq!((s.prompt_tokens, s.reused_tokens, s.prefill_tokens), (100, 99, 1));
        assert_eq!((s.generated_tokens, s.decode_steps), (before, before));
        assert_eq!(s.finish, Some(Finish::Stop));
    }
}
