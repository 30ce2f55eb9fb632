//! Names of values as users type them: an enum's name in a plan file, with dashes; and what a mistyped one may have been.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A value of an enum by its name in plans; dashes may stand for underscores.
///
/// # Errors
/// A name that is none, with all there are.
pub fn parse_name<T: DeserializeOwned>(s: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::String(s.replace('-', "_"))).map_err(|e| {
        let said = e.to_string();
        let known = said.split_once("expected ").map_or(&*said, |(_, names)| names);
        let known = known.replace('_', "-");
        // Each name stands between backquotes.
        let meant = did_you_mean(s, known.split('`').skip(1).step_by(2));
        format!("unknown name `{s}`, expected {known}{meant}")
    })
}

/// "; did you mean `x`?" where one of `known` is close to what was typed, else nothing.
pub(crate) fn did_you_mean<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    /// As clap has it for options and commands.
    const CLOSE: f64 = 0.7;
    let typed = typed.to_ascii_lowercase().replace('_', "-");
    let near = known.into_iter().map(|name| (strsim::jaro(&typed, name), name));
    let best = near.filter(|(likeness, _)| *likeness > CLOSE).max_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(String::new(), |(_, name)| format!("; did you mean `{name}`?"))
}

/// The name that [`parse_name`] reads, with dashes.
pub(crate) fn option_name<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name.replace('_', "-"),
        Ok(other) => other.to_string(),
        Err(e) => e.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{DimMetric, HeadPool};

    #[test]
    fn names_are_read_as_they_are_shown() {
        let pool: HeadPool = parse_name("max-softmax").unwrap();
        assert_eq!((pool, pool.to_string().as_str()), (HeadPool::MaxSoftmax, "max-softmax"));
        let metric: DimMetric = parse_name(&DimMetric::PairQk.to_string()).unwrap();
        assert_eq!((metric, option_name(&metric).as_str()), (DimMetric::PairQk, "pair-qk"));
        let unknown = parse_name::<HeadPool>("median").unwrap_err();
        assert!(unknown.starts_with("unknown name `median`") && unknown.contains("`sum-logit`"));
        assert!(!unknown.contains('_'), "{unknown}");
        assert!(!unknown.contains("did you mean"), "{unknown}");
        let near = parse_name::<HeadPool>("max_sofmax").unwrap_err();
        assert!(near.ends_with("; did you mean `max-softmax`?"), "{near}");
        let own = parse_name::<HeadPool>("my_variant").unwrap_err();
        assert!(own.starts_with("unknown name `my_variant`, expected"), "{own}");
    }
}
