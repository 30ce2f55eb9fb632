//! Repositories on a model hub, through the hub's client crate and its cache.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo};

use super::super::error::{ModelError, Result};
use super::{HubId, Progress, stays_inside};

/// Files of a repository besides its weights. All but the first may be absent.
const SIDE_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Fetches a repository's model folder, or one GGUF file of it. What is in the cache already is
/// not fetched again, and no network is needed when all of it is.
pub(super) fn fetch(id: &HubId, progress: Progress<'_>) -> Result<PathBuf> {
    // Without either the client's cache location would be a panic.
    if std::env::var_os("HF_HOME").is_none() && dirs::home_dir().is_none() {
        return Err(failed(id, "no home folder is known to keep it in; set HF_HOME to one"));
    }
    let builder = ApiBuilder::from_env();
    // The client itself reads only the file that a login leaves.
    let token = std::env::var("HF_TOKEN").unwrap_or_default();
    let builder = match token.trim() {
        "" => builder,
        token => builder.with_token(Some(token.to_owned())),
    };
    fetch_with(id, builder, Cache::from_env(), progress)
}

/// What to do about an error of the client.
fn remedy(e: &ApiError) -> &'static str {
    match e {
        ApiError::RequestError(e) if matches!(**e, ureq::Error::Status(401 | 403, _)) => {
            "check the name; a private or gated repository needs an access token in HF_TOKEN"
        }
        ApiError::RequestError(e) if matches!(**e, ureq::Error::Status(404, _)) => "check the name",
        _ => "check the name and the network",
    }
}

fn failed(id: &HubId, what: impl Into<String>) -> ModelError {
    ModelError::Fetch { name: id.repo.clone(), what: what.into() }
}

fn fetch_with(
    id: &HubId,
    builder: ApiBuilder,
    cache: Cache,
    progress: Progress<'_>,
) -> Result<PathBuf> {
    let api = builder
        .with_progress(false)
        .with_retries(2)
        .build()
        .map_err(|e| failed(id, format!("the hub client does not start ({e})")))?;
    let repo = Repo {
        id,
        remote: api.model(id.repo.clone()),
        cached: cache.model(id.repo.clone()),
        progress,
    };
    match &id.file {
        Some(file) => repo.get(file),
        None => repo.folder(),
    }
}

struct Repo<'a> {
    id: &'a HubId,
    remote: ApiRepo,
    cached: CacheRepo,
    progress: Progress<'a>,
}

impl Repo<'_> {
    fn get(&self, file: &str) -> Result<PathBuf> {
        if let Some(path) = self.cached.get(file) {
            return Ok(path);
        }
        let report = Report { progress: self.progress, done: 0, total: None };
        self.remote.download_with_progress(file, report).map_err(|e| {
            failed(
                self.id,
                format!(
                    "{file} does not come from the hub ({e}); {}, or download the model and give \
                     its path",
                    remedy(&e)
                ),
            )
        })
    }

    fn folder(&self) -> Result<PathBuf> {
        if let Some(folder) = self.cached_folder() {
            return Ok(folder);
        }
        let info = self.remote.info().map_err(|e| {
            failed(
                self.id,
                format!(
                    "there is no such path, and the hub does not list it ({e}); {}",
                    remedy(&e)
                ),
            )
        })?;
        let listed: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        let weights = [WEIGHTS, INDEX].into_iter().find(|w| listed.contains(w));
        let Some(weights) = weights else {
            let gguf: Vec<&str> =
                (listed.iter().copied()).filter(|f| f.ends_with(".gguf")).collect();
            let what = if gguf.is_empty() {
                "the repository has neither safetensors nor GGUF files; choose another".to_owned()
            } else {
                let repo = &self.id.repo;
                format!("name one of its files, such as {repo}:{} ({})", gguf[0], gguf.join(", "))
            };
            return Err(failed(self.id, what));
        };
        let config = self.get(SIDE_FILES[0])?;
        for file in &SIDE_FILES[1..] {
            if listed.contains(file) {
                self.get(file)?;
            }
        }
        let first = self.get(weights)?;
        if weights == INDEX {
            for shard in shards(&first)? {
                self.get(&shard)?;
            }
        }
        self.parent(&config)
    }

    /// The folder, if everything that loading needs is cached.
    fn cached_folder(&self) -> Option<PathBuf> {
        let config = self.cached.get(SIDE_FILES[0])?;
        self.cached.get("tokenizer.json")?;
        if self.cached.get(WEIGHTS).is_none() {
            let index = self.cached.get(INDEX)?;
            for shard in shards(&index).ok()? {
                self.cached.get(&shard)?;
            }
        }
        self.parent(&config).ok()
    }

    fn parent(&self, file: &Path) -> Result<PathBuf> {
        file.parent()
            .map(Path::to_owned)
            .ok_or_else(|| failed(self.id, "the hub client gave no folder"))
    }
}

/// The shards an index names.
fn shards(index: &Path) -> Result<Vec<String>> {
    let json = super::super::mapped::read_json(index)?.unwrap_or_default();
    let map = json["weight_map"].as_object();
    let mut files: Vec<String> = map
        .into_iter()
        .flat_map(|m| m.values())
        .filter_map(|f| f.as_str())
        .filter(|f| stays_inside(f))
        .map(str::to_owned)
        .collect();
    files.sort();
    files.dedup();
    if files.is_empty() {
        return Err(ModelError::corrupt(index, "it names no shards"));
    }
    Ok(files)
}

/// The hub client's progress as ours.
struct Report<'a> {
    progress: Progress<'a>,
    done: u64,
    total: Option<u64>,
}

impl hf_hub::api::Progress for Report<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        self.total = Some(size as u64);
        self.done = 0;
        (self.progress)(0, self.total);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.progress)(self.done, self.total);
    }

    fn finish(&mut self) {}
}
