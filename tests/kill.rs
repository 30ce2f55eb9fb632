//! Calibration and training, killed (SIGKILL) at several moments: the same command goes on, and in the end the files
//! are those of a run that nobody disturbed.

#![cfg(unix)]

mod common;

use common::program::{Home, text};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// When a run is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So long after its start, wherever it is.
    After(Duration),
    /// When its state file says that so much is done.
    Done(usize),
}

/// Moments by the clock that may find all done come after those that must not.
const MOMENTS: [Moment; 8] = [
    Moment::After(Duration::ZERO),
    Moment::After(Duration::from_millis(5)),
    Moment::Done(1),
    Moment::Done(3),
    Moment::Done(4),
    Moment::After(Duration::from_millis(30)),
    Moment::After(Duration::from_millis(90)),
    // All is done but for the result's own file.
    Moment::Done(ALL),
];

/// Pieces of the calibration, steps of the training.
const ALL: usize = 10;

/// A run of the program in a folder of its own.
struct Run {
    home: Home,
    command: Vec<String>,
    output: PathBuf,
    /// What a state file says is done.
    progress: fn(&str, &str) -> Option<usize>,
}

impl Run {
    fn new(command: &str, options: &[&str], progress: fn(&str, &str) -> Option<usize>) -> Run {
        let home = Home::new();
        let words: String =
            (0..900).map(|i| format!("{} is no {}. ", i * i % 997, i % 89)).collect();
        let (file, output) = (home.file("a.txt", words.as_bytes()), home.path("out"));
        let model = home.model();
        let base =
            [command, "-m", &model, "--device", "cpu", "--dtype", "f32", "--text", &file, "-o"];
        let (place, format) = (text(&output), ["--format", "json"]);
        let command = [&base[..], &[&place], &format, options].concat();
        let command = command.iter().map(ToString::to_string).collect();
        Run { home, command, output, progress }
    }

    fn arguments(&self) -> Vec<&str> {
        self.command.iter().map(String::as_str).collect()
    }

    /// What the state file beside the output says is done; it is whole whenever it is there.
    fn done(&self) -> usize {
        let Ok(bytes) = std::fs::read(self.output.with_extension("state")) else { return 0 };
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a state that can be read");
        let words = header.metadata().clone().unwrap();
        words.iter().find_map(|(key, value)| (self.progress)(key, value)).unwrap()
    }

    /// Starts the command, `before` of which is done, and kills it at a moment; false when it had ended by itself.
    fn kill(&self, moment: Moment, before: usize) -> bool {
        let start = Instant::now();
        let mut command = self.home.command(&self.arguments());
        let mut child: Child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        loop {
            let done = self.done();
            assert!(done >= before, "{moment:?}: {before} were done, now {done}");
            let due = match moment {
                Moment::After(time) => start.elapsed() >= time,
                Moment::Done(n) => done >= n,
            };
            if due {
                child.kill().unwrap();
                return child.wait().unwrap().code().is_none();
            }
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "{moment:?}");
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Kills the command at every moment, then lets it end.
    fn disturbed(&self) -> serde_json::Value {
        let mut before = 0;
        for moment in MOMENTS {
            let killed = self.kill(moment, before);
            let done = self.done();
            println!("{moment:?}: {done} of {ALL} done, killed: {killed}");
            if let Moment::Done(n @ 1..=4) = moment {
                assert!(killed && done < ALL, "{n}: the run ended before it could be killed");
                assert!(!self.output.exists(), "{moment:?}: a result of {done}");
            }
            before = done;
        }
        assert_eq!(before, ALL);
        self.home.run(&self.arguments()).json()
    }
}

/// Arrays of a safetensors file by name; its words are in no order.
fn arrays(path: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file.tensors().into_iter().map(|(n, t)| (n, t.data().to_vec())).collect();
    all.sort();
    all
}

#[test]
fn a_killed_calibration_ends_like_one_that_ran_through() {
    let pieces = ALL.to_string();
    let options = ["--tokens", "500", "--prompts", &pieces, "--keys", "16"];
    let texts = |key: &str, value: &str| (key == "texts").then(|| value.split_whitespace().count());
    let [whole, killed] = [(); 2].map(|()| Run::new("calibrate", &options, texts));
    let want = whole.home.run(&whole.arguments()).json();
    assert_eq!(killed.disturbed(), want);
    let read = |run: &Run| std::fs::read(&run.output).unwrap();
    assert_eq!(read(&killed), read(&whole), "the plan");
    let state = |run: &Run| arrays(&run.output.with_extension("state"));
    assert_eq!(state(&killed), state(&whole), "the statistics");
}

#[test]
fn a_killed_training_ends_like_one_that_ran_through() {
    let steps = ALL.to_string();
    // A step takes long enough to be killed in.
    let sizes = ["--tokens", "500", "--pieces", "4", "--batch", "4", "--every", "1"];
    let blocks = ["--blocks", "4", "--local-blocks", "1"];
    let options = [&sizes[..], &blocks, &["--steps", &steps, "--save-every", "1"]].concat();
    let steps = |key: &str, value: &str| (key == "steps").then(|| value.parse().unwrap());
    let [whole, killed] = [(); 2].map(|()| Run::new("train-forecast", &options, steps));
    let want = whole.home.run(&whole.arguments()).json();
    assert_eq!(killed.disturbed(), want);
    assert_eq!(arrays(&killed.output), arrays(&whole.output), "the matrices");
}
