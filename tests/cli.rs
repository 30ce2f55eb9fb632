//! The program as a user runs it: what it prints, and what it says of bad input.
//!
//! An adapter without f16 arithmetic or subgroups needs no test of its own: the wgpu backend never asks for either,
//! so every wgpu test runs that path. Too little memory is tested in `methods_engine.rs`.

mod common;

use common::program::{Home, run_on, text};
use common::tiny::Tiny;
use longsight::model::{Arch, Quant};
use longsight::select::Plan;
use serde_json::Value;
use std::path::PathBuf;

#[test]
fn every_command_explains_itself() {
    let home = Home::new();
    let version = home.run(&["--version"]);
    assert_eq!(version.out.trim(), format!("longsight {}", env!("CARGO_PKG_VERSION")));
    let help = home.run(&["--help"]);
    assert_eq!(help.code, Some(0));
    let list = help.out.lines().skip_while(|l| *l != "Commands:").skip(1);
    let commands: Vec<&str> = list
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    for known in ["run", "chat", "devices", "plan", "bench"] {
        assert!(commands.contains(&known), "{commands:?}");
    }
    for command in commands {
        let end = home.run(&[command, "--help"]);
        assert_eq!(end.code, Some(0), "{end:?}");
        assert!(end.out.contains(&format!("Usage: longsight {command}")), "{}", end.out);
        assert!(end.err.is_empty(), "{}", end.err);
    }
    assert_eq!(home.run(&[]).code, Some(2));
}

#[test]
fn devices_are_listed() {
    let home = Home::new();
    let found = home.run(&["devices", "--no-measure", "--format", "json"]).json();
    let rows = found.as_array().unwrap();
    assert_eq!(rows.len(), 3, "{found}");
    assert_eq!(rows[0]["capabilities"]["backend"], "cpu");
    for row in &rows[1..] {
        let why = row["unavailable"].as_str().is_some_and(|s| s.len() > 20);
        assert!(why || row["capabilities"]["device"].is_string(), "{row}");
    }
    let table = home.run(&["devices", "--no-measure"]);
    assert_eq!(table.code, Some(0));
    assert!(table.out.contains("cpu") && table.out.contains("cuda"), "{}", table.out);
    assert!(!table.out.contains("cuda: cuda:") && !table.out.contains(": cuda:"), "{}", table.out);
}

#[test]
fn a_prompt_is_answered() {
    let home = Home::new();
    let model = home.model();
    let long = "The river ran on past the mill and the two old bridges. ".repeat(4);
    let sparse = ["--dense-layers", "0", "--dense-below", "0", "--budget", "64"];
    let report = home.run(&run_on(&model, &["--json", "--raw", &long])).json();
    let tokens = |r: &Value, key: &str| r["stats"][key].as_u64().unwrap();
    assert!(report["answer"].is_string(), "{report}");
    assert!(tokens(&report, "prompt_tokens") >= long.len() as u64, "{report}");
    assert!(tokens(&report, "generated_tokens") <= 4, "{report}");
    assert_eq!(report["method"], "sparcas");
    assert_eq!(tokens(&report, "kv_bytes"), tokens(&report, "kv_bytes_dense"));

    // Sparse, with a text from a file, a question, an audit, and keys ordered once.
    let file = home.file("text.txt", long.as_bytes());
    let more = [&["--json", "-f", &file, "--ask", "Which?", "--audit", "1"][..], &sparse].concat();
    let report = home.run(&run_on(&model, &more)).json();
    assert!(tokens(&report, "kv_bytes") < tokens(&report, "kv_bytes_dense"), "{report}");
    let cached: Vec<PathBuf> =
        home.files().into_iter().filter(|f| f.starts_with(home.path("cache"))).collect();
    assert_eq!(cached.len(), 1, "{cached:?}");
    assert!(text(&cached[0]).ends_with(".json"), "{cached:?}");

    // Without --json the answer goes to stdout, the statistics to stderr.
    let shown = home.run(&run_on(&model, &["hello"]));
    assert_eq!(shown.code, Some(0), "{shown:?}");
    assert!(shown.err.contains("prompt tokens"), "{shown:?}");
    assert!(!shown.out.contains("prompt tokens"), "{shown:?}");
}

#[test]
fn lists_of_options_are_rows_of_an_evaluation() {
    let home = Home::new();
    let model = home.model();
    let prose = home.file("prose.txt", "The mill stood by the river. ".repeat(9).as_bytes());
    let sizes = ["--lengths", "200", "--score", "4", "--audit", "0", "--dense-layers", "0"];
    let lists = ["--budget", "64,96", "--dims", "8,16", "--methods", "window,sparcas-paper"];
    let on = ["eval", "copy", "-m", &model, "-d", "cpu", "--text", &prose];
    let report = home.run(&[&on, &sizes[..], &lists, &["--format", "json"]].concat()).json();
    let names = |key: &str| -> Vec<String> {
        let list = report[key].as_array().unwrap().iter();
        list.map(|r| r["method"].as_str().unwrap().to_string()).collect()
    };
    let methods = [
        "window:budget=64",
        "window:budget=96",
        "sparcas-paper:budget=64:dims=8",
        "sparcas-paper:budget=64:dims=16",
        "sparcas-paper:budget=96:dims=8",
        "sparcas-paper:budget=96:dims=16",
    ];
    assert_eq!(names("methods"), methods);
    assert_eq!(names("rows"), [&["dense"], &methods[..]].concat());
    assert_eq!(report["methods"][3]["options"]["dims"], 16);
    let read = |row: usize| report["rows"][row]["kv_bytes"].as_u64().unwrap();
    assert!(read(3) < read(5) && read(3) < read(4) && read(6) < read(0), "{report}");
    let table = home.run(&[&on, &sizes[..], &lists].concat());
    assert!(methods.iter().all(|m| table.out.contains(m)), "{table:?}");
    home.refused(&[&on[..], &["--budget", "64,few"]].concat(), &["few", "--budget"]);
}

#[test]
fn plans_are_printed_saved_and_run() {
    let home = Home::new();
    let model = home.model();
    let saved = text(&home.path("plan.json"));
    let sparse = ["--dense-layers", "1", "--dims", "8", "--budget", "64"];
    let save = ["plan", "-m", &model, "--method", "sparcas", "--save", &saved, "--format", "json"];
    let printed = home.run(&[&save[..], &sparse].concat()).json();
    let plan: Plan = serde_json::from_value(printed).unwrap();
    assert_eq!((plan.method.as_str(), plan.layers.len()), ("sparcas", 2));
    let read: Plan = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    assert_eq!(read, plan);
    let report = home.run(&run_on(&model, &["--json", "--plan", &saved, "hello"])).json();
    assert_eq!(report["method"], "sparcas");
    let table = home.run(&["plan", "-m", &model, "--method", "dense"]);
    assert_eq!(table.code, Some(0));
    assert!(table.out.contains("dense") && table.out.contains("100.0 %"), "{}", table.out);
}

/// The order of the keys is measured once per model and kept, so it must not depend on who asks first.
#[test]
fn the_order_of_keys_does_not_depend_on_the_context() {
    let order = |home: &Home, context: &str| -> Value {
        let model = home.model();
        let more = ["--ctx", context, "--chunk", context, "--dense-layers", "0", "hello"];
        assert_eq!(home.run(&run_on(&model, &more)).code, Some(0));
        let cached = home.files().into_iter().filter(|f| f.starts_with(home.path("cache")));
        let cached: Vec<PathBuf> = cached.collect();
        assert_eq!(cached.len(), 1, "{cached:?}");
        serde_json::from_slice(&std::fs::read(&cached[0]).unwrap()).unwrap()
    };
    let (short, long) = (Home::new(), Home::new());
    let measured = order(&short, "64");
    assert_eq!(measured, order(&long, "512"));
    assert_eq!(measured["source"]["tokens"], 512, "all that the model was trained for");
    // An order that was measured on something else is not used.
    let file = short.files().into_iter().find(|f| f.starts_with(short.path("cache"))).unwrap();
    for (key, value) in [("tokens", Value::from(64)), ("text", "other".into())] {
        let mut other = measured.clone();
        other["source"][key] = value;
        other["pairs"][0][0].as_array_mut().unwrap().reverse();
        std::fs::write(&file, other.to_string()).unwrap();
        assert_eq!(order(&short, "512"), measured, "{key}");
    }
}

#[test]
fn a_plan_may_not_select_where_the_model_has_a_window() {
    let home = Home::new();
    let model = home.model();
    let sparse = ["--dense-layers", "0", "--budget", "64", "--format", "json"];
    let mut plan = home.run(&[&["plan", "-m", &model][..], &sparse].concat()).json();
    // Fits any model of two layers.
    plan["model"] = "".into();
    let saved = home.file("plan.json", plan.to_string().as_bytes());
    let on = |model: &str| home.run(&run_on(model, &["--plan", &saved, "hello"])).code;
    assert_eq!(on(&model), Some(0));
    let windowed = home.path("windowed");
    let tiny = Tiny::new(Arch::Mistral, false, 5);
    tiny.write_hf(&windowed, Quant::F32, 1);
    let mut config = tiny.hf_config();
    config["sliding_window"] = 32.into();
    home.file("windowed/config.json", config.to_string().as_bytes());
    let names = ["sparcas", "last 32", "dense"];
    home.refused(&run_on(&text(&windowed), &["--plan", &saved, "hello"]), &names);
    home.refused(&["plan", "-m", &text(&windowed), "--plan", &saved], &names);
}

#[test]
fn options_that_would_change_nothing_are_refused() {
    let home = Home::new();
    let model = home.model();
    let run: [(&[&str], &[&str]); 9] = [
        (&["--plan", "p.json", "--method", "dense"], &["--plan", "--method"]),
        (&["--plan", "p.json", "--budget", "64"], &["--plan", "--budget"]),
        (&["--plan", "p.json", "--dense-layers", "0"], &["--plan", "--dense-layers"]),
        (&["--method", "dense", "--budget", "64"], &["--budget changes nothing in dense"]),
        (&["--method", "sparcas", "--update", "8"], &["--update changes nothing in sparcas"]),
        (&["--method", "window", "--pool", "max-softmax"], &["--pool changes nothing"]),
        (&["--method", "dense:budget=64"], &["\"budget\" is no option", "reads none"]),
        (&["--method", "oracle:dims=8"], &["\"dims\" is no option", "reads budget"]),
        (&["--method", "sparcas:dims=few"], &["\"few\" is no value for dims"]),
    ];
    for (more, names) in run {
        home.refused(&run_on(&model, &[more, &["hi"]].concat()), names);
    }
    home.refused(&["chat", "-m", &model, "--json"], &["--json"]);
    let help = home.run(&["chat", "--help"]).out;
    assert!(help.contains("/quit") && help.contains("Ctrl-D"), "{help}");
    home.refused(&["plan", "-m", &model, "--device", "cpu"], &["--device"]);
    home.refused(&["plan", "-m", &model, "--chunk", "8"], &["--chunk"]);
    let prose = home.file("prose.txt", b"The mill stood by the river.");
    let eval = ["eval", "copy", "-m", &model, "--text", &prose, "--lengths", "16"];
    let dims = ["--methods", "window,oracle", "--dims", "8,16"];
    home.refused(&[&eval[..], &dims].concat(), &["--dims changes nothing in window, oracle"]);
    home.refused(&[&eval[..], &["--score", "18446744073709551615"]].concat(), &["too few"]);
    let bench = ["bench", "-m", &model, "--methods", "dense", "--budget", "64"];
    home.refused(&bench, &["--budget changes nothing in dense"]);
}

/// `longsight ... | head`: the reader is gone before the first line.
#[test]
fn a_closed_pipe_is_no_error() {
    let home = Home::new();
    let model = home.model();
    let prose = home.file("prose.txt", "The mill stood by the river. ".repeat(9).as_bytes());
    let eval = ["eval", "ppl", "-m", &model, "-d", "cpu", "--text", &prose, "--methods", "window"];
    let eval = [&eval[..], &["--lengths", "100", "--score", "2", "--audit", "0"]].concat();
    let json = ["--format", "json"];
    let cases: [Vec<&str>; 8] = [
        vec!["devices", "--no-measure"],
        [&["devices", "--no-measure"][..], &json].concat(),
        vec!["plan", "-m", &model],
        [&["plan", "-m", &model][..], &json].concat(),
        run_on(&model, &["hi"]),
        run_on(&model, &["hi", "--json"]),
        [&eval[..], &["--layers"]].concat(),
        [&eval[..], &json].concat(),
    ];
    for arguments in cases {
        for both in [false, true] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let mut command = home.command(&arguments);
            if both {
                command.stderr(writer.try_clone().unwrap());
            }
            let done = command.stdout(writer).output().unwrap();
            let said = String::from_utf8(done.stderr).unwrap();
            assert_eq!(done.status.code(), Some(0), "{arguments:?}: {said}");
            assert!(!said.contains("panicked") && !said.contains("error"), "{said}");
        }
    }
}

#[test]
fn bad_model_files_are_refused() {
    let home = Home::new();
    home.refused(&run_on("/no/such/model", &["hi"]), &["/no/such/model"]);
    let empty = home.file("empty.gguf", b"");
    home.refused(&run_on(&empty, &["hi"]), &["empty.gguf"]);
    Tiny::new(Arch::Llama, false, 5).write_gguf(&home.path("whole.gguf"), Quant::Q8_0);
    let whole = std::fs::read(home.path("whole.gguf")).unwrap();
    for (name, keep) in [("head.gguf", 100), ("half.gguf", whole.len() / 2)] {
        let cut = home.file(name, &whole[..keep]);
        home.refused(&run_on(&cut, &["hi"]), &[name]);
        home.refused(&["plan", "-m", &cut], &[name]);
    }
    std::fs::remove_file(home.path("model").join("tokenizer.json")).unwrap();
    home.refused(&run_on(&home.model(), &["hi"]), &["tokenizer", &home.model()]);
}

#[test]
fn bad_options_are_refused() {
    let home = Home::new();
    let model = home.model();
    let cases: [(&[&str], &[&str]); 16] = [
        (&["hi", "--method", "bogus"], &["bogus", "sparcas"]),
        (&["hi", "--method", "sparca"], &["did you mean `sparcas`?"]),
        (&["hi", "--method", "sparcas:budgt=64"], &["\"budgt\" is no option", "mean `budget`?"]),
        (&["hi", "--dtype", "f8"], &["f8", "bf16"]),
        (&["hi", "--dense-layers", "0", "--dims", "12"], &["12", "--dims"]),
        (&["hi", "--dense-layers", "0", "--dims", "64"], &["64", "--dims"]),
        (&["hi", "--dense-layers", "0", "--budget", "8"], &["budget of 8"]),
        (&["hi", "--ctx", "513"], &["513", "512", "--ctx"]),
        (&["hi", "--ctx", "0"], &["0 tokens", "--ctx"]),
        (&["hi", "--chunk", "0"], &["--chunk", "from 1 on"]),
        (&["hi", "--temp", "-1"], &["-1", "--temp", "0.7"]),
        (&["hi", "--top-p", "-1"], &["-1", "--top-p", "from 0 to 1"]),
        (&["hi", "--min-p", "1.5"], &["1.5", "--min-p", "from 0 to 1"]),
        (&["hi", "--stop", ""], &["--stop", "some text"]),
        (&["--ask", "Which?"], &["--ask", "-f FILE"]),
        (&["hi", "--plan", "/no/such/plan.json"], &["/no/such/plan.json"]),
    ];
    for (more, names) in cases {
        home.refused(&run_on(&model, more), names);
    }
    home.refused(&["plan", "-m", &model, "--save", "/proc/nope/x"], &["/proc/nope/x"]);
    for ctx in ["0", "513"] {
        home.refused(&["plan", "-m", &model, "--ctx", ctx], &[ctx, "1 to 512", "--ctx"]);
    }
    let folder = text(home.0.path());
    home.refused(&["plan", "-m", &model, "--save", &folder], &[&folder]);
    let wrong = home.file("wrong.json", b"{\"layers\": 3}");
    home.refused(&run_on(&model, &["hi", "--plan", &wrong]), &["wrong.json", "plan"]);
}

#[test]
fn bad_prompts_are_refused() {
    let home = Home::new();
    let model = home.model();
    home.refused(&run_on(&model, &[""]), &["prompt is empty"]);
    // Standard input is empty as well.
    home.refused(&run_on(&model, &[]), &["prompt is empty"]);
    let none = text(&home.path("none.txt"));
    home.refused(&run_on(&model, &["-f", &none]), &["none.txt"]);
    let latin = home.file("latin.txt", b"caf\xe9 au lait");
    home.refused(&run_on(&model, &["-f", &latin, "--ask", "What?"]), &["latin.txt", "UTF-8"]);
    let long = home.file("long.txt", "far too long ".repeat(60).as_bytes());
    // The model was trained for 512 tokens, one per byte of this text.
    home.refused(&run_on(&model, &["-f", &long]), &["780 tokens", "512"]);
    home.refused(&run_on(&model, &["-f", &long, "--ctx", "128"]), &["780 tokens", "128"]);
}

#[test]
fn missing_models_are_refused() {
    let home = Home::new();
    home.refused(&["plan", "-m", "smolm2"], &["there is no smolm2", "mean `smollm2`?"]);
    let shapes = ["there is no random:llama;", "random:qwen3-8b", "mean `llama-3.1-8b`?"];
    home.refused(&["plan", "-m", "random:llama"], &shapes);
}

#[test]
fn missing_devices_are_refused() {
    let home = Home::new();
    let model = home.model();
    let on = |device| ["run", "-m", &model, "--device", device, "hi"];
    home.refused(&on("abacus"), &["abacus", "cuda"]);
    home.refused(&on("gpu"), &["did you mean `wgpu`?"]);
    home.refused(&on("cdua:0"), &["did you mean `cuda`?"]);
    home.refused(&on("cuda:first"), &["first", "cuda:0"]);
    home.refused(&on("wgpu:no such adapter"), &["wgpu"]);
    if longsight::backend::open("cuda").is_err() {
        home.refused(&on("cuda"), &["cuda", "driver"]);
    }
    // No Vulkan driver; Metal and DX12 bring their own.
    if cfg!(target_os = "linux") {
        let none = [("VK_DRIVER_FILES", "/nonexistent"), ("VK_ICD_FILENAMES", "/nonexistent")];
        home.refused_in(&none, &on("wgpu"), &["wgpu", "adapter"]);
    }
}
