//! Tables in README.md that tests write and compare, and the recorded runs that they quote.

use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// A file of the repository.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The newest `bench/runs/*<ending>` that is `wanted`, with its file name.
pub fn newest<T: DeserializeOwned>(
    ending: &str,
    wanted: impl Fn(&T) -> bool,
) -> Result<Option<(String, T)>, String> {
    let Ok(folder) = std::fs::read_dir(file("bench/runs")) else { return Ok(None) };
    let names = folder.filter_map(|e| e.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|n| n.ends_with(ending)).collect();
    names.sort();
    for name in names.into_iter().rev() {
        let text = std::fs::read_to_string(file("bench/runs").join(&name));
        let run: T = text
            .map_err(|e| e.to_string())
            .and_then(|t| serde_json::from_str(&t).map_err(|e| e.to_string()))
            .map_err(|e| format!("bench/runs/{name}: {e}"))?;
        if wanted(&run) {
            return Ok(Some((name, run)));
        }
    }
    Ok(None)
}

/// Compares what stands between `<!-- mark:begin -->` and `<!-- mark:end -->` with `render(what stands there)`, or
/// (`write`) puts it there. `remedy` says how a stale table is written anew.
pub fn table(
    mark: &str,
    render: impl FnOnce(&str) -> String,
    write: bool,
    remedy: &str,
) -> Result<(), String> {
    let path = file("README.md");
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let (begin, end) = (format!("<!-- {mark}:begin -->\n"), format!("<!-- {mark}:end -->"));
    let readme = std::fs::read_to_string(&path).map_err(failed)?;
    let (before, rest) = readme.split_once(&begin).ok_or(format!("README.md: no {begin}"))?;
    let (old, after) = rest.split_once(&end).ok_or(format!("README.md: no {end}"))?;
    let new = render(old);
    if write {
        return std::fs::write(&path, [before, &begin, &new, &end, after].concat()).map_err(failed);
    }
    match old == new {
        true => Ok(()),
        false => Err(format!("README.md is stale: {remedy}\n{}", difference(old, &new))),
    }
}

/// The lines of `old` that `new` has not, then those that it has instead.
fn difference(old: &str, new: &str) -> String {
    let only = |a: &str, b: &str, sign: &str| -> String {
        let missing = a.lines().filter(|line| !b.lines().any(|other| other == *line));
        missing.map(|line| format!("{sign} {line}\n")).collect()
    };
    only(old, new, "-") + &only(new, old, "+")
}
