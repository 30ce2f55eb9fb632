//! The end-to-end measurement on a tiny model, and that of attention in prompts: which rows there are, and what the
//! JSON holds.

mod common;

use common::cache::backends;
use common::program::Home;
use common::tiny::Tiny;
use longsight::backend::DType;
use longsight::bench::EndToEnd;
use longsight::bench::attention::{PromptBench, Subject};
use longsight::engine::Engine;
use longsight::model::quant::Quant;
use longsight::model::{Arch, Checkpoint};
use longsight::select::{MethodSpec, Variant};

fn sparse() -> MethodSpec {
    MethodSpec {
        budget: Some(48),
        dense_layers: Some(0),
        dense_below: Some(0),
        ..Variant::SparcasInt8.into()
    }
}

#[test]
fn sparse_rows_stand_beside_a_dense_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny");
    Tiny::new(Arch::Llama, false, 3).write_hf(&path, Quant::F32, 1);
    let bench = EndToEnd {
        prompts: vec![32],
        generate: vec![4],
        depths: vec![130, 0],
        methods: vec![
            ("dense".into(), MethodSpec::from(Variant::Dense)),
            ("sparcas-int8:budget=48".into(), sparse()),
        ],
        plans: vec![],
        repeats: 2,
        warmup: 1,
    };
    let mut engine = Engine::builder()
        .model(path.to_string_lossy())
        .device("cpu")
        .context(bench.context())
        .sequences(2)
        .kv_tokens(bench.kv_tokens())
        .method(sparse())
        .calibrate(false)
        .build()
        .unwrap();
    let report = bench.run(&mut engine, &mut |_| true).unwrap();

    let names: Vec<_> = report.rows.iter().map(|r| (r.test.as_str(), r.method.as_str())).collect();
    let want = [
        ("pp32", "dense"),
        ("tg4", "dense"),
        ("pp32@d130", "dense"),
        ("tg4@d130", "dense"),
        ("tg4@d130", "sparcas-int8:budget=48"),
    ];
    assert_eq!(names, want);
    // At depth 0 everything fits the budget: said, not measured as if it were sparse.
    assert_eq!(report.notes.len(), 1);
    let note = &report.notes[0];
    assert!(note.starts_with("tg4: left out") && note.contains("sparcas-int8"), "{note}");

    let json = serde_json::to_value(&report).unwrap();
    let c = Checkpoint::open(&path).unwrap().config().clone();
    // Two layers of qkv 64 x 128, o 64 x 64, gate and up 64 x 192, down 96 x 64, and the output projection.
    let weights = 2 * (64 * 128 + 64 * 64 + 64 * 192 + 96 * 64) + 64 * c.vocab;
    let bytes = (weights * engine.decoder().weight_dtype().bytes()) as u64;
    for row in json["rows"].as_array().unwrap() {
        let speed = &row["tokens_per_second"];
        assert_eq!(speed["samples"].as_array().unwrap().len(), 2);
        assert!(speed["mean"].as_f64().unwrap() > 0.0);
        if row["phase"] == "decode" {
            assert_eq!(row["traffic"]["weight_bytes"], bytes);
            assert!(row["traffic"]["share"].as_f64().unwrap() > 0.0);
            assert!(row["plan"]["layers"].is_array());
        }
    }
    let kv = |i: usize| json["rows"][i]["traffic"]["kv_bytes"].as_u64().unwrap();
    assert!(kv(4) < kv(3), "{} of {}", kv(4), kv(3));
    assert_eq!(json["rows"][3]["x_dense"], 1.0);
    assert_eq!(json["rows"][4]["budget"], 48);
    assert_eq!(json["prefill_arithmetic"]["shapes"].as_array().unwrap().len(), 4);
    assert!(json["prefill_arithmetic"]["gemm_gflop_s"].as_f64().unwrap() > 0.0);
    for key in ["version", "commit", "date", "device"] {
        assert!(!json["environment"][key].is_null(), "{key}");
    }
}

/// Every kind of prompt that a layer can read, on every backend under test.
#[test]
fn prompts_are_measured_by_method_and_role() {
    let methods = [
        "kascade:tile=32:budget=64",
        "infllm2:tile=1:budget=192:dense-below=0",
        "sparda:tile=1:budget=192:dense-below=0",
        "sparcas:budget=64:dense-below=0",
    ];
    let of = Subject {
        batches: vec![1],
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        dtype: DType::F32,
        methods: methods.map(|m| (m.into(), m.parse().unwrap())).to_vec(),
        plans: vec![],
        seed: 1,
    };
    let bench = PromptBench { of, prompts: vec![200, 300], chunk: Some(128), repeats: 2 };
    for dev in backends() {
        let name = dev.name();
        let report = bench.run(&*dev, &mut |_, done, all| done <= all).unwrap();
        let wrong: Vec<_> = report.failures().map(|r| (&r.method, r.prompt, &r.check)).collect();
        assert!(wrong.is_empty(), "{name}: {wrong:?}");
        let json = serde_json::to_value(&report).unwrap();
        let rows = json["rows"].as_array().unwrap();
        let name_of = |r: &serde_json::Value| {
            (r["prompt"].as_u64().unwrap(), r["method"].as_str().unwrap().to_owned())
        };
        let names: Vec<_> = rows.iter().map(name_of).collect();
        let want = ["dense", methods[0], methods[1], methods[2]];
        let want = [200, 300].into_iter().flat_map(|n| want.map(|m| (n, m.to_owned())));
        assert_eq!(names, want.collect::<Vec<_>>(), "{name}");
        // SparCas was given no tile.
        assert!(matches!(&report.notes[..], [n] if n.contains("sparcas")), "{:?}", report.notes);
        for row in rows {
            let (method, ms) = (row["method"].as_str().unwrap(), &row["ms"]);
            assert_eq!(ms["samples"].as_array().unwrap().len(), 2);
            assert!(ms["mean"].as_f64().unwrap() > 0.0 && row["x_dense"].is_f64());
            assert_eq!(row["tflop_s"].is_f64(), method == "dense", "{name}");
            assert_eq!(row["check"]["elements"], 4 * 2 * 32);
            assert_eq!(row["layer_ms"].as_array().unwrap().len(), 4);
            let roles = row["roles"].as_array().unwrap();
            let roles: Vec<_> = roles.iter().map(|r| r["role"].as_str().unwrap()).collect();
            let want = match method.split(':').next().unwrap_or_default() {
                "dense" => vec!["dense"],
                "kascade" => vec!["dense anchor", "reuse"],
                _ => vec!["select"],
            };
            assert_eq!(roles, want, "{method} on {name}");
            assert!(row["plan"]["layers"].is_array());
        }
        let settings = &json["settings"];
        assert_eq!((&settings["heads"], &settings["chunk"]), (&4.into(), &128.into()));
        for key in ["version", "commit", "date", "device"] {
            assert!(!json["environment"][key].is_null(), "{key}");
        }
    }
}

#[test]
fn prompts_are_asked_for_on_the_command_line() {
    let home = Home::new();
    let small = [
        "bench",
        "attention",
        "-d",
        "cpu",
        "--layers",
        "2",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--head-dim",
        "16",
        "--dtype",
        "f32",
    ];
    let with = |more: &[&'static str]| [&small[..], more].concat();
    let found = home.run(&with(&["-p", "200", "-r", "1", "--chunk", "64", "--format", "json"]));
    let json = found.json();
    assert_eq!(json["kind"], "prompt_attention");
    let methods: Vec<_> =
        json["rows"].as_array().unwrap().iter().map(|r| (&r["method"], &r["chunk"])).collect();
    assert_eq!(methods, [(&"dense".into(), &64.into()), (&"kascade:tile=32".into(), &64.into())]);
    let window = "window:budget=64:tile=8:dense-below=0:dense-layers=0";
    let table = home.run(&with(&["-p", "100", "-r", "1", "--methods", window]));
    for part in ["TFLOP/s", "select + attend"] {
        assert!(table.out.contains(part), "{part}: {}", table.out);
    }
    let row = table.out.lines().find(|l| l.starts_with(window));
    assert!(row.is_some_and(|l| l.trim_end().ends_with("ok")), "{}", table.out);
    // What was run is what the row says.
    let tile =
        home.run(&with(&["-p", "200", "-r", "1", "--tile", "16", "--format", "json"])).json();
    assert_eq!(tile["rows"][1]["method"], "kascade:tile=16");
    assert_eq!(tile["rows"][1]["plan"]["layers"][1]["tile"], 16);
    home.refused(&with(&["-p", "100", "-D", "200"]), &["--prompt", "--depth"]);
    home.refused(&with(&["-p", "100", "--steps", "4"]), &["--prompt", "--steps"]);
    home.refused(&with(&["--chunk", "64"]), &["--prompt"]);
    home.refused(&with(&["-r", "2"]), &["--prompt"]);
    home.refused(&with(&["-p", "0"]), &["a prompt of 0 tokens"]);
    home.refused(&with(&["-p", "100", "-r", "0"]), &["--repeats"]);
    home.refused(&with(&["-p", "100", "--chunk", "0"]), &["--chunk"]);
}
