//! A random profile of queries and keys.

use longsight::select::KeyProfile;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random importance and random orthonormal directions.
pub fn random(layers: usize, kv_heads: usize, head_dim: usize) -> KeyProfile {
    let mut rng = ChaCha8Rng::seed_from_u64(77);
    let heads = layers * kv_heads;
    let mut numbers =
        |n: usize, low: f32| -> Vec<f32> { (0..n).map(|_| rng.random_range(low..1.0)).collect() };
    let importance = numbers(heads * head_dim, 0.0);
    let mut basis = Vec::new();
    for _ in 0..heads {
        // Gram and Schmidt.
        let mut rows: Vec<Vec<f64>> = Vec::new();
        for _ in 0..head_dim {
            let mut row: Vec<f64> = numbers(head_dim, -1.0).into_iter().map(f64::from).collect();
            for _ in 0..2 {
                for other in &rows {
                    let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                    row.iter_mut().zip(other).for_each(|(x, o)| *x -= dot * o);
                }
            }
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            rows.push(row.iter().map(|x| x / norm).collect());
        }
        basis.extend(rows.concat().iter().map(|x| *x as f32));
    }
    KeyProfile { kv_heads, head_dim, importance, basis }
}
