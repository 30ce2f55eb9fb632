//! A NOSA model of tiny sizes in f64, written out from the formulas: what the engine is compared with.

use super::forecast::Matrices;
use super::pick::softmax;
use super::tiny::Tiny;
use longsight::backend::DType;
use longsight::backend::reference::{decode, encode};
use longsight::model::{LayerWeight as L, Weight};

/// Tokens of a block; of a window, and from one to the next.
const BLOCK: usize = 64;
const WINDOW: (usize, usize) = (32, 16);

/// Blocks that are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub total: usize,
    /// Of these, by the query.
    pub by_query: usize,
    /// Tokens whose blocks are always in.
    pub sinks: usize,
    pub recent: usize,
}

/// Complete windows of `n` tokens.
pub fn windows(n: usize) -> usize {
    if n < WINDOW.0 { 0 } else { (n - WINDOW.0) / WINDOW.1 + 1 }
}

/// Mean of what complete windows hold; `row(j)`: numbers of token `j`.
pub fn means<'a>(n: usize, row: impl Fn(usize) -> &'a [f64]) -> Vec<Vec<f64>> {
    let mean = |w: usize| -> Vec<f64> {
        let tokens = WINDOW.1 * w..WINDOW.1 * w + WINDOW.0;
        let width = row(tokens.start).len();
        (0..width).map(|i| tokens.clone().map(|j| row(j)[i]).sum::<f64>() / 32.0).collect()
    };
    (0..windows(n)).map(mean).collect()
}

/// The largest of the windows that touch each block of `n` tokens.
fn blocks_of(window: &[f64], n: usize) -> Vec<f64> {
    let touch = |b: usize| (4 * b).saturating_sub(1)..(4 * b + 4).min(window.len());
    let largest = |b| touch(b).map(|j| window[j]).fold(f64::NEG_INFINITY, f64::max);
    (0..n.div_ceil(BLOCK)).map(largest).collect()
}

/// The `k` largest, as ascending numbers; of equal ones the first; never -infinity.
fn top(scores: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> =
        (0..scores.len()).filter(|b| scores[*b] > f64::NEG_INFINITY).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Blocks of a text of `n` tokens by scores and importance of its windows, in two stages: those of the first, and all.
pub fn two_stages(query: &[f64], importance: &[f64], n: usize, c: Choice) -> [Vec<usize>; 2] {
    let forced = |b: usize| b * BLOCK < c.sinks || (b + 1) * BLOCK + c.recent > n;
    let force = |mut scores: Vec<f64>, which: &dyn Fn(usize) -> bool| {
        let all = scores.iter_mut().enumerate();
        all.filter(|(b, _)| which(*b)).for_each(|(_, s)| *s = f64::INFINITY);
        scores
    };
    let first = top(&force(blocks_of(query, n), &forced), c.by_query);
    let taken = |b: usize| forced(b) || first.contains(&b);
    let all = top(&force(blocks_of(importance, n), &taken), c.total);
    [first, all]
}

/// Tokens of blocks.
pub fn tokens_of(blocks: &[usize], n: usize) -> Vec<u32> {
    blocks.iter().flat_map(|b| b * BLOCK..((b + 1) * BLOCK).min(n)).map(|j| j as u32).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `a * ln(1 + exp(x))`.
pub fn importance(a: f64, x: f64) -> f64 {
    a * if x > 30.0 { x + (-x).exp() } else { x.exp().ln_1p() }
}

/// What was computed for every row of a text.
pub struct Read {
    /// `[rows, vocab]`.
    pub logits: Vec<f64>,
    /// `[layers][rows][kv_heads]`: tokens attended to, ascending.
    pub seen: Vec<Vec<Vec<Vec<u32>>>>,
}

/// The model with weights and cache in `dtype`, and the Forecast that makes the first choice, where one does.
pub struct Reference<'a> {
    pub tiny: &'a Tiny,
    pub dtype: DType,
    pub forecast: Option<&'a Matrices>,
}

type Rows = Vec<Vec<f64>>;

impl Reference<'_> {
    fn rounded(&self, x: &[f64]) -> Vec<f64> {
        decode(self.dtype, &encode(self.dtype, x))
    }

    fn weight(&self, which: Weight) -> Vec<f64> {
        let (_, w) = self.tiny.weights.iter().find(|(w, _)| *w == which).unwrap();
        w.iter().copied().map(f64::from).collect()
    }

    /// `w x` for every row; matrices are rounded.
    fn linear(&self, x: &Rows, w: &[f64]) -> Rows {
        let w = self.rounded(w);
        let one = |x: &Vec<f64>| w.chunks_exact(x.len()).map(|w| dot(w, x)).collect();
        x.iter().map(one).collect()
    }

    fn norm(&self, x: &Rows, which: Weight) -> Rows {
        let w = self.weight(which);
        let one = |x: &Vec<f64>| -> Vec<f64> {
            let scale = 1.0 / (dot(x, x) / x.len() as f64 + self.tiny.config.norm_eps).sqrt();
            x.iter().zip(&w).map(|(x, w)| x * scale * w).collect()
        };
        x.iter().map(one).collect()
    }

    /// Dimension `i` of a head rotates with `i + head_dim / 2`.
    fn rope(&self, mut rows: Rows) -> Rows {
        let (d, freq) = (self.tiny.config.head_dim, self.tiny.config.inv_freq());
        for (t, row) in rows.iter_mut().enumerate() {
            for head in row.chunks_exact_mut(d) {
                let (front, back) = head.split_at_mut(d / 2);
                for ((a, b), f) in front.iter_mut().zip(back).zip(&freq) {
                    let (sin, cos) = f64::from(t as f32 * f).sin_cos();
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
        rows
    }

    /// Reads a text; row `i` chooses by `choice(i)`, and sees everything where that is none.
    pub fn read(&self, text: &[u32], choice: impl Fn(usize) -> Option<Choice>) -> Read {
        let c = &self.tiny.config;
        let embed = self.rounded(&self.weight(Weight::Embed));
        let row = |t: &u32| embed[*t as usize * c.hidden..][..c.hidden].to_vec();
        let mut x: Rows = text.iter().map(row).collect();
        let (mut before, mut seen) = (Rows::new(), Vec::new());
        for l in 0..c.n_layers {
            let normed = self.norm(&x, Weight::Layer(l, L::AttnNorm));
            // The first layer has a projection for itself.
            let asked = if l == 0 { &normed } else { &before };
            let forecast = self.forecast.map(|all| {
                let w: Vec<f64> = all[l].1.iter().copied().map(f64::from).collect();
                self.rope(self.linear(asked, &w))
            });
            let (out, lists) = self.attention(l, &normed, forecast.as_ref(), &choice);
            add(&mut x, &self.linear(&out, &self.weight(Weight::Layer(l, L::O))));
            let inner = self.norm(&x, Weight::Layer(l, L::FfnNorm));
            let gate = self.linear(&inner, &self.weight(Weight::Layer(l, L::Gate)));
            let up = self.linear(&inner, &self.weight(Weight::Layer(l, L::Up)));
            let silu = |(g, u): (&f64, &f64)| g / (1.0 + (-g).exp()) * u;
            let ffn: Rows =
                gate.iter().zip(&up).map(|(g, u)| g.iter().zip(u).map(silu).collect()).collect();
            add(&mut x, &self.linear(&ffn, &self.weight(Weight::Layer(l, L::Down))));
            before = normed;
            seen.push(lists);
        }
        let last = self.norm(&x, Weight::OutputNorm);
        Read { logits: self.linear(&last, &self.weight(Weight::Output)).concat(), seen }
    }

    /// Attention of a layer, and what each row and KV head sees.
    fn attention(
        &self,
        l: usize,
        normed: &Rows,
        forecast: Option<&Rows>,
        choice: &impl Fn(usize) -> Option<Choice>,
    ) -> (Rows, Vec<Vec<Vec<u32>>>) {
        let c = &self.tiny.config;
        let (d, kv, group) = (c.head_dim, c.n_kv_heads, c.n_heads / c.n_kv_heads);
        let project = |w| self.linear(normed, &self.weight(Weight::Layer(l, w)));
        let (q, k, v) = (self.rope(project(L::Q)), self.rope(project(L::K)), project(L::V));
        let (a, delta) = (L::ImportanceScale, L::Importance);
        let [a, delta] = [a, delta].map(|w| self.weight(Weight::Layer(l, w)));
        let bias = |v: &Vec<f64>| -> Vec<f64> {
            let x = delta.chunks_exact(kv * d).map(|w| dot(w, v));
            self.rounded(&a.iter().zip(x).map(|(a, x)| importance(*a, x)).collect::<Vec<_>>())
        };
        let cis: Rows = v.iter().map(bias).collect();
        let k: Rows = k.iter().map(|k| self.rounded(k)).collect();
        let v: Rows = v.iter().map(|v| self.rounded(v)).collect();
        let scale = 1.0 / (d as f64).sqrt();
        let n = normed.len();
        let mut out = vec![vec![0.0; c.n_heads * d]; n];
        let mut lists = vec![Vec::new(); n];
        for m in 0..kv {
            let part = |row: &'_ Vec<f64>| -> Vec<f64> { row[m * d..][..d].to_vec() };
            let keys: Rows = k.iter().map(part).collect();
            let pooled = |rows: Rows| -> Rows { rows.iter().map(|r| self.rounded(r)).collect() };
            let key_means = pooled(means(n, |j| &keys[j]));
            let cis_means = pooled(means(n, |j| &cis[j][m..=m])).concat();
            for i in 0..n {
                let heads = (m * group..(m + 1) * group).map(|h| &q[i][h * d..][..d]);
                let there = windows(i + 1);
                let tokens = match choice(i) {
                    None => (0..=i as u32).collect(),
                    Some(choice) => {
                        let logits = |q: &[f64], scale: f64| -> Vec<f64> {
                            key_means[..there].iter().map(|k| scale * dot(q, k)).collect()
                        };
                        let scores = match forecast {
                            Some(f) => logits(&f[i][m * d..][..d], 1.0),
                            None => heads.clone().fold(vec![0.0; there], |mut sum, q| {
                                let p = softmax(&logits(q, scale));
                                sum.iter_mut().zip(p).for_each(|(s, p)| *s += p);
                                sum
                            }),
                        };
                        let [_, all] = two_stages(&scores, &cis_means[..there], i + 1, choice);
                        tokens_of(&all, i + 1)
                    }
                };
                for (h, q) in (m * group..).zip(heads) {
                    let logit = |j: &u32| scale * dot(q, &keys[*j as usize]) + cis[*j as usize][m];
                    let p = softmax(&tokens.iter().map(logit).collect::<Vec<_>>());
                    for (j, p) in tokens.iter().zip(p) {
                        let value = &v[*j as usize][m * d..][..d];
                        let to = &mut out[i][h * d..][..d];
                        to.iter_mut().zip(value).for_each(|(o, v)| *o += p * v);
                    }
                }
                lists[i].push(tokens);
            }
        }
        (out, lists)
    }
}

fn add(x: &mut Rows, more: &Rows) {
    for (x, more) in x.iter_mut().zip(more) {
        x.iter_mut().zip(more).for_each(|(x, m)| *x += m);
    }
}
