//! The end-to-end measurement on a tiny model: which rows there are, and what the JSON holds.

mod common;

use common::tiny::Tiny;
use longsight::bench::EndToEnd;
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
    let report = bench.run(&mut engine, &mut |_| ()).unwrap();

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
