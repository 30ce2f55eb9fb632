//! Methods of one evaluation or measurement: every method under every combination of option values.

use super::lists::{item, once};
use super::method_args::{OtherOptions, SWEPT, read_by_one};
use crate::backend::DimMetric;
use crate::select::{MethodSpec, SelectError, parse_name};
use anyhow::Result;
use clap::Args;

/// Options for all methods. With several values, each one makes rows of its own: all combinations run.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sparse attention")]
pub struct Sweep {
    /// Tokens attended to per KV head, comma separated [default: as in `longsight run`]. Each value is a row:
    /// 128,256,512 runs every method three times. --dims, --update and --metric multiply the rows the same way,
    /// for the methods that know them
    #[arg(long, visible_alias = "budgets", value_name = "TOKENS,...", value_delimiter = ',', value_parser = item::<usize>)]
    pub budget: Vec<usize>,
    /// Key dimensions scored, comma separated [default: as in `longsight run`]
    #[arg(long, value_name = "DIMS,...", value_delimiter = ',', value_parser = item::<usize>)]
    pub dims: Vec<usize>,
    /// Steps between two choices of dimensions (query-chosen profiles), comma separated; 0 = once
    #[arg(long, value_name = "STEPS,...", value_delimiter = ',', value_parser = item::<u32>)]
    pub update: Vec<u32>,
    /// Importance of a dimension (query-chosen profiles), comma separated: abs-q, pair-norm, abs-qk, pair-qk
    #[arg(long, value_parser = metric_name, value_name = "METRIC,...", value_delimiter = ',')]
    pub metric: Vec<String>,
    #[command(flatten)]
    pub others: OtherOptions,
}

/// Checks a method with its options and keeps its name.
pub fn method_name(name: &str) -> Result<String, SelectError> {
    name.trim().parse::<MethodSpec>().map(|_| name.trim().to_string())
}

/// Checks a metric and keeps its name.
fn metric_name(name: &str) -> Result<String, String> {
    parse_name::<DimMetric>(name.trim()).map(|_| name.trim().to_string())
}

fn strings<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(T::to_string).collect()
}

impl Sweep {
    /// The given methods with these options on top. An option with several values is added to the name:
    /// `sparcas` becomes `sparcas:budget=128` and `sparcas:budget=256`, and a value of the method's own gives way.
    ///
    /// # Errors
    /// A name that is no method, options that it does not know, or what is there twice.
    pub fn specs(&self, methods: &[String]) -> Result<Vec<(String, MethodSpec)>> {
        let (budget, dims) = (strings(&self.budget), strings(&self.dims));
        let values = [budget, dims, strings(&self.update), self.metric.clone()];
        let lists: Vec<_> = SWEPT.into_iter().zip(values).collect();
        once("--methods", methods)?;
        for (key, values) in &lists {
            once(&format!("--{key}"), values)?;
        }
        // A single value goes to all methods without a mention, but for those that name another.
        let single = lists.iter().filter(|(_, v)| v.len() == 1);
        let options = self.others.and(single.map(|(key, v)| (*key, v[0].clone())));
        let (mut names, mut bases) = (Vec::new(), Vec::new());
        for method in methods {
            let base = method.parse::<MethodSpec>()?;
            let mut rows = vec![method.clone()];
            for (key, values) in
                lists.iter().filter(|(key, v)| v.len() > 1 && base.variant.takes(key))
            {
                rows = rows.iter().flat_map(|n| with_values(n, key, values)).collect();
            }
            names.extend(rows);
            bases.push(base);
        }
        let typed: Vec<&str> = methods.iter().map(String::as_str).collect();
        for (key, _) in lists.iter().filter(|(_, v)| v.len() > 1) {
            read_by_one(key, &bases, &typed)?;
        }
        let names: Vec<String> = names.iter().map(|n| options.renamed(n)).collect();
        once("--methods, with the options given beside it,", &names)?;
        let specs = names.iter().map(|n| Ok(n.parse()?)).collect::<Result<Vec<MethodSpec>>>()?;
        Ok(names.into_iter().zip(options.apply(&specs)?).collect())
    }
}

/// `name` with `key` set to each of `values`.
fn with_values(name: &str, key: &str, values: &[String]) -> Vec<String> {
    let own = format!("{key}=");
    let kept: Vec<&str> = name.split(':').filter(|part| !part.starts_with(&own)).collect();
    values.iter().map(|v| format!("{}:{key}={v}", kept.join(":"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(sweep: &Sweep, methods: &[&str]) -> Vec<String> {
        sweep.specs(&strings(methods)).unwrap().into_iter().map(|s| s.0).collect()
    }

    #[test]
    fn several_values_multiply_the_methods_that_know_the_option() {
        let sweep = Sweep {
            budget: vec![128, 256],
            dims: vec![8],
            update: vec![4, 16],
            ..Sweep::default()
        };
        let all = ["dense", "window", "sparcas:budget=64:recent=8", "sparcas-paper"];
        let want = [
            "dense",
            "window:budget=128",
            "window:budget=256",
            "sparcas:recent=8:budget=128",
            "sparcas:recent=8:budget=256",
            "sparcas-paper:budget=128:update=4",
            "sparcas-paper:budget=128:update=16",
            "sparcas-paper:budget=256:update=4",
            "sparcas-paper:budget=256:update=16",
        ];
        assert_eq!(names(&sweep, &all), want);
        let specs = sweep.specs(&strings(&all)).unwrap();
        let last = &specs[8].1;
        assert_eq!((last.budget, last.dims, last.update), (Some(256), Some(8), Some(16)));
        assert_eq!((specs[3].1.budget, specs[3].1.recent), (Some(128), Some(8)));
    }

    #[test]
    fn one_value_leaves_the_names_alone() {
        let sweep = Sweep { budget: vec![96], metric: vec!["pair-qk".into()], ..Sweep::default() };
        assert_eq!(names(&sweep, &["sparcas-paper"]), ["sparcas-paper"]);
        let spec = sweep.specs(&strings(&["sparcas-paper"])).unwrap().remove(0).1;
        assert_eq!((spec.budget, spec.metric), (Some(96), Some(DimMetric::PairQk)));
        assert!(sweep.specs(&strings(&["sparc"])).is_err());
        // Once each, also after options have taken the place of what made them differ.
        let refused = |sweep: &Sweep, methods: &[&str], what: &str| {
            let e = sweep.specs(&strings(methods)).unwrap_err().to_string();
            assert!(e.contains(what), "{e}");
        };
        refused(&sweep, &["window", "dense", "window"], "--methods names window twice");
        refused(&sweep, &["window:budget=1", "window:budget=2"], "names window:budget=96 twice");
        let twice = Sweep { budget: vec![64, 128, 64], ..Sweep::default() };
        refused(&twice, &["window"], "--budget names 64 twice");
        // But for what a name says itself.
        let own = ["sparcas-paper:budget=64:update=8", "window:budget=64"];
        let want = ["sparcas-paper:budget=96:update=8", "window:budget=96"];
        assert_eq!(names(&sweep, &own), want);
        assert_eq!(sweep.specs(&strings(&own)).unwrap()[1].1.budget, Some(96));
    }
}
