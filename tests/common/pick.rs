//! Picking tokens by scores, in f64.

/// The `k` best tokens, those of `forced` first, ascending.
pub fn best(scores: &[f64], k: usize, forced: impl Fn(usize) -> bool) -> Vec<u32> {
    let score = |j: &usize| if forced(*j) { f64::INFINITY } else { scores[*j] };
    let mut order: Vec<usize> = (0..scores.len()).filter(|j| score(j) > f64::MIN).collect();
    order.sort_by(|a, b| score(b).total_cmp(&score(a)));
    order.truncate(k);
    order.sort_unstable();
    order.into_iter().map(|j| j as u32).collect()
}

pub fn ends(n: usize, sinks: usize, recent: usize) -> impl Fn(usize) -> bool {
    move |j| j < sinks || j + recent >= n
}

pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::MIN, f64::max);
    let p: Vec<f64> = logits.iter().map(|s| (s - top).exp()).collect();
    let sum: f64 = p.iter().sum();
    p.into_iter().map(|p| p / sum).collect()
}

/// The largest probability of some heads, token by token.
pub fn largest(rows: impl Iterator<Item = Vec<f64>>) -> Vec<f64> {
    rows.map(|r| softmax(&r))
        .reduce(|a, b| a.iter().zip(&b).map(|(x, y)| x.max(*y)).collect())
        .unwrap()
}

pub fn best_first(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order
}

/// LessIsMore as published: sinks, recent tokens, and from what lies between the best of every head, then the second
/// best of every head, and so on, each token once, until the budget is full.
pub fn in_turns(rows: &[Vec<f64>], budget: usize, sinks: usize, recent: usize) -> Vec<u32> {
    let n = rows[0].len();
    let mut list: Vec<usize> = (0..n).filter(|j| ends(n, sinks, recent)(*j)).collect();
    let rankings: Vec<Vec<usize>> = rows
        .iter()
        .map(|r| {
            let between: Vec<usize> = (sinks..n - recent).collect();
            best_first(&between.iter().map(|j| r[*j]).collect::<Vec<_>>())
                .into_iter()
                .map(|i| between[i])
                .collect()
        })
        .collect();
    for rank in 0..n {
        for j in rankings.iter().filter_map(|r| r.get(rank)) {
            if list.len() < budget && !list.contains(j) {
                list.push(*j);
            }
        }
    }
    list.sort_unstable();
    list.into_iter().map(|j| j as u32).collect()
}
