//! Texts for commands that measure or train.

use crate::calibrate::BUILT_IN_TEXT;
use crate::model::{Checkpoint, Tokenizer};
use anyhow::{Context, Result, bail, ensure};
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
    if let Some(files) = several(path) {
        bail!(
            "there is no text {}, but {files} are files: give the option once for each",
            path.display()
        );
    }
    let bytes =
        std::fs::read(path).with_context(|| format!("cannot read the text {}", path.display()))?;
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))
}

/// The files of a name that is none itself but a list of such.
fn several(path: &Path) -> Option<String> {
    let names = path.to_str().filter(|_| !path.exists())?;
    let files: Vec<&str> = names.split(',').map(str::trim).collect();
    let all = files.len() > 1 && files.iter().all(|f| Path::new(f).is_file());
    all.then(|| files.join(" and "))
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
