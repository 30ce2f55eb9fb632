//! Names of values as users type them: an enum's name in a plan file, with dashes.

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
        format!("unknown name `{s}`, expected {}", known.replace('_', "-"))
    })
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
        let own = parse_name::<HeadPool>("my_variant").unwrap_err();
        assert!(own.starts_with("unknown name `my_variant`, expected"), "{own}");
    }
}
