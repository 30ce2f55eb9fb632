//! The tiny model, which the program carries with it (`models/tiny`).

use std::path::{Path, PathBuf};

use super::super::error::Result;
use super::disk;
use crate::files::write_cached;

/// What the tiny model is called.
pub(super) const NAME: &str = "tiny";

macro_rules! files {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../../models/tiny/", $name)).as_slice())),*]
    };
}

const FILES: [(&str, &[u8]); 4] =
    files!("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json");

/// The model's folder in `cache`, written where a file is missing or differs.
pub(super) fn unpack(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join(NAME);
    for (name, contents) in FILES {
        let path = folder.join(name);
        if !std::fs::read(&path).is_ok_and(|found| found == contents) {
            write_cached(&path, contents).map_err(|e| disk(&path, "write", e))?;
        }
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Checkpoint, Tokenizer};

    #[test]
    fn it_is_unpacked_once_and_mended() {
        let cache = tempfile::tempdir().unwrap();
        let folder = unpack(cache.path()).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert!(Tokenizer::for_checkpoint(&checkpoint).unwrap().adds_bos());
        let config = folder.join("config.json");
        let written = std::fs::metadata(&config).unwrap().modified().unwrap();
        std::fs::write(folder.join("tokenizer.json"), b"{}").unwrap();
        assert_eq!(unpack(cache.path()).unwrap(), folder);
        assert_eq!(std::fs::metadata(&config).unwrap().modified().unwrap(), written);
        assert_eq!(std::fs::read(folder.join("tokenizer.json")).unwrap(), FILES[2].1);
    }
}
