//! Keys with an outlier in a dimension that the query hardly looks at (`docs/results.md`, E16): which rule for choosing dimensions
//! still finds the tokens that have it.

mod common;

use common::cache::{Data, Heads, Layer, backends};
use common::select::select;
use longsight::select::MethodSpec;

const HEADS: Heads = Heads { query: 2, kv: 1, dim: 32 };
const TOKENS: usize = 512;
/// Tokens with the outlier: a budget's worth.
const PLANTED: usize = 16;
/// And the newest token.
const BUDGET: usize = PLANTED + 1;
/// The dimension, outside the eight with the largest query.
const DIM: usize = 20;

/// Queries of 1 in eight dimensions and 0.6 in that of the outlier, which adds `0.6 * 12` to the planted tokens'
/// logits; those of the others deviate by 1.6.
fn planted(with: f32) -> (Data, Vec<u32>) {
    let mut data = Data::random(16, HEADS, TOKENS);
    for q in data.q.chunks_exact_mut(HEADS.dim) {
        q.fill(0.01);
        q[..8].fill(1.0);
        q[DIM] = 0.6;
    }
    let tokens: Vec<u32> = (0..PLANTED).map(|i| (31 * i + 5) as u32).collect();
    for t in &tokens {
        data.k[*t as usize][DIM] = with;
    }
    (data, tokens)
}

/// Share of the tokens of largest logit that `method` takes.
fn recall(l: &Layer, data: &Data, method: &str) -> f64 {
    let spec: MethodSpec = method.parse().unwrap();
    let list = &select(l, &data.q, &spec).lists[0];
    assert_eq!(list.len(), BUDGET, "{method}");
    let logits = data.logits(0);
    let mut best: Vec<u32> = (0..TOKENS as u32 - 1).collect();
    best.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    let found = best[..PLANTED].iter().filter(|t| list.contains(t)).count();
    found as f64 / PLANTED as f64
}

fn method(metric: &str) -> String {
    format!(
        "sparcas-paper:dims=8:metric={metric}:update=1:budget={BUDGET}:sinks=0:recent=1:dense-layers=0:dense-below=0"
    )
}

#[test]
fn the_deviation_of_keys_guards_against_outliers() {
    for dev in backends() {
        let recalls = |with: f32| {
            let (data, tokens) = planted(with);
            let l = Layer::filled(&dev, &data, HEADS.dim);
            let oracle = format!("oracle:budget={BUDGET}:sinks=0:recent=1:dense-layers=0");
            let exact = recall(&l, &data, &oracle);
            assert_eq!(exact, 1.0, "{}", dev.name());
            let best = select(&l, &data.q, &oracle.parse().unwrap());
            let taken = best.lists[0].iter().filter(|t| tokens.contains(t)).count();
            (
                ["abs-q", "pair-norm", "abs-qk", "pair-qk"].map(|m| recall(&l, &data, &method(m))),
                taken,
            )
        };
        let ([abs_q, pair_norm, abs_qk, pair_qk], taken) = recalls(12.0);
        println!(
            "{}: {taken} of {PLANTED} planted in the best; {abs_q} {pair_norm} {abs_qk} {pair_qk}",
            dev.name()
        );
        assert!(taken >= PLANTED * 3 / 4, "the outlier decides: {taken}");
        // As the page quotes them: 1 and 15 of 16.
        assert_eq!([abs_q, pair_norm], [0.0625; 2], "{}: not seen by the query alone", dev.name());
        assert_eq!([abs_qk, pair_qk], [0.9375; 2], "{}", dev.name());
        // Without one the query is enough.
        let (plain, _) = recalls(0.5);
        println!("{}: without an outlier {plain:?}", dev.name());
        assert_eq!(plain, [0.8125; 4], "{}", dev.name());
    }
}
