//! Result files: tried before a long run, complete or not there at all.

use super::args::DEFAULT_MODEL;
use super::ui;
use crate::files::{PartFile, write_atomic};
use anyhow::{Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A file that appears under its name when it is finished; until then (and after a failure or Ctrl-C) there is none.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
}

impl OutputFile {
    /// Makes sure that the file can be written.
    ///
    /// # Errors
    /// A folder that does not exist or may not be written to.
    pub fn create(path: &Path) -> Result<OutputFile> {
        let failed = || {
            format!(
                "cannot write {}; name a file in a folder that exists and may be written to",
                path.display()
            )
        };
        if path.is_dir() || path.file_name().is_none() {
            anyhow::bail!("{}: it is a folder", failed());
        }
        // Only a trial, gone at once: a run that is interrupted must not leave it behind.
        let trial = PartFile::beside(path);
        File::create(trial.path()).with_context(failed)?;
        Ok(OutputFile { path: path.to_owned() })
    }

    /// Writes the contents and gives the file its name.
    ///
    /// # Errors
    /// A full disk, or a folder that went away.
    pub fn finish(self, contents: &[u8]) -> Result<Written> {
        write_atomic(&self.path, contents)
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(Written(self.path))
    }
}

/// A file that is there, of which the user is told at the end.
#[derive(Debug)]
#[must_use = "the user wants to know that there is a file"]
pub struct Written(PathBuf);

impl Written {
    /// A file that was written by others.
    pub fn at(path: &Path) -> Written {
        Written(path.to_owned())
    }

    /// A line on standard error.
    pub fn tell(&self) {
        ui::note(format!("wrote {}", self.0.display()));
    }

    /// The same with the command that uses the file: `longsight run` on this model, with the file behind `options`.
    pub fn tell_use(&self, model: &str, options: &str) {
        let model = match model {
            DEFAULT_MODEL => String::new(),
            other => format!(" -m {}", quoted(other)),
        };
        let file = self.0.display().to_string();
        ui::note(format!(
            "wrote {file}; to use it: longsight run{model} {options} {} -f TEXT --ask QUESTION",
            quoted(&file)
        ));
    }
}

/// A word as a shell reads it back.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-./:+=@%,~".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_complete_or_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        let file = OutputFile::create(&path).unwrap();
        assert_eq!(files(), 0);
        file.finish(b"{}").unwrap().tell();
        assert_eq!(std::fs::read(&path).unwrap(), b"{}");
        assert_eq!(files(), 1);
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("out/k.plan.json"), "out/k.plan.json");
        assert_eq!(quoted("my plan.json"), "'my plan.json'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn an_unwritable_place_is_refused_before_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let missing = OutputFile::create(&dir.path().join("no/such/run.json")).unwrap_err();
        assert!(missing.to_string().contains("folder that exists"), "{missing}");
        let folder = OutputFile::create(dir.path()).unwrap_err();
        assert!(folder.to_string().contains("folder"), "{folder}");
    }
}
