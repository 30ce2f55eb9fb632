//! A model's [`KeyProfile`], measured once on the built-in text.

use super::EngineError;
use super::calibrate::{order_source, read_text};
use crate::backend::DType;
use crate::model::{Decoder, LayerView, ModelConfig, OrderSource, Stage, Tokenizer, key_profile};
use crate::select::KeyProfile;
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// To be raised when the measurement changes, so that profiles saved before are measured anew.
const VERSION: u32 = 1;
/// Rounds of rotations; the matrices at hand need about ten.
const SWEEPS: usize = 40;

/// Where an engine gets its profile from.
pub enum Profiling {
    /// No method reads one.
    None,
    /// It is there, in the checkpoint's order.
    There(KeyProfile),
    /// It is measured on this, and kept here.
    Measure(OrderSource, Option<PathBuf>),
}

impl Profiling {
    /// A profile that is `given`, one saved in `dir`, one to be measured, or a neutral one where nothing may be.
    ///
    /// # Errors
    /// [`EngineError::BadOption`] for a profile of another model.
    pub fn new(
        given: Option<KeyProfile>,
        measure: bool,
        dir: Option<&Path>,
        (c, fingerprint): (&ModelConfig, &str),
    ) -> Result<Self, EngineError> {
        let sizes = (c.n_kv_heads, c.head_dim);
        if let Some(given) = given {
            if (given.kv_heads, given.head_dim) != sizes || !given.fits(c.n_layers) {
                return Err(EngineError::BadOption(
                    "the key profile was measured on another model".into(),
                ));
            }
            return Ok(Profiling::There(given));
        }
        if !measure {
            return Ok(Profiling::There(KeyProfile::neutral(c.n_layers, sizes.0, sizes.1)));
        }
        let source = OrderSource { version: VERSION, ..order_source(c, fingerprint) };
        let saved = dir.map(|d| key_profile::cache_file(d, fingerprint));
        let known = saved.as_ref().and_then(|p| key_profile::load(p, &source, c));
        Ok(known.map_or(Profiling::Measure(source, saved), Profiling::There))
    }

    /// The built-in text will be read.
    pub fn measures(&self) -> bool {
        matches!(self, Profiling::Measure(..))
    }

    /// The profile in the decoder's key order. A decoder that measures has
    /// [`order_limits`](super::calibrate::order_limits). What cannot be saved is noted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn finish(
        self,
        decoder: &mut Decoder,
        tokenizer: &Tokenizer,
        kv_dtype: DType,
        notes: &mut Vec<String>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Option<KeyProfile>, EngineError> {
        let profile = match self {
            Profiling::None => return Ok(None),
            Profiling::There(profile) => profile,
            Profiling::Measure(source, saved) => {
                let profile = measured(decoder, tokenizer, kv_dtype, &source, progress)?;
                if let Some(path) = &saved
                    && let Err(e) = key_profile::save(&profile, path, &source)
                {
                    let path = path.display();
                    notes.push(format!("the key profile could not be saved to {path}: {e}"));
                }
                profile
            }
        };
        let wide = decoder.config().kv_dim();
        Ok(Some(key_profile::in_order(&profile, decoder.key_order(), wide)))
    }
}

/// Sums over the tokens read, of one KV head.
#[derive(Clone)]
struct Sums {
    /// `sum |q_i k_i|` over tokens and query heads.
    products: Vec<f64>,
    keys: Vec<f64>,
    /// `sum k_i k_j`, row by row.
    squares: Vec<f64>,
}

impl Sums {
    fn new(d: usize) -> Self {
        Sums { products: vec![0.0; d], keys: vec![0.0; d], squares: vec![0.0; d * d] }
    }

    /// One token: its key, and the queries of the group.
    fn add(&mut self, k: &[f32], queries: &[f32]) {
        let d = k.len();
        for q in queries.chunks_exact(d) {
            for ((sum, q), k) in self.products.iter_mut().zip(q).zip(k) {
                *sum += f64::from((q * k).abs());
            }
        }
        for (i, a) in k.iter().enumerate() {
            self.keys[i] += f64::from(*a);
            let row = &mut self.squares[i * d..][..d];
            row.iter_mut().zip(k).for_each(|(sum, b)| *sum += f64::from(*a) * f64::from(*b));
        }
    }

    /// Mean products, and the principal components of the keys.
    fn measured(self, tokens: usize) -> (Vec<f32>, Vec<f32>) {
        let (n, d) = (tokens.max(1) as f64, self.keys.len());
        let mean: Vec<f64> = self.keys.iter().map(|x| x / n).collect();
        let covariance: Vec<f64> =
            (0..d * d).map(|i| self.squares[i] / n - mean[i / d] * mean[i % d]).collect();
        let importance = self.products.iter().map(|x| (x / n) as f32).collect();
        (importance, components(covariance, d))
    }
}

/// Reads the built-in text with a decoder of [`order_limits`](super::calibrate::order_limits) in any key order; the
/// profile is in the checkpoint's.
fn measured(
    decoder: &mut Decoder,
    tokenizer: &Tokenizer,
    kv_dtype: DType,
    source: &OrderSource,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<KeyProfile, EngineError> {
    let c = decoder.config().clone();
    let (d, hkv, group) = (c.head_dim, c.n_kv_heads, c.n_heads / c.n_kv_heads);
    let mut sums = vec![Sums::new(d); c.n_layers * hkv];
    let mut tokens = 0;
    let mut observe = |view: &LayerView<'_>| {
        if view.stage != Stage::Projected {
            return Ok(());
        }
        let (q, k) = (view.heads_f32(&view.q)?, view.heads_f32(&view.k)?);
        tokens += if view.layer == 0 { view.rows } else { 0 };
        let layer = &mut sums[view.layer * hkv..][..hkv];
        layer.par_iter_mut().enumerate().for_each(|(h, sums)| {
            for row in 0..view.rows {
                let kv = row * hkv + h;
                sums.add(&k[kv * d..][..d], &q[kv * group * d..][..group * d]);
            }
        });
        Ok(())
    };
    read_text(decoder, tokenizer, kv_dtype, source, Some(&mut observe), progress)?;
    let heads: Vec<_> = sums.into_par_iter().map(|s| s.measured(tokens)).collect();
    let (importance, basis): (Vec<_>, Vec<_>) = heads.into_iter().unzip();
    Ok(KeyProfile {
        kv_heads: hkv,
        head_dim: d,
        importance: importance.concat(),
        basis: basis.concat(),
    })
}

/// Eigenvectors of a symmetric matrix of `d` rows, one a row, by falling eigenvalue (Jacobi's rotations, all pairs in
/// turn). Of each vector the entry of largest magnitude is positive, so that the result does not depend on chance.
fn components(mut a: Vec<f64>, d: usize) -> Vec<f32> {
    let mut v: Vec<f64> = (0..d * d).map(|i| f64::from(u8::from(i / d == i % d))).collect();
    let whole: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..SWEEPS {
        let off: f64 = (0..d * d).filter(|i| i / d != i % d).map(|i| a[i] * a[i]).sum();
        if off <= 1e-24 * whole {
            break;
        }
        for p in 0..d {
            for q in p + 1..d {
                rotate(&mut a, &mut v, d, p, q);
            }
        }
    }
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&i, &j| a[j * d + j].total_cmp(&a[i * d + i]).then(i.cmp(&j)));
    let vector = |&i: &usize| {
        let row = &v[i * d..][..d];
        let largest = row.iter().fold(0.0f64, |m, x| if x.abs() > m.abs() { *x } else { m });
        row.iter().map(move |x| (x * largest.signum()) as f32).collect::<Vec<f32>>()
    };
    order.iter().flat_map(vector).collect()
}

/// Makes `a[p, q]` zero; the rows of `v` turn alike.
fn rotate(a: &mut [f64], v: &mut [f64], d: usize, p: usize, q: usize) {
    let apq = a[p * d + q];
    if apq == 0.0 {
        return;
    }
    let theta = (a[q * d + q] - a[p * d + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let t = if theta == 0.0 { 1.0 } else { t };
    let c = 1.0 / (t * t + 1.0).sqrt();
    let s = t * c;
    for i in 0..d {
        let (x, y) = (a[i * d + p], a[i * d + q]);
        (a[i * d + p], a[i * d + q]) = (c * x - s * y, s * x + c * y);
    }
    for m in [a, v] {
        for i in 0..d {
            let (x, y) = (m[p * d + i], m[q * d + i]);
            (m[p * d + i], m[q * d + i]) = (c * x - s * y, s * x + c * y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    /// Keys of two directions of unlike variance, off the axes, around a mean that is no direction.
    #[test]
    fn components_are_the_directions_of_largest_variance() {
        let (d, tokens) = (6, 4000);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut sums = Sums::new(d);
        let directions = [[0.6, 0.8, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, -0.8, 0.6]];
        for _ in 0..tokens {
            let mut one = || rng.random_range(-1.0f32..1.0);
            let (x, y) = (3.0 * one(), one());
            let key: Vec<f32> = (0..d)
                .map(|i| 5.0 + x * directions[0][i] + y * directions[1][i] + 0.01 * one())
                .collect();
            sums.add(&key, &[1.0, 0.0, 0.0, 0.0, 0.0, -2.0]);
        }
        let (importance, basis) = sums.measured(tokens);
        assert!((importance[0] - 5.0).abs() < 0.2 && (importance[5] - 10.0).abs() < 0.2);
        assert_eq!(importance[1], 0.0);
        for (got, want) in basis.chunks_exact(d).zip(directions) {
            let cos: f32 = got.iter().zip(want).map(|(a, b)| a * b).sum();
            assert!(cos.abs() > 0.999, "{got:?} instead of {want:?}");
        }
        for (i, a) in basis.chunks_exact(d).enumerate() {
            for (j, b) in basis.chunks_exact(d).enumerate() {
                let dot: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                let want = if i == j { 1.0 } else { 0.0 };
                assert!((dot - want).abs() < 1e-5, "directions {i} and {j}: {dot}");
            }
        }
    }
}
