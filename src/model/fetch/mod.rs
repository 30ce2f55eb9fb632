//! From what a user calls a model to files on this machine.

mod demo;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod hub;
mod tiny;

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::{ModelError, Result};
pub use crate::files::cache_dir;
use crate::files::hex;

/// Called with the bytes that are there and, where known, the bytes there will be. Several files
/// are reported one after the other, each from its own beginning.
pub type Progress<'a> = &'a dyn Fn(u64, Option<u64>);

/// Finds or fetches a model.
///
/// * a path that exists is returned as it is;
/// * `smollm2`, in any case, is the demo model (SmolLM2-135M-Instruct, 98 MB), fetched once into
///   `$LONGSIGHT_CACHE` or the user's cache folder;
/// * `tiny`, in any case, is the model that the program carries with it (4.3 M parameters, for tests), unpacked
///   into the same folder;
/// * `org/name` is the folder of a hub repository, `org/name:file.gguf` one file of it; both stay
///   in the hub client's own cache.
///
/// # Errors
/// `Missing` for a name that is none of these, `Fetch` when the model cannot be had, `Io` when it
/// cannot be stored. No error leaves a partial file under a model's name.
pub fn resolve(name: &str, progress: Progress<'_>) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_owned());
    }
    if name.eq_ignore_ascii_case(demo::NAME) {
        return demo::fetch(&cache_dir_for(name)?, progress);
    }
    if name.eq_ignore_ascii_case(tiny::NAME) {
        return tiny::unpack(&cache_dir_for(name)?);
    }
    match HubId::parse(name) {
        Some(id) => fetch_hub(&id, progress),
        None => Err(ModelError::Missing { path: path.to_owned() }),
    }
}

#[cfg(feature = "hub")]
fn fetch_hub(id: &HubId, progress: Progress<'_>) -> Result<PathBuf> {
    hub::fetch(id, progress)
}

#[cfg(not(feature = "hub"))]
fn fetch_hub(id: &HubId, _progress: Progress<'_>) -> Result<PathBuf> {
    Err(ModelError::Fetch {
        name: id.repo.clone(),
        what: "there is no such path, and this build cannot reach a model hub; build it with the \
               feature `hub`, or download the model and give its path"
            .to_owned(),
    })
}

fn cache_dir_for(name: &str) -> Result<PathBuf> {
    cache_dir().ok_or_else(|| ModelError::Fetch {
        name: name.to_owned(),
        what: "no cache folder is known for this user; set LONGSIGHT_CACHE to one".to_owned(),
    })
}

/// A repository on a model hub, or one file of it.
#[derive(Debug, PartialEq, Eq)]
struct HubId {
    repo: String,
    file: Option<String>,
}

impl HubId {
    /// `org/name` or `org/name:file.gguf`; anything that looks like a path is none.
    fn parse(name: &str) -> Option<HubId> {
        let (repo, file) = match name.split_once(':') {
            Some((repo, file)) => (repo, Some(file)),
            None => (name, None),
        };
        let (org, model) = repo.split_once('/')?;
        let word = |w: &str| {
            !w.is_empty()
                && !w.starts_with('.')
                && w.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        if !word(org) || !word(model) {
            return None;
        }
        match file {
            None if model.ends_with(".gguf") => return None,
            Some(file) if !file.ends_with(".gguf") || !stays_inside(file) => return None,
            _ => {}
        }
        Some(HubId { repo: repo.to_owned(), file: file.map(str::to_owned) })
    }
}

/// Whether a relative file name cannot leave its folder.
fn stays_inside(file: &str) -> bool {
    !file.contains('\\') && Path::new(file).components().all(|c| matches!(c, Component::Normal(_)))
}

fn disk(path: &Path, action: &'static str, source: std::io::Error) -> ModelError {
    ModelError::Io { path: path.to_owned(), action, source }
}

/// The file's SHA-256 in hex.
fn file_sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        let id = |repo: &str, file: Option<&str>| {
            Some(HubId { repo: repo.into(), file: file.map(Into::into) })
        };
        assert_eq!(HubId::parse("Qwen/Qwen3-0.6B"), id("Qwen/Qwen3-0.6B", None));
        assert_eq!(HubId::parse("a/b:sub/q4.gguf"), id("a/b", Some("sub/q4.gguf")));
        for path in [
            "model.gguf",
            "./models/x",
            "/models/x",
            "models/x.gguf",
            "../x",
            "a/b/c",
            "a/b:../../x.gguf",
            "a/b:/x.gguf",
            "a/b:x.bin",
            "a/",
            "",
        ] {
            assert_eq!(HubId::parse(path), None, "{path}");
        }
    }

    #[test]
    fn an_existing_path_is_itself_and_an_unknown_name_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().to_str().unwrap();
        assert_eq!(resolve(here, &|_, _| {}).unwrap(), dir.path());
        let error = resolve("no-such-model", &|_, _| {}).unwrap_err();
        assert!(error.to_string().contains("no-such-model"), "{error}");
    }
}
