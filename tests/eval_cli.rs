//! `longsight eval` as a user runs it, on a tiny random model: what each evaluation writes, and what it refuses.

mod common;

use common::program::{Home, text};
use serde_json::Value;

/// A text of the tiny model's alphabet (a token for each byte).
fn prose(home: &Home) -> String {
    let lines =
        (0..40).map(|i| format!("The mill number {i} stood by the river. Nobody knew why! "));
    home.file("prose.txt", lines.collect::<String>().as_bytes())
}

/// Sparse from the first token on.
const SPARSE: [&str; 8] =
    ["--methods", "window,sparcas-paper", "--budget", "64", "--dense-layers", "0", "--dims", "8"];

fn eval<'a>(name: &'a str, model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["eval", name, "-m", model, "-d", "cpu"][..], &SPARSE, more].concat()
}

/// Runs an evaluation, checks what all reports say and that the files agree, and returns the report.
fn report(home: &Home, task: &str, arguments: &[&str]) -> Value {
    let [json, md, svg] = ["out.json", "out.md", "out.svg"].map(|n| text(&home.path(n)));
    let files = ["-o", &json, "-o", &md, "-o", &svg];
    let table = home.run(&[arguments, &files].concat());
    assert_eq!(table.code, Some(0), "{table:?}");
    let written: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(written["task"], task);
    assert_eq!(written["methods"][1]["options"]["budget"], 64);
    assert!(written["environment"].is_object());
    let rows = written["rows"].as_array().unwrap();
    let methods: Vec<&str> = rows.iter().map(|r| r["method"].as_str().unwrap()).collect();
    assert!(methods.contains(&"window") && methods.contains(&"sparcas-paper"), "{methods:?}");
    assert!(rows.iter().all(|r| r["kv_bytes"].as_u64().unwrap() > 0));
    let md = std::fs::read_to_string(&md).unwrap();
    for method in ["window", "sparcas-paper"] {
        assert!(table.out.contains(method) && md.contains(&format!("| {method} |")), "{table:?}");
    }
    let svg = std::fs::read_to_string(&svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("window"), "{svg}");
    // The same again gives the same, as far as it is no time.
    let again = home.run(&[arguments, &["--format", "json"]].concat()).json();
    let timeless = |v: &Value| -> Vec<Value> {
        let rows = v["rows"].as_array().unwrap().iter().cloned();
        let strip = |mut r: Value| {
            r.as_object_mut().unwrap().remove("seconds");
            r
        };
        rows.map(strip).collect()
    };
    assert_eq!(timeless(&written), timeless(&again));
    written
}

fn rows<'a>(report: &'a Value, method: &str) -> Vec<&'a Value> {
    report["rows"].as_array().unwrap().iter().filter(|r| r["method"] == method).collect()
}

/// Every method answered every problem, dense like itself.
fn answered(report: &Value, problems: usize) {
    for method in ["dense", "window", "sparcas-paper"] {
        let of = rows(report, method);
        assert_eq!(of.len(), problems, "{method}");
        for r in of {
            assert!((0.0..=1.0).contains(&r["score"].as_f64().unwrap()), "{r}");
            let (written, like) = (r["written"].as_u64(), r["like_dense"].as_u64());
            assert!(written >= like && (method != "dense" || written == like), "{r}");
            assert!(r["text"].is_string() && r["exact"].is_boolean(), "{r}");
            let audited = !r["audit"]["layers"].as_array().unwrap().is_empty();
            assert_eq!(audited, method != "dense", "{r}");
        }
    }
}

#[test]
fn a_needle_grid_has_a_cell_for_each_length_and_depth() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let grid = ["--lengths", "450,500", "--depths", "0,100", "--samples", "2", "--raw"];
    let more = [&["--text", &prose, "--audit", "8"][..], &grid].concat();
    let report = report(&home, "needle", &eval("needle", &model, &more));
    answered(&report, 8);
    let cells: Vec<(u64, u64)> = rows(&report, "dense")
        .iter()
        .map(|r| (r["tokens"].as_u64().unwrap(), r["depth"].as_u64().unwrap()))
        .collect();
    assert_eq!(cells[..4], [(450, 0), (450, 0), (450, 100), (450, 100)]);
    assert_eq!(cells[4..], [(500, 0), (500, 0), (500, 100), (500, 100)]);
    let svg = std::fs::read_to_string(home.path("out.svg")).unwrap();
    assert!(svg.contains("needle, window: share found") && svg.contains("100 %"));
}

#[test]
fn keys_are_asked_for_one_by_one() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let keys = ["--lengths", "480", "--keys", "1, 5", "--samples", "1", "--raw"];
    let more = [&["--text", &prose, "--audit", "8"][..], &keys].concat();
    let report = report(&home, "multikey", &eval("multikey", &model, &more));
    // One key, and four of five.
    answered(&report, 5);
    let sizes: Vec<u64> =
        rows(&report, "window").iter().map(|r| r["size"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [1, 5, 5, 5, 5]);
    let names = rows(&report, "window");
    assert_ne!(names[1]["problem"], names[2]["problem"]);
}

#[test]
fn long_outputs_are_compared_item_by_item() {
    let home = Home::new();
    let model = home.model();
    let more = ["--items", "6", "--samples", "1", "--audit", "8"];
    let report = report(&home, "long-output", &eval("long-output", &model, &more));
    answered(&report, 4);
    for r in rows(&report, "window") {
        let items = &r["items"];
        assert_eq!(items["expected"], 6, "{r}");
        let of = |key: &str| items[key].as_u64().unwrap();
        assert!(of("prefix") <= of("common") && of("common") <= of("written"), "{r}");
    }
}

#[test]
fn prose_comes_with_intervals_by_position_and_over_texts() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let other = home
        .file("other.txt", "A wagon went down to the old bridge, slowly. ".repeat(9).as_bytes());
    let sizes = ["--lengths", "200", "--score", "24", "--buckets", "3", "--block", "4"];
    let more = [&["--text", &prose, "--text", &other, "--audit", "0"][..], &sizes].concat();
    let report = report(&home, "ppl", &eval("ppl", &model, &more));
    assert_eq!(report["bootstrap"]["block"], 4);
    let paired = report["paired"].as_array().unwrap();
    assert_eq!(paired.len(), 3);
    let zero = |i: &Value| (i["low"].as_f64(), i["high"].as_f64()) == (Some(0.0), Some(0.0));
    assert!(zero(&paired[0]["over_positions"]) && zero(&paired[0]["over_texts"]), "{paired:?}");
    for p in &paired[1..] {
        assert_eq!((p["tokens"].as_u64(), p["texts"].as_u64()), (Some(48), Some(2)));
        let mean = p["difference"].as_f64().unwrap();
        let of: Vec<f64> = rows(&report, p["method"].as_str().unwrap())
            .iter()
            .map(|r| r["nll_difference"]["mean"].as_f64().unwrap())
            .collect();
        assert!((mean - (of[0] + of[1]) / 2.0).abs() < 1e-6, "{p}");
        let buckets = p["buckets"].as_array().unwrap();
        assert_eq!(buckets.len(), 3);
        for interval in buckets.iter().map(|b| &b["interval"]).chain([&p["over_positions"]]) {
            let of = |key: &str| interval[key].as_f64().unwrap();
            assert!(of("low") <= of("mean") && of("mean") <= of("high"), "{p}");
            assert!(of("low") < of("high"), "{p}");
        }
    }
}

#[test]
fn recall_is_measured_by_layer_and_kv_head() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let more = ["--text", &prose, "--lengths", "200", "--steps", "6", "--layers"];
    let report = report(&home, "recall", &eval("recall", &model, &more));
    assert!(rows(&report, "dense").is_empty());
    for method in ["window", "sparcas-paper"] {
        let row = rows(&report, method)[0];
        assert_eq!(row["mass_by_step"].as_array().unwrap().len(), 6);
        let layers = row["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 2);
        for head in layers.iter().flat_map(|l| l["heads"].as_array().unwrap()) {
            let of = |key: &str| head[key].as_f64().unwrap();
            assert_eq!(head["steps"], 6);
            assert!(of("mass") <= of("best_mass") + 1e-6 && of("best_mass") < 1.0, "{head}");
            assert!(of("topk") > 0.0 && of("topk") <= 1.0 && of("selected") == 64.0, "{head}");
            // A window moves by one token a step.
            assert!(method != "window" || (of("churn") - 1.0 / 64.0).abs() < 1e-9, "{head}");
            assert_eq!(head["dims_churn"].is_null(), method == "window", "{head}");
        }
    }
    let svg = std::fs::read_to_string(home.path("out.svg")).unwrap();
    assert!(
        svg.contains("sparcas-paper: churn of dimensions") && !svg.contains("window: churn of d")
    );
}

#[test]
fn options_of_an_evaluation_are_named_when_they_are_wrong() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let [other, copy] = ["other.txt", "copy.txt"].map(|n| home.file(n, b"One, two, three."));
    let both = format!("{prose},{other}");
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("ruler", &["--score", "4"], &["--score"]),
        ("recall", &["--audit", "4"], &["--audit"]),
        ("copy", &["--lengths", "0"], &["--lengths", "from 1 on"]),
        ("copy", &["--lengths", "64"], &["64 tokens", "--lengths", "--score"]),
        ("needle", &["--lengths", "64"], &["64 tokens", "--lengths"]),
        ("needle", &["--depths", "101"], &["--depths", "0 to 100"]),
        ("needle", &["--needles", "0"], &["--needles"]),
        ("needle", &["--samples", "0"], &["--samples"]),
        ("copy", &["--lengths", "514"], &["514 tokens", "512", "--lengths"]),
        ("multikey", &["--lengths", "480", "--keys", "90"], &["--keys 90", "480", "--lengths"]),
        ("multikey", &["--keys", "18446744073709551615"], &["--keys", "too few"]),
        (
            "recall",
            &["--lengths", "60", "--steps", "4", "--methods", "window"],
            &["no layer was sparse", "--budget"],
        ),
        ("recall", &["--lengths", "200", "--methods", "dense"], &["dense", "--methods"]),
        ("ppl", &["--block", "0"], &["--block"]),
        ("ppl", &["--text", "/no/such/text"], &["/no/such/text"]),
        ("ppl", &["--text", &both], &[&prose, &other, "once for each"]),
        (
            "copy",
            &["--lengths", "200", "--score", "8", "--ctx", "150"],
            &["200 tokens", "--ctx 150"],
        ),
        ("multikey", &["--keys", "8,2", "--asked", "4"], &["--keys 2 --asked 4", "fewer"]),
        // What is named twice.
        ("needle", &["--text", &prose], &["--text", &prose, "same text"]),
        ("ppl", &["--text", &other, "--text", &copy], &[&other, &copy, "same text"]),
        ("copy", &["--lengths", "200, 300,200"], &["--lengths names 200 twice"]),
        ("needle", &["--depths", "0,50", "--depths", "0"], &["--depths names 0 twice"]),
        ("multikey", &["--keys", "4,4"], &["--keys names 4 twice"]),
        ("ruler", &["--tasks", "vt, fwe,vt"], &["--tasks names vt twice"]),
        ("recall", &["--budget", "64"], &["--budget names 64 twice"]),
        ("ppl", &["--methods", "window", "--methods", "window"], &["--methods names window twice"]),
        ("ppl", &["--plan", "p.json,p.json"], &["--plan names p.json twice"]),
    ];
    for &(name, more, names) in cases {
        let on = ["eval", name, "-m", &model, "-d", "cpu", "--text", &prose];
        let sparse = ["--dense-layers", "0", "--budget", "64"];
        let dense = more.contains(&"dense");
        let sparse = if dense { &[][..] } else { &sparse[..] };
        home.refused(&[&on[..], sparse, more].concat(), names);
    }
    let long = |more: &[&str], names: &[&str]| {
        home.refused(&[&["eval", "long-output", "-m", &model, "-d", "cpu"], more].concat(), names);
    };
    long(&["--tasks", "dance"], &["dance", "sort"]);
    long(&["--tasks", "copy, sort,copy"], &["--tasks names copy twice"]);
    long(&["--items", "4", "--items", "4"], &["--items names 4 twice"]);
    long(&["--items", "100000000000"], &["--items", "512"]);
    long(&["--items", "400"], &["--items", "512"]);
    home.refused(&["eval", "waltz"], &["waltz"]);
    home.refused(&["eval", "ppl", "-m", &model], &["--text"]);
}

/// Texts of one file name are different texts, and a single prediction has no standard error.
#[test]
fn texts_are_told_apart_and_one_prediction_has_no_error() {
    let home = Home::new();
    let model = home.model();
    let text = |folder: &str, words: &str| {
        std::fs::create_dir(home.path(folder)).unwrap();
        home.file(&format!("{folder}/book.txt"), words.repeat(9).as_bytes())
    };
    let [a, b] = [text("a", "A wagon went down to the bridge. "), text("b", "Nobody knew why! ")];
    let texts = ["--text", &a, "--text", &b, "--lengths", "100"];
    let on = |score: &'static str, more: &[&'static str]| {
        let more = [&texts[..], &["--score", score], more].concat();
        home.run(&eval("ppl", &model, &more).iter().map(|s| &**s).collect::<Vec<_>>())
    };
    let report = on("1", &["--format", "json"]).json();
    let samples: Vec<&str> =
        rows(&report, "window").iter().map(|r| r["sample"].as_str().unwrap()).collect();
    assert_eq!(samples, ["a/book.txt 100", "b/book.txt 100"]);
    assert_eq!(report["paired"][1]["texts"], 2);
    assert!(rows(&report, "window").iter().all(|r| r["nll_difference"]["error"].is_null()));
    let [one, two] = [on("1", &["--audit", "0"]), on("2", &["--audit", "7"])].map(|end| end.out);
    assert!(!one.contains("+-") && two.contains("+-"), "{one}{two}");
    assert!(one.contains("not measured (--audit 0)") && two.contains("each 7 steps"), "{one}{two}");
}

#[test]
fn every_evaluation_explains_itself() {
    let home = Home::new();
    let help = home.run(&["eval", "--help"]);
    assert_eq!(help.code, Some(0));
    for (name, about) in [
        ("ppl", "paired bootstrap"),
        ("copy", "half the length back"),
        ("passkey", "seven and nine tenths"),
        ("needle", "Every cell of the grid"),
        ("multikey", "spread evenly"),
        ("long-output", "two solved examples"),
        ("ruler", "not comparable with published"),
        ("recall", "dims churn"),
    ] {
        assert!(help.out.contains(&format!("  {name} ")), "{}", help.out);
        let own = home.run(&["eval", name, "--help"]);
        assert_eq!(own.code, Some(0), "{own:?}");
        let words = own.out.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(about), "{name}: {words}");
        assert!(own.out.contains("--methods") && own.out.contains("--output"), "{}", own.out);
    }
}
