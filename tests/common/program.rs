//! The program run with a tiny model in a folder of its own.

use super::tiny::Tiny;
use longsight::model::{Arch, Quant};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A temporary folder with the tiny model and a cache folder.
pub struct Home(pub tempfile::TempDir);

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

pub fn text(path: &Path) -> String {
    path.display().to_string()
}

impl Home {
    pub fn new() -> Home {
        let home = Home(tempfile::tempdir().unwrap());
        Tiny::new(Arch::Llama, false, 5).write_hf(&home.path("model"), Quant::F32, 1);
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file; its path as an argument.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        text(&self.path(name))
    }

    pub fn model(&self) -> String {
        text(&self.path("model"))
    }

    /// Names of all files below the folder.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.0.path().to_owned()];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files.sort();
        files
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_longsight"));
        command.args(arguments).env("LONGSIGHT_CACHE", self.path("cache")).stdin(Stdio::null());
        command
    }

    pub fn run_in(&self, environment: &[(&str, &str)], arguments: &[&str]) -> Ended {
        let done = self.command(arguments).envs(environment.iter().copied()).output().unwrap();
        Ended {
            code: done.status.code(),
            out: String::from_utf8(done.stdout).unwrap(),
            err: String::from_utf8(done.stderr).unwrap(),
        }
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.run_in(&[], arguments)
    }

    /// The run fails with a sentence that holds `names`, and leaves no file behind.
    pub fn refused_in(&self, environment: &[(&str, &str)], arguments: &[&str], names: &[&str]) {
        let before = self.files();
        let end = self.run_in(environment, arguments);
        // No code at all is a signal; 101 is a panic.
        assert!(end.code.is_some_and(|c| c != 0 && c != 101), "{arguments:?}: {end:?}");
        assert!(end.err.lines().any(|l| l.starts_with("error: ") && l.len() > 20), "{end:?}");
        assert!(!end.err.contains("panicked"), "{arguments:?}: {}", end.err);
        for name in names {
            assert!(end.err.contains(name), "{arguments:?}: {:?} does not name {name}", end.err);
        }
        assert_eq!(self.files(), before, "{arguments:?} left files behind");
    }

    pub fn refused(&self, arguments: &[&str], names: &[&str]) {
        self.refused_in(&[], arguments, names);
    }
}

/// `run -m MODEL --device cpu` and more.
pub fn run_on<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", "-m", model, "--device", "cpu", "-n", "4"][..], more].concat()
}
