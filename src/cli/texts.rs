//! Texts for commands that measure or train.

use crate::calibrate::BUILT_IN_TEXT;
use crate::model::{Checkpoint, Tokenizer};
use anyhow::{Context, Result, ensure};
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
/// A file that cannot be read, or is not UTF-8.
pub fn read(path: &Path) -> Result<String> {
    let cannot = || format!("cannot read the text {}{}", path.display(), several(path));
    let bytes = std::fs::read(path).with_context(cannot)?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))
}

/// What to say of a name that is the names of several files.
fn several(path: &Path) -> String {
    let text = path.display().to_string();
    let parts: Vec<&str> = text.split(',').map(str::trim).collect();
    match !path.exists() && parts.len() > 1 && parts.iter().all(|p| Path::new(p).is_file()) {
        true => format!("; {} are files: give the option once for each", parts.join(" and ")),
        false => String::new(),
    }
}

/// Refuses pieces of text that are longer than what the model was trained for.
///
/// # Errors
/// Such pieces.
pub fn fits(tokens: usize, checkpoint: &Checkpoint) -> Result<()> {
    let most = checkpoint.config().max_context;
    ensure!(tokens <= most, "--tokens {tokens}: this model was trained for {most}; give no more");
    Ok(())
}

/// Name of the file beside `output` that an interrupted run leaves.
pub fn state_of(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".state");
    name.into()
}
