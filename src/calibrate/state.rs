//! Statistics on disk, so that an interrupted calibration goes on where it was.

use super::changed::{Changed, changed};
use super::similarity::len;
use super::statistics::{Objective, Statistics};
use super::{CalibrateError, Settings};
use crate::files::hex;
use crate::tensor_file::TensorFile;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Raised when the statistics change their meaning.
const VERSION: &str = "kascade 3";

/// Name of a text in the state: a hash of its tokens.
pub(crate) fn text_name(tokens: &[u32]) -> String {
    hex(&Sha256::digest(bytemuck::cast_slice::<u32, u8>(tokens))[..8])
}

/// An error of a file.
pub(crate) fn failed(
    doing: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> CalibrateError {
    move |source| CalibrateError::File { doing, path: path.into(), source }
}

/// A state file to fill, of this version and these settings (JSON).
pub(crate) fn begin(version: &str, settings: String) -> TensorFile {
    let mut file = TensorFile::default();
    file.about.insert("version".into(), version.into());
    file.about.insert("settings".into(), settings);
    file
}

/// A state that was saved before; `None` when there is none. `what`: what it should hold; `settings`: as [`begin`] has
/// them.
///
/// # Errors
/// [`CalibrateError::OtherRun`] for another version, [`CalibrateError::OtherSettings`], [`CalibrateError::File`].
pub(crate) fn resume(
    path: &Path,
    version: &str,
    what: &str,
    settings: &str,
) -> Result<Option<TensorFile>, CalibrateError> {
    let Some(file) = TensorFile::load(path).map_err(failed("read", path))? else {
        return Ok(None);
    };
    if file.word("version") != version {
        return Err(other(path, format!("{what} of this version of the program")));
    }
    let read = |settings: &str| serde_json::from_str(settings);
    let (Ok(was), Ok(now)) = (read(file.word("settings")), read(settings)) else {
        return Err(other(path, "its settings cannot be read".into()));
    };
    match changed(&was, &now) {
        none if none.is_empty() => Ok(Some(file)),
        changed => Err(CalibrateError::OtherSettings { path: path.into(), changed }),
    }
}

/// A state that does not belong to this run.
pub(crate) fn other(path: &Path, what: String) -> CalibrateError {
    CalibrateError::OtherRun { path: path.into(), what }
}

/// Texts of a calibration.
pub(super) struct Texts {
    /// Tokens of the first, which say why others of the same words are not the same.
    pub tokens: usize,
    /// Of each its [`text_name`].
    pub names: Vec<String>,
}

/// What statistics depend on, and their first text.
fn line(settings: &Settings, texts: &Texts) -> String {
    let mut all = serde_json::to_value(settings).unwrap_or_default();
    all["tokens"] = texts.tokens.into();
    all.to_string()
}

/// Saves statistics of the first of `texts`.
pub(super) fn save(
    path: &Path,
    settings: &Settings,
    texts: &Texts,
    s: &Statistics,
) -> Result<(), CalibrateError> {
    let mut file = begin(VERSION, line(settings, texts));
    file.about.insert("texts".into(), texts.names[..s.texts].join(" "));
    for (o, sums) in Objective::ALL.iter().zip(&s.sums) {
        file.f64s(&format!("similarity.{}", o.name()), sums.clone());
    }
    file.f64s("change", s.change.clone());
    file.save(path).map_err(failed("write", path))
}

/// Statistics saved before of the first of `texts`; `None` when there are none.
///
/// # Errors
/// [`CalibrateError::OtherSettings`], also when they are of other texts or of more; [`CalibrateError::OtherRun`].
pub(super) fn load(
    path: &Path,
    settings: &Settings,
    texts: &Texts,
    empty: &Statistics,
) -> Result<Option<Statistics>, CalibrateError> {
    let found = resume(path, VERSION, "it holds no statistics", &line(settings, texts))?;
    let Some(mut file) = found else { return Ok(None) };
    let done: Vec<String> = file.word("texts").split_whitespace().map(String::from).collect();
    let differs = |name: &str, was: String, now: String| CalibrateError::OtherSettings {
        path: path.into(),
        changed: vec![Changed { name: name.into(), was, now }],
    };
    if let Some((was, now)) = done.iter().zip(&texts.names).find(|(a, b)| a != b) {
        return Err(differs("texts", format!("one with hash {was}"), now.clone()));
    }
    // What further texts have added cannot be taken away.
    if done.len() > texts.names.len() {
        return Err(differs("prompts", done.len().to_string(), texts.names.len().to_string()));
    }
    let mut s = Statistics { texts: done.len(), ..empty.clone() };
    let values = len(s.layers.len(), s.kv_heads);
    let mut take = |name: &str, n: usize| {
        file.take_f64s(name, n)
            .ok_or_else(|| other(path, format!("it has no array {name} of {n} numbers")))
    };
    for (o, sums) in Objective::ALL.iter().zip(&mut s.sums) {
        *sums = take(&format!("similarity.{}", o.name()), values)?;
    }
    s.change = take("change", s.layers.len())?;
    Ok(Some(s))
}
