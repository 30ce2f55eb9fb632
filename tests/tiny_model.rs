//! The trained tiny model (`models/tiny`): right or wrong answers from every method, on every backend under test.
//!
//! It finds what it is asked for with dense attention, every time (its card has the counts), so a method that does
//! not find it has lost it. The texts are from the novel that it was not trained on.

mod common;

use common::cache::backends;
use common::program::{Home, text};
use longsight::backend::{Backend, open};
use longsight::calibrate::{Calibration, Choice, Objective, Settings, gather};
use longsight::engine::{Engine, EngineBuilder};
use longsight::eval::{DEPTHS, Row, Sample, evaluate, key_sequence, passkey, start_of_text};
use longsight::select::{METHODS, MethodInfo, MethodSpec, Plan, Variant};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

const PROSE: &str = include_str!("data/texts/northanger_abbey.txt");

/// Methods, and whether they find five digits in 1,024 tokens without any dense layer.
const CASES: [(&str, bool); 20] = [
    ("window:budget=512", false),
    ("oracle:budget=8:sinks=1:recent=1", true),
    // Room for one token beside the first and the newest.
    ("oracle:budget=3:sinks=1:recent=1", false),
    ("sparcas:budget=128:dims=8", true),
    ("sparcas:budget=16:dims=8:sinks=1:recent=1", false),
    ("sparcas-int8:budget=128:dims=8", true),
    ("sparcas-paper:budget=128:dims=8:update=1", true),
    ("sparcas-recommended:budget=128:dims=8", true),
    ("sparcas-groups:budget=128:dims=8", true),
    // Layers of this model look for different things: evenly spaced anchors lose them. A list of each head's own also
    // needs the head maps of a calibration.
    ("kascade:budget=256:anchors=2", false),
    ("kascade:budget=256:anchors=0+2+3+4+5", false),
    ("kascade-pooled:budget=256:anchors=2", false),
    ("kascade-pooled:budget=256:anchors=0+2+3+4+5", true),
    ("refined:budget=128:dims=8:anchors=2", false),
    ("refined:budget=128:dims=8:anchors=0+2+3+4+5", true),
    ("quest:budget=256", true),
    ("quest:budget=48:recent=16", false),
    ("arkvale:budget=256", true),
    // Means of 32 keys drown a line of 12 tokens in a model that was not trained for blocks.
    ("infllm2:budget=320:sinks=0:recent=64", false),
    ("sparda:budget=320:sinks=0:recent=64", false),
];

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

/// A folder with the order of the keys, measured once on the cpu.
fn key_order_dir() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let dir = tempfile::tempdir().unwrap();
        let first = Engine::builder().model(text(&model())).device("cpu").context(64);
        first.key_order_dir(dir.path()).build().unwrap();
        dir
    };
    DIR.get_or_init(make).path()
}

/// A method without dense layers, sparse at any length.
fn sparse(method: &str) -> MethodSpec {
    let spec: MethodSpec = method.parse().unwrap();
    MethodSpec { dense_layers: Some(0), dense_below: Some(0), ..spec }.with_read_options_only()
}

fn builder(dev: &Arc<dyn Backend>, context: usize) -> EngineBuilder<'static> {
    Engine::builder()
        .model(text(&model()))
        .backend(dev.clone())
        .method(Variant::Dense.into())
        .key_order_dir(key_order_dir())
        .context(context)
}

fn plan_of(engine: &Engine, spec: &MethodSpec, context: usize) -> Plan {
    spec.plan(&engine.decoder().config().plan_shape(engine.fingerprint()), context).unwrap()
}

/// The model with room for two sequences that decode with `methods`, and their plans by name.
fn engine(
    dev: &Arc<dyn Backend>,
    context: usize,
    methods: &[(String, MethodSpec)],
) -> (Engine, Vec<(String, Plan)>) {
    let specs: Vec<MethodSpec> = methods.iter().map(|m| m.1.clone()).collect();
    let all = builder(dev, context).summaries_for(&specs).lookahead(true).sequences(2);
    let engine = all.build().unwrap();
    let plan = |m: &(String, MethodSpec)| (m.0.clone(), plan_of(&engine, &m.1, context));
    let plans = methods.iter().map(plan).collect();
    (engine, plans)
}

/// A pass key at a depth of `tenths`.
fn pass_key(engine: &Engine, tokens: usize, tenths: usize) -> Sample {
    let filler = engine.tokenizer().encode(PROSE, false).unwrap();
    let key = key_sequence().nth(tenths).unwrap();
    passkey(engine.tokenizer(), "pass key", &filler, tokens, tenths, key).unwrap()
}

/// `keys` codes spread evenly over prose, as `tools/tiny_tasks.py` writes them; the `asked`-th is asked for.
fn codes(engine: &Engine, tokens: usize, keys: usize, asked: usize) -> Sample {
    let drawn: Vec<u64> = key_sequence().skip(10 * tokens).take(2 * keys).collect();
    let (values, names) = drawn.split_at(keys);
    let letter = |x: u64| char::from(b'A' + (x % 26) as u8);
    let name = |i: usize| [1, 26, 676].map(|by| letter(names[i] / by)).iter().collect::<String>();
    let question = format!("\n\nWhat are the codes?\n\n{}: ", name(asked));
    let head = "A list of codes. Memorize them.\n\n";
    let line = |i: usize| format!("\n{}: {}\n", name(i), values[i]);
    let prose = tokens - 1 - head.len() - question.len() - 5 - keys * line(0).len();
    let mut all = head.to_string();
    for i in 0..keys {
        all += &PROSE[prose * i / keys..prose * (i + 1) / keys];
        all += &line(i);
    }
    let encode = |s: &str| engine.tokenizer().encode(s, false).unwrap();
    let mut ids = [start_of_text(engine.tokenizer()).unwrap(), encode(&all)].concat();
    let decode_from = ids.len();
    ids.extend(encode(&question));
    let score_from = ids.len();
    ids.extend(encode(&values[asked].to_string()));
    assert_eq!(ids.len(), tokens);
    Sample { name: format!("code {asked} of {keys}"), tokens: ids, decode_from, score_from }
}

fn run(engine: &mut Engine, samples: &[Sample], plans: &[(String, Plan)]) -> Vec<Row> {
    let mut rows = Vec::new();
    let show = |done: Vec<Row>| {
        for r in done {
            let found = if r.exact { "found" } else { "lost" };
            println!("{:<20} {:<56} {found}, NLL {:.4}", r.sample, r.method, r.nll);
            rows.push(r);
        }
    };
    evaluate(engine, samples, plans, None, |_, _| true, show).unwrap();
    rows
}

#[test]
fn dense_attention_answers_every_question() {
    let (mut engine, _) = engine(&open("cpu").unwrap(), 2048, &[]);
    let keys = DEPTHS.map(|tenths| pass_key(&engine, 2048, tenths));
    let codes = [0, 9, 22, 31].map(|asked| codes(&engine, 2048, 32, asked));
    for row in run(&mut engine, &[&keys[..], &codes].concat(), &[]) {
        assert!(row.exact && row.nll < 0.05, "{}: {}", row.sample, row.nll);
    }
}

/// The cases, and every method with a budget of the whole text.
#[test]
fn methods_find_what_their_budget_allows() {
    const TOKENS: usize = 1024;
    let whole = |m: &MethodInfo| {
        let spec = MethodSpec { budget: Some(TOKENS), ..sparse(m.name) };
        (format!("{} on everything", m.name), spec.with_read_options_only())
    };
    let cases = CASES.map(|(method, _)| (method.to_string(), sparse(method)));
    // This model has no content importance.
    let own = || METHODS.iter().filter(|m| m.variant != Variant::Nosa);
    let methods: Vec<_> = own().map(whole).chain(cases).collect();
    let (mut engine, plans) = engine(&open("cpu").unwrap(), TOKENS, &methods);
    let (wholes, plans) = plans.split_at(own().count());
    let samples = [
        codes(&engine, TOKENS, 16, 2),
        codes(&engine, TOKENS, 16, 9),
        pass_key(&engine, TOKENS, 5),
    ];
    let rows = run(&mut engine, &samples[..1], wholes);
    // Dense ones run once.
    assert_eq!(rows.len(), own().count());
    for row in rows {
        assert!(row.exact, "{}", row.method);
    }
    let rows = run(&mut engine, &samples, plans);
    for (method, finds) in CASES {
        let found = rows.iter().filter(|r| r.method == method && r.exact).count();
        match finds {
            true => assert_eq!(found, samples.len(), "{method}"),
            false => assert!(found < samples.len(), "{method} finds everything"),
        }
    }
}

/// The same digits are found or lost on every backend, and dense attention writes the same tokens.
#[test]
fn backends_find_and_lose_alike() {
    const TOKENS: usize = 384;
    let mut methods: Vec<_> =
        CASES.iter().filter(|c| c.1).map(|(m, _)| (m.to_string(), sparse(m))).collect();
    for m in ["window:budget=192", "infllm2:budget=320", "sparda:budget=320"] {
        methods.push((m.into(), sparse(m)));
    }
    let mut first: Option<(Vec<Row>, Vec<u32>)> = None;
    for dev in backends() {
        let (mut engine, plans) = engine(&dev, TOKENS + 32, &methods);
        let mut sample = codes(&engine, TOKENS, 8, 2);
        // Software renderers take their time: decode from the code's name on.
        sample.decode_from = sample.score_from - 5;
        let tokens = engine.greedy_tokens(&sample.tokens[..sample.score_from], 16).unwrap();
        assert_eq!(tokens[..5], sample.tokens[sample.score_from..], "{}: dense", dev.name());
        let rows = run(&mut engine, std::slice::from_ref(&sample), &plans);
        assert_eq!(rows.len(), methods.len() + 1);
        for (row, (method, _)) in rows[1..].iter().zip(&methods) {
            let finds = CASES.iter().any(|c| c.0 == *method && c.1);
            assert!(row.exact || !finds, "{method} on {}", dev.name());
            assert!(!row.exact || !method.starts_with("window"), "{method} on {}", dev.name());
        }
        let Some((want, wrote)) = &first else {
            first = Some((rows, tokens));
            continue;
        };
        assert_eq!(&tokens, wrote, "{}", dev.name());
        for (got, want) in rows.iter().zip(want) {
            assert_eq!(got.exact, want.exact, "{} on {}", got.method, dev.name());
        }
    }
}

/// Anchors and head maps that a calibration on other novels found keep the key; the same anchors without the maps
/// lose it (a case above).
#[test]
fn a_calibration_finds_the_anchors_that_matter() {
    const TOKENS: usize = 1024;
    let cpu = open("cpu").unwrap();
    let (mut engine, _) = engine(&cpu, TOKENS, &[]);
    let settings = Settings::of(&engine);
    let start = start_of_text(engine.tokenizer()).unwrap();
    let texts = [include_str!("data/texts/emma.txt"), include_str!("data/texts/persuasion.txt")]
        .map(|t| {
            [&start[..], &engine.tokenizer().encode(&t[..TOKENS - 1], false).unwrap()].concat()
        });
    let found = gather(&mut engine, &texts, &settings, None, &|_, _| true).unwrap();
    let choice = Choice { objective: Objective::Low, weigh: false, anchors: None, share: 0.95 };
    let found = Calibration::new(engine.fingerprint(), &found, choice).unwrap();
    println!("anchors {:?}", found.anchors);
    assert!(found.anchors.len() < 6, "every layer is an anchor");
    let (fingerprint, config) =
        (engine.fingerprint().to_string(), engine.decoder().config().clone());
    let kascade = sparse("kascade:budget=256");
    let plan = found.plan(&kascade, &config.plan_shape(&fingerprint), TOKENS).unwrap();
    let samples = [codes(&engine, TOKENS, 16, 2), pass_key(&engine, TOKENS, 5)];
    let plans =
        [("calibrated".to_string(), plan), ("even".into(), plan_of(&engine, &kascade, TOKENS))];
    for row in run(&mut engine, &samples, &plans) {
        assert_eq!(row.exact, row.method != "even", "{} {}", row.sample, row.method);
    }
}

/// By its name, in its chat template: the answer is the whole sentence, and ends.
#[test]
fn the_program_answers_with_the_model_it_carries() {
    let home = Home::new();
    let prose = &PROSE[..2000];
    let told = format!(
        "Somewhere in this long text a pass key is hidden. Find it and memorize it.\n\n{}\n\nThe pass key is 48321. \
         Do not forget it: 48321 is the pass key.\n\n{}",
        &prose[..700],
        &prose[700..]
    );
    let file = home.file("text.txt", told.as_bytes());
    let options =
        ["--ask", "What is the pass key?", "--device", "cpu", "--json", "--dense-below", "0"];
    let answer = home.run(&[&["run", "-m", "tiny", "-f", &file][..], &options].concat()).json();
    assert_eq!(answer["answer"], "The pass key is 48321.", "{answer}");
    assert_eq!(answer["method"], "sparcas");
    assert!(home.path("cache/tiny/model.safetensors").exists());
}
