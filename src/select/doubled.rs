//! A plan with twice the budget.

use super::{Budget, Follow, LayerPlan, Plan, Role, Scorer};
use crate::backend::Share;

impl Plan {
    /// The plan with twice the budget in every layer, for sequences of at most `tokens` tokens; every layer dense where
    /// that is all of them.
    pub fn doubled(&self, tokens: usize) -> Plan {
        let all = |l: &LayerPlan| l.sparse() && l.budget.tokens_at(tokens) >= tokens.div_ceil(2);
        let double: fn(&LayerPlan) -> LayerPlan = match self.layers.iter().any(all) {
            true => |_| LayerPlan::dense(),
            false => {
                |l| {
                    let mut wide =
                        LayerPlan { role: wider(&l.role), budget: l.budget.doubled(), ..l.clone() };
                    // Without scores there is nothing but what is kept: the window takes all that is new.
                    if l.selects() && l.scorer == Scorer::None {
                        let grown = wide.budget.least() - l.budget.least();
                        wide.keep.recent = l.keep.recent.saturating_add(grown);
                    }
                    wide
                }
            }
        };
        Plan { layers: self.layers.iter().map(double).collect(), ..self.clone() }
    }
}

/// With twice the candidates.
fn wider(role: &Role) -> Role {
    let mut role = role.clone();
    if let Role::Reuse { refine: Some(refine), .. } = &mut role {
        refine.candidates = refine.candidates.saturating_mul(2);
    }
    role
}

impl Budget {
    fn doubled(&self) -> Budget {
        let share = |s: Share| Share {
            permille: s.permille.saturating_mul(2).min(1000),
            at_least: s.at_least.saturating_mul(2),
        };
        let follow = |f| match f {
            Follow::Shared { mean, at_least } => Follow::Shared {
                mean: mean.saturating_mul(2),
                at_least: at_least.saturating_mul(2),
            },
            mass @ Follow::Mass { .. } => mass,
        };
        Budget {
            tokens: self.tokens.saturating_mul(2),
            dense_below: self.dense_below,
            share: self.share.map(share),
            follow: self.follow.map(follow),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{METHODS, MethodSpec, ModelShape, Variant};

    #[test]
    fn budgets_double_until_every_layer_is_dense() {
        let windows = [None; 4];
        let model = ModelShape::of_layers(&windows, 64);
        for (name, want) in [
            ("sparcas:budget=100:dense-below=0", vec![100, 200, 400]),
            ("kascade", vec![128, 256, 512]),
            ("refined:budget=100:dense-below=0", vec![100, 200, 400]),
            ("sparcas:budget=100:floor=0.5:dense-below=0", vec![100, 200, 400]),
        ] {
            let mut plan = name.parse::<MethodSpec>().unwrap().plan(&model, 700).unwrap();
            let mut budgets = Vec::new();
            while let Some(l) = plan.layers.iter().rfind(|l| l.sparse()) {
                budgets.push(l.budget.tokens_at(700));
                plan = plan.doubled(700);
                plan.check(&model).unwrap();
            }
            assert_eq!(budgets, want, "{name}");
            assert!(plan.layers.iter().all(|l| *l == super::LayerPlan::dense()));
        }
    }

    #[test]
    fn every_method_has_a_plan_with_twice_the_budget() {
        let windows = [None; 16];
        let model = ModelShape::of_layers(&windows, 64);
        for m in METHODS.iter().filter(|m| m.variant != Variant::Nosa) {
            let mut plan = MethodSpec::from(m.variant).plan(&model, 1 << 16).unwrap();
            for times in 0..12 {
                plan = plan.doubled(1 << 16);
                plan.check(&model).unwrap_or_else(|e| panic!("{times}: {e}"));
            }
            assert!(plan.layers.iter().all(|l| !l.sparse()), "{}", m.name);
        }
    }

    #[test]
    fn a_window_that_doubles_is_a_longer_window() {
        let windows = [None; 4];
        let model = ModelShape::of_layers(&windows, 64);
        let spec = "window:budget=100:dense-below=0".parse::<MethodSpec>().unwrap();
        let before = spec.plan(&model, 700).unwrap();
        let after = before.doubled(700);
        after.check(&model).unwrap();
        let layers = || after.layers.iter().zip(&before.layers).filter(|(l, _)| l.selects());
        assert!(layers().count() > 1);
        for (l, was) in layers() {
            assert_eq!(l.keep.sinks, was.keep.sinks);
            assert_eq!((l.keep.sinks + l.keep.recent, l.budget.tokens), (200, 200));
        }
    }
}
