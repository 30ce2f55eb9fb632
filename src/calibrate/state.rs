//! Statistics on disk, so that an interrupted calibration goes on where it was.

use super::similarity::len;
use super::statistics::{Objective, Statistics};
use super::tensor_file::TensorFile;
use super::{CalibrateError, Settings};
use crate::model::weights::hex;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Raised when the statistics change their meaning.
const VERSION: &str = "kascade 1";

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

/// Saves statistics of the texts named `texts`.
pub(super) fn save(
    path: &Path,
    settings: &Settings,
    texts: &[String],
    s: &Statistics,
) -> Result<(), CalibrateError> {
    let mut file = TensorFile::default();
    file.about.insert("version".into(), VERSION.into());
    file.about.insert("settings".into(), settings.line());
    file.about.insert("texts".into(), texts.join(" "));
    for (o, sums) in Objective::ALL.iter().zip(&s.sums) {
        file.f64s(&format!("similarity.{}", o.name()), sums.clone());
    }
    file.f64s("change", s.change.clone());
    file.save(path).map_err(failed("write", path))
}

/// Statistics saved before of the first of `texts`; `None` when there are none.
///
/// # Errors
/// [`CalibrateError::OtherRun`] when they are of another model, other settings or other texts.
pub(super) fn load(
    path: &Path,
    settings: &Settings,
    texts: &[String],
    empty: &Statistics,
) -> Result<Option<Statistics>, CalibrateError> {
    let Some(mut file) = TensorFile::load(path).map_err(failed("read", path))? else {
        return Ok(None);
    };
    let other = |what: String| CalibrateError::OtherRun { path: path.into(), what };
    let about = |key: &str| file.about.get(key).map_or("", String::as_str);
    if about("version") != VERSION {
        return Err(other("it holds no statistics of this version of the program".into()));
    }
    if about("settings") != settings.line() {
        return Err(other(format!(
            "it was made with {}, this run has {}",
            about("settings"),
            settings.line()
        )));
    }
    let done: Vec<String> = about("texts").split_whitespace().map(String::from).collect();
    if done.len() > texts.len() || done.iter().zip(texts).any(|(a, b)| a != b) {
        return Err(other(format!(
            "it holds {} texts, which are not the first of the {} texts of this run",
            done.len(),
            texts.len()
        )));
    }
    let mut s = Statistics { texts: done.len(), ..empty.clone() };
    let values = len(s.layers.len(), s.kv_heads);
    let mut take = |name: &str, n: usize| {
        file.take_f64s(name, n)
            .ok_or_else(|| other(format!("it has no array {name} of {n} numbers")))
    };
    for (o, sums) in Objective::ALL.iter().zip(&mut s.sums) {
        *sums = take(&format!("similarity.{}", o.name()), values)?;
    }
    s.change = take("change", s.layers.len())?;
    Ok(Some(s))
}
