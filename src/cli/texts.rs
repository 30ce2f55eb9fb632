//! Texts for commands that measure or train.

use crate::calibrate::BUILT_IN_TEXT;
use crate::model::Tokenizer;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Token ids of each file; of the built-in text where no file is given.
///
/// # Errors
/// A file that cannot be read.
pub fn encoded(files: &[PathBuf], tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
    if files.is_empty() {
        return Ok(vec![tokenizer.encode(BUILT_IN_TEXT, false)?]);
    }
    files.iter().map(|path| Ok(tokenizer.encode(&read(path)?, false)?)).collect()
}

/// A text file.
///
/// # Errors
/// A file that cannot be read.
pub fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the text {}", path.display()))
}

/// Name of the file beside `output` that an interrupted run leaves.
pub fn state_of(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".state");
    name.into()
}
