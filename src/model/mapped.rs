//! A file mapped read-only, and small files read whole.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::error::{ModelError, Result};

/// A read-only mapping of one file. Weights stay in it until a backend takes them.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Mmap,
}

impl Mapped {
    /// Maps `path`. Empty files and folders are errors.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| ModelError::io(path, "open", e))?;
        let meta = file.metadata().map_err(|e| ModelError::io(path, "inspect", e))?;
        if !meta.is_file() {
            return Err(ModelError::corrupt(path, "it is not a regular file"));
        }
        if meta.len() == 0 {
            return Err(ModelError::truncated(path, "first byte (it is empty)"));
        }
        // SAFETY: the mapping is private and read-only, and every access goes through a slice
        // whose bounds were checked against the mapped length. What remains is the usual rule of
        // mapped files: nobody may shorten a model file while it is in use.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| ModelError::io(path, "map", e))?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Largest JSON file read besides the weights (a tokenizer of a quarter million ids has 35 MB).
const MAX_SIDE_FILE: u64 = 512 << 20;

/// Reads a side file (configuration, tokenizer, template), `None` where it does not exist.
pub(crate) fn read_side_file(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ModelError::io(path, "open", e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_SIDE_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| ModelError::io(path, "read", e))?;
    if bytes.len() as u64 > MAX_SIDE_FILE {
        return Err(ModelError::corrupt(path, "it is far too large for a side file"));
    }
    if bytes.is_empty() {
        return Err(ModelError::truncated(path, "first byte (it is empty)"));
    }
    Ok(Some(bytes))
}

/// Reads a JSON side file, `None` where it does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Option<serde_json::Value>> {
    let Some(bytes) = read_side_file(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| ModelError::corrupt(path, format!("it is not valid JSON ({e})")))
}
