//! What the program says of things that are not errors, and what the keys and spellings of all commands do.

mod common;

use common::program::{Home, run_on, text};
use std::io::Write;
use std::process::Stdio;

/// What a run with this on standard input says on standard error.
fn said_with(home: &Home, arguments: &[&str], input: &str) -> String {
    let mut command = home.command(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    // A program that does not read it may be gone already.
    let _ = pipe.write_all(input.as_bytes());
    drop(pipe);
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
    String::from_utf8(done.stderr).unwrap()
}

#[test]
fn standard_input_that_is_not_read_is_mentioned() {
    let home = Home::new();
    let (model, file) = (home.model(), home.file("a.txt", b"The mill stood by the river."));
    let note = "standard input is not read; -f - reads it";
    let said = |more: &[&str]| said_with(&home, &run_on(&model, more), "a text");
    assert!(said(&["hi"]).contains("beside a prompt standard input"));
    assert!(said(&["-f", &file]).contains("beside -f standard input"));
    for read in [&["-f", "-", "hi"][..], &["--ask", "Who?"], &[]] {
        assert!(!said(read).contains(note), "{read:?}");
    }
    // Nothing was piped.
    let quiet = home.run(&run_on(&model, &["hi"])).err;
    assert!(!quiet.contains(note), "{quiet}");
    // A pipe that nobody closes is not waited for.
    let (reader, writer) = std::io::pipe().unwrap();
    let done = home.command(&run_on(&model, &["hi"])).stdin(reader).output().unwrap();
    assert!(done.status.success() && String::from_utf8_lossy(&done.stderr).contains(note));
    drop(writer);
}

#[test]
fn json_is_asked_for_by_either_name() {
    let home = Home::new();
    let model = home.model();
    let prose = home.file("prose.txt", "The mill stood by the river. ".repeat(9).as_bytes());
    let eval = ["eval", "copy", "-m", &model, "-d", "cpu", "--text", &prose, "--lengths", "100"];
    let eval = [&eval[..], &["--score", "2", "--audit", "0", "--methods", "window"]].concat();
    let bench = ["bench", "-m", &model, "-d", "cpu", "-p", "4", "-n", "0", "-D", "0", "-r", "1"];
    let commands =
        [run_on(&model, &["hi"]), vec!["plan", "-m", &model], eval, bench.into(), vec!["devices"]];
    for command in commands {
        let command: Vec<&str> = match command[..] {
            ["devices"] => vec!["devices", "--no-measure"],
            _ => command,
        };
        for spelling in [&["--json"][..], &["--format", "json"]] {
            home.run(&[&command[..], spelling].concat()).json();
        }
        let both = [&command[..], &["--json", "--format", "json"]].concat();
        home.refused(&both, &["--json", "--format"]);
    }
    for command in [&["calibrate"][..], &["train-forecast"], &["bench", "kernels"]] {
        let help = home.run(&[command, &["--help"]].concat()).out;
        assert!(help.contains("--json") && help.contains("--format"), "{help}");
    }
}

#[test]
fn a_plan_for_shorter_texts_is_told_of() {
    let home = Home::new();
    let (model, saved) = (home.model(), text(&home.path("plan.json")));
    let sparse = ["--dense-layers", "0", "--budget", "64", "--ctx", "100"];
    let plan = ["plan", "-m", &model, "--save", &saved];
    assert_eq!(home.run(&[&plan[..], &sparse].concat()).code, Some(0));
    let said = |ctx| {
        let done = home.run(&run_on(&model, &["hi", "--plan", &saved, "--ctx", ctx]));
        assert_eq!(done.code, Some(0), "{done:?}");
        done.err.matches("was made for texts of up to 100 tokens").count()
    };
    assert_eq!((said("100"), said("101")), (0, 1));
}

#[test]
fn random_weights_are_planned_for_no_million_tokens() {
    let home = Home::new();
    let plan = ["plan", "-m", "random:llama-3.1-8b"];
    let out = home.run(&plan).out;
    assert!(out.contains("(32 layers, 32,768 tokens; --ctx says otherwise)"), "{out}");
    let out = home.run(&[&plan[..], &["--ctx", "65536"]].concat()).out;
    assert!(out.contains("(32 layers, 65,536 tokens)"), "{out}");
}

/// Before any weight is read: 32 GB of them, and 281 GB of KV cache.
#[test]
fn a_model_that_memory_cannot_hold_is_refused() {
    let free = longsight::backend::open("cpu").unwrap().free_memory();
    if free.is_none_or(|free| free > 300 << 30) {
        println!(
            "skipped: the system does not say what memory is free, or there is room for 307 GB"
        );
        return;
    }
    let home = Home::new();
    let run = ["run", "-m", "random:llama-3.1-8b", "-d", "cpu", "--dtype", "f32", "hi"];
    let names = ["weights take 32.1 GB", "1048576 tokens 274.9 GB", "are free", "--ctx"];
    let end = home.run(&[&run[..], &["--ctx", "1048576"]].concat());
    assert_eq!(end.code, Some(1), "{end:?}");
    for name in names {
        assert!(end.err.contains(name), "{name}: {end:?}");
    }
}

#[cfg(unix)]
#[test]
fn the_first_interrupt_is_answered() {
    use std::time::{Duration, Instant};
    let home = Home::new();
    let (model, out) = (home.model(), text(&home.path("k.json")));
    let words: String = (0..900).map(|i| format!("{} is no {}. ", i * i % 997, i % 89)).collect();
    let prose = home.file("prose.txt", words.as_bytes());
    let on = ["calibrate", "-m", &model, "-d", "cpu", "--dtype", "f32", "--text", &prose];
    let sizes = ["--tokens", "500", "--prompts", "10", "-o", &out];
    let mut command = home.command(&[&on[..], &sizes].concat());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The first piece is done: from before that on Ctrl-C is heard.
    let start = Instant::now();
    while !home.path("k.json.state").exists() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let done = child.wait_with_output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(130), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    let place = |what: &str| lines.iter().position(|l| l.contains(what));
    let (first, then) = (place("Ctrl-C again ends at once"), place("the same command goes on"));
    assert!(first.is_some() && first < then, "{said}");
}
