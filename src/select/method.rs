//! Methods by name, with the options that override their defaults (`options.rs`). `profile.rs` and `anchors.rs` turn
//! them into plans.

use super::SelectError;
use super::blocks::Query;
use super::catalog::{METHODS, Variant};
use super::options::MethodSpec;
use crate::names::did_you_mean;

impl Default for MethodSpec {
    fn default() -> Self {
        Variant::Sparcas.into()
    }
}

impl std::str::FromStr for MethodSpec {
    type Err = SelectError;

    /// A method's name, with options where wanted: `sparcas:dims=16:budget=256`.
    fn from_str(s: &str) -> Result<Self, SelectError> {
        let mut parts = s.split(':');
        let name = parts.next().unwrap_or_default();
        let Some(info) = METHODS.iter().find(|m| m.name == name) else {
            let known: Vec<_> = METHODS.iter().map(|m| m.name).collect();
            let meant = did_you_mean(name, known.iter().copied());
            let known = known.join(", ");
            return Err(SelectError::UnknownMethod { name: name.into(), known, meant });
        };
        let mut spec: MethodSpec = info.variant.into();
        for part in parts {
            let bad = |what: String| SelectError::BadPlan { method: name.into(), reason: what };
            let options: Vec<_> = info.variant.options().collect();
            let read = || match options[..] {
                [] => "none".to_owned(),
                _ => options.join(", "),
            };
            let Some((key, value)) = part.split_once('=') else {
                return Err(bad(format!("{part:?} is no option; write key=value ({})", read())));
            };
            if !options.contains(&key) {
                let meant = did_you_mean(key, options.iter().copied());
                return Err(bad(format!(
                    "{key:?} is no option of this method; it reads {}{meant}",
                    read()
                )));
            }
            spec.set(key, value)
                .map_err(|why| bad(format!("{value:?} is no value for {key}: {why}")))?;
        }
        Ok(spec)
    }
}

impl MethodSpec {
    /// Name on the command line.
    pub fn name(&self) -> &'static str {
        METHODS.iter().find(|m| m.variant == self.variant).map_or("dense", |m| m.name)
    }

    /// Its plans are scored with a Forecast ([`Plan::wants_forecast`](super::Plan::wants_forecast)).
    pub fn wants_forecast(&self) -> bool {
        let asks = self.variant.takes("query") && self.query == Some(Query::Forecast);
        asks || self.variant == Variant::Sparda
    }
}

#[cfg(test)]
#[path = "tests/method.rs"]
mod tests;
