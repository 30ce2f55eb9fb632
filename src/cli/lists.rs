//! Options that take several values.

use anyhow::{Result, bail};
use clap::builder::{PathBufValueParser, TypedValueParser};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// One value of a list, spaces around it left out.
///
/// # Errors
/// What its type says.
pub fn item<T: FromStr>(text: &str) -> Result<T, T::Err> {
    text.trim().parse()
}

/// [`item`] for files; a file may be named with such spaces.
pub fn path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().map(|path| match path.to_str() {
        Some(s) if !path.exists() => s.trim().into(),
        _ => path,
    })
}

/// Refuses a value that is there twice: it would count as two.
///
/// # Errors
/// Such a value.
pub fn once<T: PartialEq + Display>(option: &str, values: &[T]) -> Result<()> {
    let twice = values.iter().enumerate().find(|(i, v)| values[..*i].contains(v));
    if let Some((_, value)) = twice {
        bail!("{option} names {value} twice, which would count as two; give it once");
    }
    Ok(())
}

/// Names of different files: without their endings where `stems` allows it and they differ, else as much of the ends of
/// their paths as tells them apart.
pub fn short_names(paths: &[PathBuf], stems: bool) -> Vec<String> {
    let of = |name: &dyn Fn(&Path) -> String| paths.iter().map(|p| name(p)).collect();
    let stem = |p: &Path| p.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into());
    let last = |p: &Path, n: usize| {
        let skip = p.components().count().saturating_sub(n);
        p.components().skip(skip).collect::<PathBuf>().display().to_string()
    };
    let most = paths.iter().map(|p| p.components().count()).max().unwrap_or(0);
    let longer = (1..=most).map(|n| of(&|p| last(p, n)));
    let mut tried = stems.then(|| of(&stem)).into_iter().chain(longer);
    let different = |names: &Vec<String>| once("", names).is_ok();
    tried.find(different).unwrap_or_else(|| of(&|p| p.display().to_string()))
}

/// Refuses texts that are the same.
///
/// # Errors
/// Such texts.
pub fn different_texts(paths: &[PathBuf], contents: &[String]) -> Result<()> {
    let all = || paths.iter().zip(contents);
    for (i, (path, text)) in all().enumerate() {
        if let Some((other, _)) = all().take(i).find(|(_, t)| *t == text) {
            let [a, b] = [other, path].map(|p| p.display());
            bail!(
                "--text {a} and --text {b} hold the same text, which would count as two; give it once"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_stand_behind_spaces() {
        assert_eq!(item::<usize>(" 64 "), Ok(64));
        assert!(item::<usize>("6 4").is_err());
    }

    #[test]
    fn a_value_is_named_once() {
        assert!(once("--keys", &[4, 16]).is_ok());
        let e = once("--keys", &[4, 16, 4]).unwrap_err().to_string();
        assert!(e.contains("--keys") && e.contains(" 4 "), "{e}");
    }

    #[test]
    fn names_are_as_short_as_tells_files_apart() {
        let names = |paths: &[&str], stems| {
            short_names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>(), stems)
        };
        assert_eq!(names(&["x/a.txt", "b.txt"], true), ["a", "b"]);
        assert_eq!(names(&["x/a.txt", "b.txt"], false), ["a.txt", "b.txt"]);
        assert_eq!(names(&["a.txt", "a.md"], true), ["a.txt", "a.md"]);
        assert_eq!(names(&["x/a.txt", "y/a.txt", "b"], true), ["x/a.txt", "y/a.txt", "b"]);
        assert_eq!(names(&["a.txt", "x/a.txt"], true), ["a.txt", "x/a.txt"]);
        assert_eq!(names(&["/v/x/a.txt", "/w/x/a.txt"], true), ["v/x/a.txt", "w/x/a.txt"]);
    }
}
