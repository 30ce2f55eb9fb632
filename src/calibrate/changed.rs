//! What differs between the settings of two runs.

use serde_json::Value;
use std::collections::BTreeMap;

/// A setting that two runs have otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Its name, inside others behind dots.
    pub name: String,
    /// In the run before.
    pub was: String,
    /// In this run.
    pub now: String,
}

/// One a line.
pub(super) fn lines(all: &[Changed]) -> String {
    all.iter().map(|c| format!("\n  {}: was {}, is {}", c.name, c.was, c.now)).collect()
}

/// What differs between settings as JSON.
pub(super) fn changed(was: &Value, now: &Value) -> Vec<Changed> {
    let (was, now) = (leaves(was), leaves(now));
    let names: std::collections::BTreeSet<&String> = was.keys().chain(now.keys()).collect();
    let of = |all: &BTreeMap<String, String>, name| all.get(name).map_or("none", |v| v).to_owned();
    let all = names.into_iter().map(|name| Changed {
        name: name.clone(),
        was: of(&was, name),
        now: of(&now, name),
    });
    all.filter(|c| c.was != c.now).collect()
}

/// Every value that holds no others by name, under its path.
fn leaves(value: &Value) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut open = vec![(String::new(), value)];
    while let Some((path, value)) = open.pop() {
        let below = |key: &str| if path.is_empty() { key.into() } else { format!("{path}.{key}") };
        match value {
            Value::Object(fields) => open.extend(fields.iter().map(|(k, v)| (below(k), v))),
            Value::String(text) => drop(out.insert(path, text.clone())),
            other => drop(out.insert(path, other.to_string())),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_differs_is_named() {
        let was = json!({"every": 1, "grid": {"block": 64, "budget": 16}, "teacher": "fine"});
        let now =
            json!({"every": 1, "grid": {"block": 64, "budget": 8}, "teacher": "plain", "seed": 3});
        let all = changed(&was, &now);
        let want =
            "\n  grid.budget: was 16, is 8\n  seed: was none, is 3\n  teacher: was fine, is plain";
        assert_eq!(lines(&all), want);
        assert!(changed(&was, &was).is_empty());
    }
}
