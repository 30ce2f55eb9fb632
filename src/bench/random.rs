//! Random inputs: one block of values on the host, uploaded again and again from random starts.

use crate::backend::reference::encode;
use crate::backend::{Backend, DType, Result, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Values of the block.
const BLOCK: usize = 1 << 21;
/// Most values of one upload.
const PIECE: usize = 1 << 20;
/// Uploads between two waits for the device.
const SYNC_EVERY: usize = 32;

/// What values look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Values {
    /// Standard normal; int8 values are scaled to use their range.
    Normal,
    /// Small and positive, as int8 scales are.
    Scale,
}

/// A seeded source.
pub(super) struct Random {
    rng: ChaCha8Rng,
    normal: Vec<f64>,
    encoded: Vec<((DType, Values), Vec<u8>)>,
}

impl Random {
    /// The same seed gives the same inputs.
    pub fn new(seed: u64) -> Random {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Box and Muller.
        let mut one = || {
            let (u, v): (f64, f64) = (rng.random(), rng.random());
            (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        };
        let normal = (0..BLOCK).map(|_| one()).collect();
        Random { rng, normal, encoded: Vec::new() }
    }

    /// Fills a tensor in pieces of a few megabytes, so that the host never holds a copy of it.
    pub fn fill(&mut self, b: &dyn Backend, t: &Tensor, values: Values) -> Result<()> {
        let key = (t.dtype(), values);
        let at = match self.encoded.iter().position(|(k, _)| *k == key) {
            Some(at) => at,
            None => {
                let value = |v: &f64| match (t.dtype(), values) {
                    (DType::I8, _) => (v * 40.0).clamp(-127.0, 127.0),
                    (_, Values::Normal) => *v,
                    (_, Values::Scale) => v.abs() * 0.02 + 1e-3,
                };
                let all: Vec<f64> = self.normal.iter().map(value).collect();
                self.encoded.push((key, encode(t.dtype(), &all)));
                self.encoded.len() - 1
            }
        };
        let (block, size) = (&self.encoded[at].1, t.dtype().bytes());
        for (i, start) in (0..t.len()).step_by(PIECE).enumerate() {
            let n = PIECE.min(t.len() - start);
            let from = self.rng.random_range(0..=BLOCK - n) * size;
            b.upload(&t.slice(start, n), &block[from..from + n * size])?;
            // Devices may stage uploads in host memory until they wait.
            if i % SYNC_EVERY == SYNC_EVERY - 1 {
                b.sync()?;
            }
        }
        Ok(())
    }

    /// A new tensor of random values.
    pub fn tensor(
        &mut self,
        b: &dyn Backend,
        dtype: DType,
        len: usize,
        what: &str,
        values: Values,
    ) -> Result<Tensor> {
        let t = b.alloc(dtype, len, what)?;
        self.fill(b, &t, values)?;
        Ok(t)
    }

    /// `n` standard normal values.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        let from = self.rng.random_range(0..BLOCK);
        (0..n).map(|i| self.normal[(from + i) % BLOCK] as f32).collect()
    }

    /// `0..n` in random order.
    pub fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        (1..n).rev().for_each(|i| all.swap(i, self.rng.random_range(0..=i)));
        all
    }
}
