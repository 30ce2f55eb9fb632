//! Guarded device memory, poisoned inputs, and the comparison of what an op wrote with the reference.

use super::tolerance::{self, Class};
use longsight::backend::reference::{Cell, Output, decode, encode};
use longsight::backend::{ALIGN, Backend, BackendError, DType, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Why a case did not pass.
#[derive(Debug)]
pub enum Failure {
    /// The backend says that it has no kernel for this.
    Unsupported(String),
    Failed(String),
}

impl From<BackendError> for Failure {
    fn from(e: BackendError) -> Self {
        match e {
            BackendError::Unsupported { .. } => Failure::Unsupported(e.to_string()),
            _ => Failure::Failed(e.to_string()),
        }
    }
}

pub type Outcome<T = ()> = Result<T, Failure>;

pub fn fail<T>(reason: impl Into<String>) -> Outcome<T> {
    Err(Failure::Failed(reason.into()))
}

/// Error of one compared tensor.
#[derive(Clone, Debug)]
pub struct Measured {
    pub tensor: String,
    pub nmse: f64,
    pub tolerance: f64,
}

/// One device buffer and the bytes it is known to hold.
struct Whole {
    tensor: Tensor,
    image: Vec<u8>,
}

/// A backend under test with the buffers of one case.
pub struct Rig {
    pub dev: Arc<dyn Backend>,
    rng: ChaCha8Rng,
    wholes: Vec<Whole>,
    pub measured: Vec<Measured>,
}

/// Fills guards, padding and outputs: NaN in the float types, far out of range as an index.
fn poison(dtype: DType) -> &'static [u8] {
    match dtype {
        DType::F32 => &[0xA5, 0xA5, 0xC5, 0x7F],
        DType::F16 => &[0xA5, 0x7E],
        DType::BF16 => &[0xE5, 0x7F],
        DType::I8 => &[0xA5],
        DType::U32 => &[0xA5; 4],
    }
}

impl Rig {
    /// `name` seeds the inputs: a case has the same ones on every backend.
    pub fn new(dev: Arc<dyn Backend>, name: &str) -> Rig {
        // FNV-1a.
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Rig { dev, rng, wholes: Vec::new(), measured: Vec::new() }
    }

    /// Standard normal values times `scale` (Box and Muller).
    pub fn normal(&mut self, n: usize, scale: f64) -> Vec<f64> {
        let mut one = || {
            let (u, v): (f64, f64) = (self.rng.random(), self.rng.random());
            (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos() * scale
        };
        (0..n).map(|_| one()).collect()
    }

    /// A whole number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.rng.random_range(0..n)
    }

    /// `0..n` in random order.
    pub fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        (1..n).rev().for_each(|i| all.swap(i, self.rng.random_range(0..=i)));
        all
    }

    /// A tensor of `bytes` at a non-zero offset of a larger buffer, poison on both sides.
    fn place(&mut self, dtype: DType, bytes: &[u8]) -> Outcome<Tensor> {
        let size = dtype.bytes();
        let before = ALIGN / size * (1 + self.wholes.len() % 3);
        let (len, after) = (bytes.len() / size, ALIGN / size);
        let mut image = poison(dtype).repeat(before + len + after);
        image[before * size..][..bytes.len()].copy_from_slice(bytes);
        let tensor = self.dev.alloc(dtype, before + len + after, "conformance")?;
        self.dev.upload(&tensor, &image)?;
        let view = tensor.slice(before, len);
        self.wholes.push(Whole { tensor, image });
        Ok(view)
    }

    pub fn input(&mut self, dtype: DType, values: &[f64]) -> Outcome<Tensor> {
        self.place(dtype, &encode(dtype, values))
    }

    pub fn words(&mut self, values: &[u32]) -> Outcome<Tensor> {
        self.place(DType::U32, bytemuck::cast_slice(values))
    }

    pub fn zeros(&mut self, dtype: DType, len: usize) -> Outcome<Tensor> {
        self.place(dtype, &vec![0; len * dtype.bytes()])
    }

    /// A tensor filled with the sentinel.
    pub fn output(&mut self, dtype: DType, len: usize) -> Outcome<Tensor> {
        self.place(dtype, &poison(dtype).repeat(len))
    }

    /// Overwrites a tensor from the host.
    pub fn write(&mut self, t: &Tensor, values: &[f64]) -> Outcome {
        let bytes = encode(t.dtype(), values);
        self.dev.upload(t, &bytes)?;
        let whole = self.home(t);
        self.wholes[whole].image[t.byte_offset()..][..bytes.len()].copy_from_slice(&bytes);
        Ok(())
    }

    fn home(&self, t: &Tensor) -> usize {
        self.wholes.iter().position(|w| w.tensor.same_buffer(t)).expect("a tensor of this rig")
    }

    fn snapshot(&self) -> Outcome<Vec<Vec<u8>>> {
        let read = |w: &Whole| {
            let mut bytes = vec![0; w.image.len()];
            self.dev.download(&w.tensor, &mut bytes)?;
            Ok(bytes)
        };
        self.wholes.iter().map(read).collect()
    }

    /// Runs `run` twice on the same memory. Both runs must leave the same bits, every element of `outs` must be as
    /// the reference says, and nothing else in any buffer may have changed. `act` is the activation dtype.
    pub fn check(
        &mut self,
        act: DType,
        outs: &[Output<'_>],
        run: &dyn Fn(&dyn Backend) -> longsight::backend::Result<()>,
    ) -> Outcome {
        let dev = self.dev.clone();
        run(&*dev)?;
        dev.sync()?;
        let after = self.snapshot()?;
        for (whole, after) in self.wholes.iter().zip(&after) {
            if whole.image != *after {
                dev.upload(&whole.tensor, &whole.image)?;
            }
        }
        run(&*dev)?;
        let again = self.snapshot()?;
        let op = outs.first().map_or("op", |o| o.op);
        if after != again {
            return fail(format!("{op}: two runs on the same inputs differ"));
        }
        self.untouched(op, outs, &after)?;
        for (whole, after) in self.wholes.iter_mut().zip(after) {
            whole.image = after;
        }
        self.expect(act, outs)
    }

    /// Everything that `outs` does not name as written holds what it held before.
    fn untouched(&self, op: &str, outs: &[Output<'_>], after: &[Vec<u8>]) -> Outcome {
        let mut allowed: Vec<Vec<u8>> = self.wholes.iter().map(|w| w.image.clone()).collect();
        for o in outs {
            let (home, size) = (self.home(o.tensor), o.tensor.dtype().bytes());
            let written = o.cells.iter().enumerate().filter(|(_, c)| **c != Cell::Keep);
            for (at, _) in written {
                let bytes = o.tensor.byte_offset() + at * size..;
                allowed[home][bytes.clone()][..size].copy_from_slice(&after[home][bytes][..size]);
            }
        }
        for (i, (allowed, after)) in allowed.iter().zip(after).enumerate() {
            let Some(byte) = allowed.iter().zip(after).position(|(a, b)| a != b) else { continue };
            let size = self.wholes[i].tensor.dtype().bytes();
            let near = outs.iter().find(|o| self.home(o.tensor) == i);
            let what = match near {
                Some(o) => format!(
                    "buffer of {}: element {} of a tensor of {}",
                    o.name,
                    (byte / size) as i64 - o.tensor.offset() as i64,
                    o.tensor.len()
                ),
                None => format!("an input buffer ({})", self.wholes[i].tensor.dtype()),
            };
            return fail(format!("{op}: wrote what it must leave alone: {what}"));
        }
        Ok(())
    }

    /// The tensors hold what `outs` says.
    pub fn expect(&mut self, act: DType, outs: &[Output<'_>]) -> Outcome {
        for o in outs {
            let t = o.tensor;
            let image = &self.wholes[self.home(t)].image[t.byte_offset()..][..t.bytes()];
            let class =
                if o.exact { Class::Exact } else { tolerance::class(o.op, o.name, t.dtype(), act) };
            let m = compare(o, &decode(t.dtype(), image), class)?;
            self.measured.push(m);
        }
        Ok(())
    }

    /// `call` must answer `BadArgument` and touch nothing.
    pub fn refuses(&self, what: &str, call: longsight::backend::Result<()>) -> Outcome {
        match call {
            Err(BackendError::BadArgument { .. }) => {}
            Err(e) => return fail(format!("{what}: expected BadArgument, got: {e}")),
            Ok(()) => return fail(format!("{what}: accepted")),
        }
        self.dev.sync()?;
        let same = self.snapshot()?.iter().zip(&self.wholes).all(|(now, w)| *now == w.image);
        if same { Ok(()) } else { fail(format!("{what}: refused, but memory changed")) }
    }
}

fn compare(o: &Output<'_>, got: &[f64], class: Class) -> Outcome<Measured> {
    let (op, name, dtype) = (o.op, o.name, o.tensor.dtype());
    let at = |i: usize, want: &str| {
        let x = got[i];
        fail(format!("{op}.{name}: element {i} of {} is {x}, expected {want}", got.len()))
    };
    let (mut error, mut power, mut count) = (0.0, 0.0, 0);
    for (i, (cell, x)) in o.cells.iter().zip(got).enumerate() {
        match *cell {
            Cell::Keep | Cell::Any => {}
            Cell::Near(v, far) if (x - v).abs() <= far => {}
            Cell::Near(v, far) => return at(i, &format!("{v} +- {far}")),
            Cell::Is(v) if class == Class::Exact => {
                let rounded = decode(dtype, &encode(dtype, &[v]))[0];
                if *x != rounded && !(x.is_nan() && rounded.is_nan()) {
                    return at(i, &format!("exactly {rounded}"));
                }
            }
            Cell::Is(v) if !v.is_finite() || !x.is_finite() => {
                if *x != v {
                    return at(i, &v.to_string());
                }
            }
            Cell::Is(v) => {
                error += (x - v) * (x - v);
                power += v * v;
                count += 1;
            }
        }
    }
    let tolerance = class.nmse();
    let nmse = if error == 0.0 { 0.0 } else { error / power };
    let tensor = format!("{op}.{name}");
    if nmse > tolerance {
        return fail(format!(
            "{tensor}: NMSE {nmse:.3e} over {count} elements, allowed {tolerance:.0e}"
        ));
    }
    // One wrong element of many hides in a sum: no element may be off by more than a few dozen times the
    // permitted error of a typical element.
    let rms = (power / f64::from(count.max(1))).sqrt();
    for (i, (cell, x)) in o.cells.iter().zip(got).enumerate() {
        if let Cell::Is(v) = *cell
            && class != Class::Exact
            && v.is_finite()
            && (x - v).abs() > 32.0 * tolerance.sqrt() * rms.max(v.abs())
        {
            return at(i, &format!("{v} (rms of the tensor {rms:.3e})"));
        }
    }
    Ok(Measured { tensor, nmse, tolerance })
}
