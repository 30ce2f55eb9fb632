//! What the program says of plans and options that do not fit: which one, in which file, and what would.

mod common;

use common::program::{Home, run_on, text};

/// The file, the layer and what to edit; options would be refused beside --plan.
#[test]
fn a_plan_that_was_edited_is_named_with_its_layer() {
    let home = Home::new();
    let (model, prose, saved) = (
        home.model(),
        home.file("prose.txt", "It was a bright cold day in April. ".repeat(60).as_bytes()),
        text(&home.path("my.plan.json")),
    );
    let plan = ["plan", "-m", &model, "--budget", "512", "--dense-layers", "0", "--save", &saved];
    assert_eq!(home.run(&plan).code, Some(0));
    let plan = std::fs::read_to_string(&saved).unwrap();
    let edited = |from: &str, to: &str| {
        assert!(plan.contains(from), "{plan}");
        home.file("bad.plan.json", plan.replace(from, to).as_bytes())
    };
    let eval = ["eval", "copy", "-m", &model, "-d", "cpu", "--text", &prose, "--lengths", "300"];
    let bench = ["bench", "-m", &model, "-d", "cpu", "-p", "0", "-n", "2", "-D", "150", "-r", "1"];
    let refused = |file: &str, names: &[&str]| {
        let given = ["--plan", file];
        home.refused(&run_on(&model, &[&["hi"][..], &given].concat()), names);
        for command in [&eval[..], &bench, &["plan", "-m", &model], &["chat", "-m", &model]] {
            home.refused(&[command, &given].concat(), names);
        }
    };
    let small = edited("\"tokens\": 512", "\"tokens\": 0");
    let names = ["bad.plan.json", "layer 0", "budget of 0", "give 36 or more", "edit the layer"];
    refused(&small, &[&names[..], &["budget.tokens"]].concat());
    assert!(!home.run(&run_on(&model, &["hi", "--plan", &small])).err.contains("--budget"));
    let misspelt = edited("\"tokens\"", "\"tokns\"");
    refused(&misspelt, &["bad.plan.json", "damaged", "unknown field `tokns`", "at line "]);
}

/// All options that a method reads, the one at fault among them.
#[test]
fn options_that_do_not_fit_are_among_those_that_are_named() {
    let home = Home::new();
    // It is unpacked once.
    assert_eq!(home.run(&["plan", "-m", "tiny"]).code, Some(0));
    let of = |more: &[&str], names: &[&str]| {
        home.refused(&[&["plan", "-m", "tiny"][..], more].concat(), names);
    };
    of(&["--mass", "95"], &["a share from 0.001 to 1", "95 per cent are 0.95", "--mass"]);
    of(&["--floor", "2"], &["2 per cent are 0.02", "--floor"]);
    of(&["--method", "kascade", "--percent", "0"], &["0 percent", "--percent"]);
    of(&["--method", "kascade", "--anchors", "0"], &["0 anchor layers: give 1 to", "--anchors"]);
    of(&["--budget", "8"], &["4 sinks and 32 recent", "give 36 or more", "--budget", "--sinks"]);
}

#[test]
fn negative_numbers_are_refused_by_the_option() {
    let home = Home::new();
    let model = home.model();
    for option in ["--budget", "--ctx", "--mass", "--audit", "--temp", "--seed"] {
        let value = if option == "--mass" { "-0.5" } else { "-5" };
        let done = home.run(&run_on(&model, &["hi", "--dense-layers", "0", option, value]));
        assert!(!matches!(done.code, Some(0 | 101)), "{done:?}");
        let said = if option == "--mass" { "a share from" } else { option };
        assert!(done.err.contains(said) && !done.err.contains("unexpected"), "{done:?}");
    }
    let eval = ["eval", "copy", "-m", &model, "--text", "x.txt", "--lengths", "-3"];
    home.refused(&eval, &["'-3' for '--lengths"]);
    home.refused(&["bench", "-D", "-5"], &["'-5' for '--depth"]);
}

/// A longer text would not help.
#[test]
fn the_limit_of_the_model_comes_before_that_of_the_text() {
    let home = Home::new();
    let (model, short) = (home.model(), home.file("short.txt", b"It was cold."));
    for evaluation in ["ppl", "copy", "passkey", "recall", "needle"] {
        let eval = ["eval", evaluation, "-m", &model, "-d", "cpu", "--text", &short];
        let names = ["a sample of 1200 tokens", "trained for", "--lengths"];
        home.refused(&[&eval[..], &["--lengths", "1200"]].concat(), &names);
    }
}

#[cfg(unix)]
#[test]
fn places_that_cannot_be_written_to_are_named_once() {
    let home = Home::new();
    let file = home.file("file", b"");
    let inside = format!("{file}/cache");
    let cache = [("LONGSIGHT_CACHE", &*inside)];
    home.refused_in(&cache, &["plan", "-m", "tiny"], &[&inside, "hint: LONGSIGHT_CACHE"]);
    let said = home.run_in(&cache, &["plan", "-m", "tiny"]).err;
    assert_eq!(said.matches("os error").count(), 1, "{said}");
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else { return };
    let mut plan = home.command(&["plan", "-m", &home.model()]);
    let done = plan.stdout(full).stderr(std::process::Stdio::piped()).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.contains("error: cannot write to standard output: No space"), "{said}");
}

/// Bad values of options are told from work that failed by the exit code, whatever the command.
#[test]
fn an_unknown_method_is_a_bad_value_in_every_command() {
    let home = Home::new();
    let model = home.model();
    let eval = ["eval", "copy", "--text", "x.txt", "--methods", "sparcsa"];
    let commands: [&[&str]; 5] = [
        &["run", "-m", &model, "--method", "sparcsa", "hi"],
        &["plan", "-m", &model, "--method", "sparcsa"],
        &["bench", "--methods", "sparcas,sparcsa"],
        &["bench", "attention", "--methods", "sparcsa"],
        &eval,
    ];
    for command in commands {
        let done = home.run(command);
        assert_eq!(done.code, Some(2), "{done:?}");
        let names = ["invalid value 'sparcsa' for '--method", "did you mean `sparcas`"];
        assert!(names.iter().all(|n| done.err.contains(n)), "{done:?}");
    }
}
