//! Lengths that a plan is not for: where it chooses nothing, and beyond what it was made for.

use super::{Budget, Plan};
use std::fmt;

/// Why a plan attends to every token of a sequence, and which options that is due to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllDense {
    /// No layer is sparse at any length.
    Layers,
    /// The sequence has not more than `until` tokens.
    Length {
        /// Longest sequence that is attended to densely.
        until: usize,
        /// What decides it.
        options: &'static str,
    },
}

impl fmt::Display for AllDense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AllDense::Layers => write!(f, "no layer of it is sparse (--dense-layers)"),
            AllDense::Length { until, options } => {
                write!(f, "it attends to every token up to {until} ({options})")
            }
        }
    }
}

impl Plan {
    /// Why every token of a sequence of `tokens` tokens is attended to; none where some layer chooses.
    pub fn all_dense(&self, tokens: usize) -> Option<AllDense> {
        let sparse = self.layers.iter().filter(|l| l.sparse()).map(|l| l.budget);
        let Some(b) = sparse.min_by_key(Budget::dense_until) else { return Some(AllDense::Layers) };
        let until = b.dense_until();
        if tokens > until {
            return None;
        }
        let fits = tokens <= Budget { dense_below: 0, ..b }.dense_until();
        let options = match (tokens <= b.dense_below, fits) {
            (true, true) => "--dense-below and --budget",
            (true, false) => "--dense-below",
            _ => "--budget",
        };
        Some(AllDense::Length { until, options })
    }

    /// What to say where texts of `context` tokens may come: more than the plan was made for.
    pub fn too_short_for(&self, context: usize) -> Option<String> {
        let short = self.context > 0 && self.context < context;
        (short && self.layers.iter().any(|l| l.sparse())).then(|| {
            format!(
                "the plan of {} was made for texts of up to {} tokens, by which its budgets go, and {context} may come",
                self.method, self.context
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::select::{MethodSpec, ModelShape};

    #[test]
    fn the_option_to_blame_is_named() {
        let windows = [None; 4];
        let model = ModelShape {
            model: "m",
            windows: &windows,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            importance: None,
        };
        let why = |method: &str, tokens: usize| {
            let spec: MethodSpec = method.parse().unwrap();
            spec.plan(&model, 4096).unwrap().all_dense(tokens).map(|w| w.to_string())
        };
        let up_to = |n: usize, options: &str| {
            Some(format!("it attends to every token up to {n} ({options})"))
        };
        let both = "sparcas:budget=128:dense-below=512";
        assert_eq!(why(both, 100), up_to(512, "--dense-below and --budget"));
        assert_eq!(why(both, 512), up_to(512, "--dense-below"));
        assert_eq!(why(both, 513), None);
        assert_eq!(why("sparcas:budget=128:dense-below=0", 128), up_to(128, "--budget"));
        assert!(why("sparcas:dense-layers=4", 4096).unwrap().contains("--dense-layers"));
        assert!(why("dense", 4096).unwrap().contains("no layer"));
    }
}
