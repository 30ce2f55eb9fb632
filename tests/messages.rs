//! What the program says beside its results: options that would change nothing, files it wrote and how to use them,
//! names as users type them, help that fits the terminal.

mod common;

use common::program::{Home, run_on, text};
use longsight::select::METHODS;

const SPARSE: [&str; 6] = ["--dense-layers", "0", "--dense-below", "0", "--budget", "64"];

fn prose(home: &Home) -> String {
    home.file("prose.txt", "It was a bright cold day in April. ".repeat(60).as_bytes())
}

fn lines<'a>(said: &'a str, holding: &str) -> Vec<&'a str> {
    said.lines().filter(|l| l.contains(holding)).collect()
}

/// Before any work: the model is not even looked for.
#[test]
fn pieces_that_leave_nothing_to_learn_are_refused_at_once() {
    let home = Home::new();
    let (prose, out) = (prose(&home), text(&home.path("f.safetensors")));
    let train = ["train-forecast", "-m", "/no/such/model", "--text", &prose, "-o", &out];
    let names =
        ["1024 tokens", "16 blocks of 64", "--tokens", "at least 1025", "--blocks", "at most 15"];
    home.refused(&[&train[..], &["--tokens", "1024"]].concat(), &names);
    home.refused(&[&train[..], &["--tokens", "1025"]].concat(), &["/no/such/model"]);
    let few = ["--blocks", "6"];
    let both = ["--local-blocks", "6 blocks", "--tokens 4096 --blocks can be 7 to 63"];
    home.refused(&[&train[..], &few].concat(), &both);
    let neither = ["--tokens", "300", "--blocks", "7"];
    home.refused(&[&train[..], &neither].concat(), &["--tokens", "at least 449", "--blocks 7"]);
}

#[test]
fn a_forecast_that_nobody_reads_is_refused() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let ahead = ["--forecast", "lookahead"];
    let in_vain = ["--forecast changes nothing in", "sparcas", "--method sparda"];
    home.refused(&run_on(&model, &[&["hi"][..], &ahead].concat()), &in_vain);
    home.refused(&[&["chat", "-m", &model][..], &ahead].concat(), &in_vain);
    home.refused(&[&["plan", "-m", &model][..], &ahead].concat(), &in_vain);
    let bench = ["bench", "-m", &model, "-d", "cpu", "-p", "0", "-n", "2", "-D", "150", "-r", "1"];
    home.refused(&[&bench[..], &ahead].concat(), &in_vain);
    let eval = ["eval", "copy", "-m", &model, "-d", "cpu", "--text", &prose, "--lengths", "300"];
    home.refused(&[&eval[..], &ahead].concat(), &in_vain);
    // A plan from a file.
    let saved = text(&home.path("plan.json"));
    assert_eq!(home.run(&["plan", "-m", &model, "--save", &saved]).code, Some(0));
    let planned = ["hi", "--plan", &saved];
    home.refused(&run_on(&model, &[&planned[..], &ahead].concat()), &in_vain);
    // Commands that read densely do not know it.
    let out = text(&home.path("out"));
    for command in ["calibrate", "train-forecast"] {
        let base = [command, "-m", &model, "--text", &prose, "-o", &out];
        home.refused(&[&base[..], &ahead].concat(), &["--forecast"]);
    }
    // One method that reads it is enough.
    let mixed = ["--methods", "window,sparda", "--score", "4", "--audit", "0", "--budget", "128"];
    let done = home.run(&[&eval[..], &mixed, &ahead].concat());
    assert_eq!(done.code, Some(0), "{done:?}");
    let done = home.run(&run_on(&model, &[&["hi", "--method", "sparda"][..], &ahead].concat()));
    assert_eq!(done.code, Some(0), "{done:?}");
}

#[test]
fn a_file_that_holds_no_forecast_is_named() {
    let home = Home::new();
    let model = home.model();
    let weights = text(&home.path("model").join("model.safetensors"));
    let prose = prose(&home);
    for (file, lacks) in [(&weights, "q_future_proj"), (&prose, "no safetensors file")] {
        let forecast = ["--method", "sparda", "--forecast", file];
        let names = [file, "holds no Forecast", lacks, "train-forecast", "lookahead"];
        home.refused(&run_on(&model, &[&["hi"][..], &forecast].concat()), &names);
        home.refused(&[&["plan", "-m", &model][..], &forecast].concat(), &names);
    }
}

#[test]
fn plans_are_printed_in_the_words_of_the_options() {
    let home = Home::new();
    // It has more layers than stay dense in front.
    let plan = ["plan", "-m", "tiny"];
    for m in METHODS.iter().filter(|m| m.name != "nosa") {
        let plan = home.run(&[&plan[..], &["--method", m.name]].concat());
        assert_eq!(plan.code, Some(0), "{plan:?}");
        for word in plan.out.split(|c: char| !c.is_alphanumeric() && c != '_') {
            let humps = word.len() > 2
                && word.chars().skip(1).any(char::is_uppercase)
                && word.chars().any(char::is_lowercase);
            assert!(!humps && !word.contains('_'), "{}: {word} in {}", m.name, plan.out);
        }
        assert!(!plan.out.contains('{'), "{}", plan.out);
        let asks = plan.out.contains("--forecast lookahead");
        assert_eq!(asks, m.name == "sparda", "{}", plan.out);
    }
    let of = |more: &[&str]| home.run(&[&plan[..], more].concat()).out;
    assert!(of(&["--pool", "max-softmax"]).contains("; pool max-softmax; "));
    assert!(
        of(&["--method", "infllm2"]).contains("by means of 32 keys every 16; pool mean-softmax")
    );
    assert!(
        of(&["--method", "sparcas-paper", "--metric", "pair-qk", "--unit", "2"])
            .contains("by pair-qk in")
    );
    let known = of(&["--method", "sparda", "--forecast", "lookahead"]);
    assert!(
        known.contains("Forecast of the layer before") && !known.contains("--forecast"),
        "{known}"
    );
    home.refused(&[&plan[..], &["--pool", "median"]].concat(), &["median", "max-softmax"]);
}

#[test]
fn rows_of_a_measurement_are_named_as_they_were_asked_for() {
    let home = Home::new();
    let model = home.model();
    let bench = ["bench", "-m", &model, "-d", "cpu", "-p", "0", "-n", "2", "-D", "150", "-r", "1"];
    let of = |more: &[&str]| -> Vec<String> {
        let json = ["--dense-layers", "0", "--dense-below", "0", "--format", "json"];
        let report = home.run(&[&bench[..], more, &json].concat()).json();
        let rows = report["rows"].as_array().unwrap().iter();
        rows.map(|r| r["method"].as_str().unwrap().to_owned()).collect()
    };
    let pools = ["--methods", "sparcas:pool=max-logit,sparcas:pool=max-softmax", "--budget", "64"];
    assert_eq!(of(&pools), ["dense", "sparcas:pool=max-logit", "sparcas:pool=max-softmax"]);
    // One name for a list of budgets in every command, and the older one beside it.
    for name in ["--budget", "--budgets"] {
        let rows = ["dense", "sparcas:budget=64", "sparcas:budget=96"];
        assert_eq!(of(&[name, "64,96"]), rows);
    }
    for command in [&["eval", "copy"][..], &["bench"], &["bench", "attention"]] {
        let help = home.run(&[command, &["--help"]].concat()).out;
        assert!(help.contains("--budget <TOKENS,...>") && help.contains(": --budgets]"), "{help}");
    }
}

#[test]
fn files_that_were_written_are_named_with_their_use() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let at = |name: &str| text(&home.path(name));
    let one = |arguments: &[&str], holding: &[&str]| {
        let done = home.run(arguments);
        assert_eq!(done.code, Some(0), "{done:?}");
        let wrote = lines(&done.err, "wrote ");
        assert_eq!(wrote.len(), 1, "{done:?}");
        assert!(holding.iter().all(|h| wrote[0].contains(h)), "{holding:?}: {done:?}");
        assert!(!done.out.contains("wrote "), "{done:?}");
        wrote[0].split_once("to use it: longsight ").map(|(_, c)| c.to_owned())
    };
    // What is said can be done.
    let follow = |command: Option<String>| {
        let command = command.unwrap().replace("TEXT", &prose).replace("QUESTION", "Why");
        let words: Vec<&str> =
            command.split(' ').chain(["-d", "cpu", "-n", "2", "--chunk", "64"]).collect();
        let words: Vec<&str> = words.iter().map(|w| w.trim_matches('\'')).collect();
        let file = words.iter().position(|w| *w == prose).unwrap();
        let short = home.file("short.txt", b"It was cold.");
        let words = [&words[..file], &[&*short], &words[file + 1..]].concat();
        let done = home.run(&words);
        assert_eq!(done.code, Some(0), "{words:?}: {done:?}");
    };
    let plan = at("a.plan.json");
    follow(one(&["plan", "-m", &model, "--save", &plan], &[&plan, "run -m", "--plan"]));
    let sparda = ["plan", "-m", &model, "--method", "sparda", "--forecast", "lookahead"];
    follow(one(&[&sparda[..], &["--save", &plan]].concat(), &["--forecast lookahead", "--plan"]));
    let kascade = at("k.plan.json");
    let sizes = ["--tokens", "400", "--prompts", "1", "--dtype", "f32", "--format", "json"];
    let calibrate = ["calibrate", "-m", &model, "-d", "cpu", "--text", &prose, "-o", &kascade];
    follow(one(&[&calibrate[..], &sizes].concat(), &[&kascade, "--plan"]));
    let forecast = at("f.safetensors");
    let sizes = [
        "--tokens",
        "400",
        "--pieces",
        "1",
        "--blocks",
        "4",
        "--local-blocks",
        "1",
        "--steps",
        "1",
    ];
    let train = ["train-forecast", "-m", &model, "-d", "cpu", "--text", &prose, "-o", &forecast];
    follow(one(&[&train[..], &sizes].concat(), &["--method sparda --forecast", &forecast]));
    let run = at("run.json");
    let bench = ["bench", "-m", &model, "-d", "cpu", "-p", "4", "-n", "0", "-D", "0", "-r", "1"];
    assert_eq!(one(&[&bench[..], &["-o", &run]].concat(), &[&run]), None);
    let eval = ["eval", "copy", "-m", &model, "-d", "cpu", "--text", &prose, "--lengths", "100"];
    let score = ["--score", "4", "--audit", "0", "-o", &run, "--format", "json"];
    assert_eq!(one(&[&eval[..], &score].concat(), &[&run]), None);
}

#[test]
fn an_audit_that_measured_nothing_says_why() {
    let home = Home::new();
    let model = home.model();
    let long = "The river ran on past the mill and the two old bridges. ".repeat(4);
    let said = |more: &[&str]| -> Vec<String> {
        let done = home.run(&run_on(&model, &[&["--raw", &long][..], more].concat()));
        assert_eq!(done.code, Some(0), "{done:?}");
        lines(&done.err, "measured nothing").iter().map(ToString::to_string).collect()
    };
    let dense = said(&["--audit", "1", "--dense-layers", "0"]);
    assert_eq!(dense.len(), 1);
    assert!(
        dense[0].contains("no step was sparse") && dense[0].contains("--dense-below"),
        "{dense:?}"
    );
    let two = said(&["--audit", "1"]);
    assert!(two[0].contains("--dense-layers"), "the model has two layers: {two:?}");
    let other = said(&["--audit", "1", "--method", "dense"]);
    assert!(other[0].contains("dense attends to every token"), "{other:?}");
    assert!(said(&[&["--audit", "1"][..], &SPARSE].concat()).is_empty());
    assert!(said(&["--audit", "0"]).is_empty() && said(&[]).is_empty());
    let json = home.run(&run_on(&model, &["--raw", &long, "--audit", "1", "--json"]));
    assert!(json.json()["audit"].is_object() && json.err.contains("measured nothing"), "{json:?}");
}

#[test]
fn a_software_driver_is_called_one() {
    let home = Home::new();
    let model = home.model();
    let software = longsight::backend::open("wgpu").is_ok_and(|b| b.caps().software);
    let told = |arguments: &[&str]| lines(&home.run(arguments).err, "software driver").len();
    let on = |device| {
        let run = ["run", "-m", &model, "-d", device, "-n", "2", "hi"];
        let bench =
            ["bench", "-m", &model, "-d", device, "-p", "4", "-n", "0", "-D", "0", "-r", "1"];
        [told(&run), told(&bench)]
    };
    assert_eq!(on("wgpu"), [usize::from(software); 2]);
    assert_eq!(on("cpu"), [0; 2]);
    assert_eq!(on("auto"), [0; 2], "never chosen by itself");
    let table = home.run(&["devices", "--no-measure"]).out;
    assert_eq!(table.contains("software driver: -d cpu is faster"), software, "{table}");
}

#[test]
fn a_run_with_other_settings_says_which() {
    let home = Home::new();
    let (model, prose, out) = (home.model(), prose(&home), text(&home.path("k.plan.json")));
    let calibrate = ["calibrate", "-m", &model, "-d", "cpu", "--dtype", "f32", "--text", &prose];
    let sizes = ["--tokens", "400", "--prompts", "1", "-o", &out];
    let command = [&calibrate[..], &sizes].concat();
    assert_eq!(home.run(&command).code, Some(0));
    let other = [&command[..], &["--keys", "16", "--own-tile", "published"]].concat();
    let names = ["k.plan.json.state", "remove it", "another output", "--keys, --own-tile"];
    home.refused(&other, &names);
    let said = home.run(&other).err;
    assert_eq!(lines(&said, "was "), ["  keys: was 32, is 16", "  own: was right, is published"]);
    assert!(!said.contains('{'), "{said}");
    // The same text in other pieces is not another text.
    let shorter = [&calibrate[..], &["--tokens", "300", "--prompts", "1", "-o", &out]].concat();
    home.refused(&shorter, &["  tokens: was 400, is 300", "its own --tokens"]);
    let more = [&calibrate[..], &["--tokens", "400", "--prompts", "2", "-o", &out]].concat();
    assert_eq!(home.run(&more).code, Some(0));
    home.refused(&command, &["  prompts: was 2, is 1", "its own --prompts"]);
}

/// Paragraphs are broken where the terminal ends, and nowhere else.
#[test]
fn help_fits_the_terminal() {
    let home = Home::new();
    for columns in [80, 100] {
        let width = columns.to_string();
        let commands: [&[&str]; 8] = [
            &[],
            &["eval"],
            &["bench"],
            &["bench", "kernels"],
            &["bench", "attention"],
            &["eval", "ppl"],
            &["run"],
            &["plan"],
        ];
        for command in commands {
            let help = home.run_in(&[("COLUMNS", &width)], &[command, &["--help"]].concat()).out;
            let all: Vec<&str> = help.lines().collect();
            for pair in all.windows(2) {
                let (line, next) = (pair[0], pair[1]);
                assert!(line.len() <= columns, "{command:?}, {columns}: {line}");
                let example = next.starts_with("  ") && line.starts_with("  longsight ");
                assert!(
                    !example || next.starts_with("  longsight "),
                    "{command:?}: {line}\n{next}"
                );
                let starts = |l: &str| l.starts_with(|c: char| c.is_alphabetic());
                let word = next.split(' ').next().unwrap_or_default();
                let fits = line.len() + 1 + word.len() <= columns;
                let runs_on = starts(line) && starts(next) && !line.ends_with(':');
                assert!(!(runs_on && fits), "{command:?}, {columns}: {line}\n{next}");
            }
        }
    }
    let ctx = |command: &str| -> String {
        let help = home.run(&[command, "-h"]).out;
        let from = help.lines().skip_while(|l| !l.contains("--ctx")).take(2);
        from.map(str::trim).collect::<Vec<_>>().join(" ")
    };
    for (command, default) in [
        ("run", "what both need"),
        ("chat", "32,768"),
        ("plan", "the model's limit"),
        ("bench", "the longest test"),
        ("train-forecast", "[default: --tokens]"),
    ] {
        assert!(ctx(command).contains(default), "{command}: {}", ctx(command));
    }
    let help = home.run(&["run", "-h"]).out;
    assert!(
        help.split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
            .contains("[default: one layer in seven; omnikv"),
        "{help}"
    );
}

/// What cannot be is refused before texts are read and models run.
#[test]
fn a_calibration_that_cannot_be_is_refused_at_once() {
    let home = Home::new();
    let (model, prose, out) = (home.model(), prose(&home), text(&home.path("k.plan.json")));
    let of = |more: &[&str], names: &[&str]| {
        let base = ["calibrate", "-m", &model, "-d", "cpu", "--text", &prose, "-o", &out];
        home.refused(&[&base[..], more].concat(), names);
    };
    of(&["--method", "sparcas"], &["--method sparcas", "share no lists", "kascade"]);
    of(&["--anchors", "3", "--tokens", "400"], &["--anchors 3", "1 to 2"]);
    of(&["--anchors", "0+1"], &["0+1", "whole number"]);
    of(&["--tokens", "513"], &["--tokens 513", "512"]);
    of(&["--tokens", "400", "--prompts", "90"], &["of 90 pieces of 400 tokens", "--prompts"]);
    let weights = text(&home.path("model").join("model.safetensors"));
    let maps = ["plan", "-m", &model, "--method", "kascade", "--head-maps", &weights];
    home.refused(&maps, &["model.safetensors", ".npy"]);
    home.refused(&run_on(&model, &["hi", "--budget", "64,96"]), &["64,96", "one whole number"]);
    home.refused(
        &run_on(&model, &["hi", "--method", "quest:pool=x"]),
        &["\"x\" is no value", "max-logit"],
    );
}

/// Rows that would look sparse and are not.
#[test]
fn methods_that_attend_to_every_token_are_called_so() {
    let home = Home::new();
    let (model, prose) = (home.model(), prose(&home));
    let eval = ["eval", "copy", "-m", &model, "-d", "cpu", "--text", &prose, "--lengths", "300"];
    let sizes = ["--score", "4", "--audit", "0", "--methods", "window:budget=300,window:budget=64"];
    let sparse = ["--dense-layers", "0"];
    let said = home.run(&[&eval[..], &sizes, &sparse].concat()).err;
    let notes = lines(&said, "attends to every token");
    assert_eq!(notes.len(), 1, "{said}");
    assert!(notes[0].contains("window:budget=300") && notes[0].contains("--lengths"), "{said}");
    let shape =
        ["--layers", "1", "--heads", "2", "--kv-heads", "1", "--head-dim", "32", "-D", "300"];
    let bench = ["bench", "attention", "-d", "cpu", "-b", "1", "--steps", "2"];
    let methods = ["--methods", "quest,quest:dense-below=0:budget=64", "--dense-layers", "0"];
    let report = home.run(&[&bench[..], &shape, &methods, &["--format", "json"]].concat()).json();
    let rows: Vec<&str> =
        report["rows"].as_array().unwrap().iter().map(|r| r["method"].as_str().unwrap()).collect();
    assert_eq!(rows, ["dense", "quest:dense-below=0:budget=64"]);
    assert!(report["notes"][0].as_str().unwrap().contains("up to 2048"), "{report}");
}

/// The command line shows values as users type them: nothing of it prints a type as the compiler names it.
#[test]
fn no_debug_output_is_shown() {
    let mut folders = vec![common::readme::file("src/cli")];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = std::fs::read_to_string(&path).unwrap();
            let shown = source.split("#[cfg(test)]").next().unwrap();
            assert!(!shown.contains(":?}"), "{}", path.display());
            files += 1;
        }
    }
    assert!(files > 20, "{files}");
}
