//! NLL by decoded position, and its difference to dense with bootstrap intervals.

use super::Row;
use super::bootstrap::{Bootstrap, Interval, Unit};
use serde::Serialize;

/// How rows are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PairedConfig {
    /// Parts into which the scored tokens are cut, at most as many as there are tokens.
    pub buckets: usize,
    /// Neighbouring tokens that are resampled together, because their errors depend on each other.
    pub block: usize,
    /// The resampling.
    #[serde(flatten)]
    pub bootstrap: Bootstrap,
}

/// Part of the scored tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PositionBucket {
    /// First token, counted from the first scored one.
    pub from: usize,
    /// After the last token.
    pub to: usize,
    /// Scored tokens of all texts.
    pub tokens: usize,
    /// Mean NLL in nats.
    pub nll: f64,
    /// Mean difference to dense in nats.
    pub difference: f64,
    /// Of the difference, blocks of tokens resampled inside each text; none where every text has one block.
    pub interval: Option<Interval>,
}

/// One method against dense on the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Paired {
    /// Method with its options, as given.
    pub method: String,
    /// Scored tokens of all texts.
    pub tokens: usize,
    /// Different texts.
    pub texts: usize,
    /// Mean difference to dense in nats.
    pub difference: f64,
    /// Blocks of tokens resampled inside each text: what other tokens of these texts would give.
    pub over_positions: Option<Interval>,
    /// Whole texts resampled: what other texts of this kind would give. None for one text; a few texts give a
    /// rough interval.
    pub over_texts: Option<Interval>,
    /// By position.
    pub buckets: Vec<PositionBucket>,
}

/// Compares rows of [`evaluate`](super::evaluate), which come sample by sample, dense first.
pub fn paired(rows: &[Row], config: &PairedConfig) -> Vec<Paired> {
    let samples = rows.iter().filter(|r| r.method == "dense").count();
    if samples == 0 || !rows.len().is_multiple_of(samples) {
        return Vec::new();
    }
    let plans = rows.len() / samples;
    let methods = (0..plans).map(|p| {
        let of: Vec<Series<'_>> =
            rows.chunks_exact(plans).map(|rows| Series::new(&rows[p], &rows[0])).collect();
        compared(&rows[p].method, &of, config)
    });
    methods.collect()
}

/// The scored tokens of one sample.
struct Series<'a> {
    text: &'a str,
    nlls: Vec<f64>,
    differences: Vec<f64>,
}

impl Series<'_> {
    fn new<'a>(row: &'a Row, dense: &Row) -> Series<'a> {
        let nlls: Vec<f64> = row.nlls.iter().map(|&x| f64::from(x)).collect();
        let differences = nlls.iter().zip(&dense.nlls).map(|(a, b)| a - f64::from(*b)).collect();
        // Samples of one text are named after it and their length.
        let text = row.sample.rsplit_once(' ').map_or(row.sample.as_str(), |(text, _)| text);
        Series { text, nlls, differences }
    }

    /// Blocks of the differences between two tokens.
    fn blocks(&self, from: usize, to: usize, block: usize) -> Vec<Unit> {
        let part = |all: &[f64]| -> Vec<Unit> { all.chunks(block.max(1)).map(Unit::of).collect() };
        part(between(&self.differences, from, to))
    }
}

fn between(all: &[f64], from: usize, to: usize) -> &[f64] {
    &all[from.min(all.len())..to.min(all.len())]
}

fn compared(method: &str, of: &[Series<'_>], config: &PairedConfig) -> Paired {
    let blocks = |from, to| -> Vec<Vec<Unit>> {
        of.iter().map(|s| s.blocks(from, to, config.block)).collect()
    };
    let longest = of.iter().map(|s| s.differences.len()).max().unwrap_or(0);
    // Samples of one text share tokens: they are drawn together.
    let mut texts: Vec<(&str, Unit)> = Vec::new();
    for s in of {
        let unit = Unit::of(&s.differences);
        match texts.iter_mut().find(|(text, _)| *text == s.text) {
            Some((_, all)) => *all = Unit::all([*all, unit]),
            None => texts.push((s.text, unit)),
        }
    }
    let buckets = config.buckets.clamp(1, longest.max(1));
    let bucket = |i: usize| {
        let (from, to) = (i * longest / buckets, (i + 1) * longest / buckets);
        let nll = Unit::all(of.iter().map(|s| Unit::of(between(&s.nlls, from, to))));
        let strata = blocks(from, to);
        PositionBucket {
            from,
            to,
            tokens: nll.n,
            nll: nll.mean(),
            difference: Unit::all(strata.iter().flatten().copied()).mean(),
            interval: config.bootstrap.interval(&strata),
        }
    };
    let strata = blocks(0, longest);
    let all = Unit::all(strata.iter().flatten().copied());
    Paired {
        method: method.to_string(),
        tokens: all.n,
        texts: texts.len(),
        difference: all.mean(),
        over_positions: config.bootstrap.interval(&strata),
        over_texts: config.bootstrap.interval(&[texts.iter().map(|t| t.1).collect()]),
        buckets: (0..buckets).map(bucket).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::AuditSummary;
    use crate::eval::Difference;

    const CONFIG: PairedConfig =
        PairedConfig { buckets: 4, block: 5, bootstrap: Bootstrap { resamples: 500, seed: 3 } };

    fn row(sample: &str, method: &str, nlls: Vec<f32>) -> Row {
        Row {
            sample: sample.into(),
            method: method.into(),
            nll: 0.0,
            nll_difference: Difference { mean: 0.0, error: None },
            top1: 0.0,
            exact: false,
            nlls,
            kv_bytes: 0,
            seconds: 0.0,
            audit: AuditSummary::default(),
        }
    }

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i * i % 13) as f32 / 4.0).collect()
    }

    #[test]
    fn a_constant_difference_has_no_spread_whatever_the_texts_do() {
        let shifted = |n: usize| wave(n).iter().map(|x| x + 0.5).collect();
        let rows = [
            row("a 100", "dense", wave(40)),
            row("a 100", "m", shifted(40)),
            row("b 100", "dense", wave(40)),
            row("b 100", "m", shifted(40)),
        ];
        let all = paired(&rows, &CONFIG);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].method.as_str(), all[0].difference), ("dense", 0.0));
        let m = &all[1];
        assert_eq!((m.method.as_str(), m.tokens, m.texts, m.difference), ("m", 80, 2, 0.5));
        let constant = Some(Interval { mean: 0.5, low: 0.5, high: 0.5 });
        assert_eq!((m.over_positions, m.over_texts), (constant, constant));
        assert_eq!(m.buckets.len(), 4);
        assert!(m.buckets.iter().all(|b| (b.tokens, b.interval) == (20, constant)));
        let mean = wave(40)[10..20].iter().map(|&x| f64::from(x)).sum::<f64>() / 10.0 + 0.5;
        assert!((m.buckets[1].nll - mean).abs() < 1e-9);
    }

    #[test]
    fn texts_that_differ_widen_the_interval_over_texts_only() {
        let rows: Vec<Row> = (0..6)
            .flat_map(|t| {
                let name = format!("text{t} 64");
                let by = if t % 2 == 0 { 1.0 } else { -1.0 };
                let nlls = wave(40).iter().map(|x| x + by).collect();
                [row(&name, "dense", wave(40)), row(&name, "m", nlls)]
            })
            .collect();
        let m = &paired(&rows, &CONFIG)[1];
        assert_eq!((m.over_positions.unwrap().low, m.over_positions.unwrap().high), (0.0, 0.0));
        let texts = m.over_texts.unwrap();
        assert!(texts.low <= -0.5 && texts.high >= 0.5, "{texts:?}");
    }

    #[test]
    fn samples_of_one_text_count_as_one() {
        let rows = [
            row("a 100", "dense", wave(10)),
            row("a 100", "m", wave(10)),
            row("a 200", "dense", wave(20)),
            row("a 200", "m", wave(20)),
        ];
        let m = &paired(&rows, &CONFIG)[1];
        assert_eq!((m.texts, m.tokens, m.over_texts), (1, 30, None));
        assert_eq!(m.buckets.iter().map(|b| b.tokens).sum::<usize>(), 30);
        assert!(paired(&[], &CONFIG).is_empty());
    }
}
