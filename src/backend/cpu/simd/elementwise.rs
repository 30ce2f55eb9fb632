//! Elementwise kernels and reductions of one slice, generic over the vector type.
//!
//! SAFETY of every kernel: the CPU has the instructions of `V`. Slice lengths are checked first; loads and stores
//! stay inside the slices or inside a buffer of the widest vector.

use super::exp::exp;
use super::vector::{Lane, Vector};

/// Lanes of the widest vector: room for a copied tail.
const MAX_LANES: usize = 16;

/// The vector at `x[i..]`, padded with `pad` behind the end.
#[inline(always)]
unsafe fn get<V: Vector>(x: &[f32], i: usize, pad: f32) -> V {
    let rest = &x[i..];
    // SAFETY: a whole vector comes from the slice, a part of one through a buffer.
    unsafe {
        if rest.len() >= V::LANES {
            return V::load(rest.as_ptr());
        }
        let mut all = [pad; MAX_LANES];
        all[..rest.len()].copy_from_slice(rest);
        V::load(all.as_ptr())
    }
}

/// Stores the lanes of `v` at `to[i..]`, as many as there are elements.
#[inline(always)]
unsafe fn put<V: Vector>(v: V, to: &mut [f32], i: usize) {
    let rest = &mut to[i..];
    // SAFETY: as in `get`.
    unsafe {
        if rest.len() >= V::LANES {
            return v.store(rest.as_mut_ptr());
        }
        let mut all = [0.0; MAX_LANES];
        v.store(all.as_mut_ptr());
        rest.copy_from_slice(&all[..rest.len()]);
    }
}

/// `sum f(x)` over the vectors of `x` with four partial sums; the tail is padded with `pad`. A macro, because a
/// closure is compiled without the vector features and would pass registers through memory.
macro_rules! reduce {
    ($V:ty, $x:expr, $pad:expr, |$v:ident, $a:ident| $f:expr) => {{
        let x: &[f32] = $x;
        let mut acc = [<$V>::splat(0.0); 4];
        let mut i = 0;
        while i + 4 * <$V>::LANES <= x.len() {
            for c in 0..4 {
                let ($v, $a) = (<$V>::load(x.as_ptr().add(i + c * <$V>::LANES)), acc[c]);
                acc[c] = $f;
            }
            i += 4 * <$V>::LANES;
        }
        while i < x.len() {
            let ($v, $a) = (get::<$V>(x, i, $pad), acc[0]);
            acc[0] = $f;
            i += <$V>::LANES;
        }
        acc[0].add(acc[1]).add(acc[2].add(acc[3])).sum()
    }};
}

#[inline(always)]
pub(super) unsafe fn widen<V: Vector, T: Lane>(src: &[T], dst: &mut [f32]) {
    assert!(src.len() == dst.len());
    let whole = src.len() / V::LANES * V::LANES;
    for i in (0..whole).step_by(V::LANES) {
        // SAFETY: `i + LANES <= len` of both.
        unsafe { T::load::<V>(src.as_ptr().add(i)).store(dst.as_mut_ptr().add(i)) };
    }
    for (d, s) in dst[whole..].iter_mut().zip(&src[whole..]) {
        *d = s.widen();
    }
}

#[inline(always)]
pub(super) unsafe fn exp_sub<V: Vector>(x: &mut [f32], m: f32) -> f32 {
    // SAFETY: see the head of this file.
    unsafe {
        let m = V::splat(m);
        let mut sum = V::splat(0.0);
        for i in (0..x.len()).step_by(V::LANES) {
            // Padding lanes: exp(-infinity) adds 0.
            let e = exp(get::<V>(x, i, f32::NEG_INFINITY).sub(m));
            sum = sum.add(e);
            put(e, x, i);
        }
        sum.sum()
    }
}

#[inline(always)]
pub(super) unsafe fn sum_exp<V: Vector>(x: &[f32], m: f32) -> f32 {
    // SAFETY: see the head of this file.
    unsafe {
        let m = V::splat(m);
        reduce!(V, x, f32::NEG_INFINITY, |v, a| a.add(exp(v.sub(m))))
    }
}

#[inline(always)]
pub(super) unsafe fn largest<V: Vector>(x: &[f32]) -> f32 {
    // SAFETY: see the head of this file.
    unsafe {
        let mut best = V::splat(f32::NEG_INFINITY);
        for i in (0..x.len()).step_by(V::LANES) {
            best = get::<V>(x, i, f32::NEG_INFINITY).max(best);
        }
        best.largest()
    }
}

#[inline(always)]
pub(super) unsafe fn scale<V: Vector>(x: &mut [f32], a: f32) {
    // SAFETY: see the head of this file.
    unsafe {
        let a = V::splat(a);
        for i in (0..x.len()).step_by(V::LANES) {
            let v = get::<V>(x, i, 0.0).mul(a);
            put(v, x, i);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn sum<V: Vector>(x: &[f32]) -> f32 {
    // SAFETY: see the head of this file.
    unsafe { reduce!(V, x, 0.0, |v, a| a.add(v)) }
}

#[inline(always)]
pub(super) unsafe fn sum_squares<V: Vector>(x: &[f32]) -> f32 {
    // SAFETY: see the head of this file.
    unsafe { reduce!(V, x, 0.0, |v, a| v.fma(v, a)) }
}

#[inline(always)]
pub(super) unsafe fn scale_by<V: Vector>(x: &[f32], a: f32, w: &[f32], out: &mut [f32]) {
    assert!(x.len() == w.len() && x.len() == out.len());
    // SAFETY: see the head of this file.
    unsafe {
        let a = V::splat(a);
        for i in (0..x.len()).step_by(V::LANES) {
            let v = get::<V>(x, i, 0.0).mul(a).mul(get(w, i, 0.0));
            put(v, out, i);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn swiglu<V: Vector>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    // SAFETY: see the head of this file.
    unsafe {
        let one = V::splat(1.0);
        for i in (0..gate.len()).step_by(V::LANES) {
            let z = get::<V>(gate, i, 0.0);
            let silu = z.div(one.add(exp(V::splat(0.0).sub(z))));
            put(silu.mul(get(up, i, 0.0)), out, i);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn max_sub<V: Vector>(x: &[f32], a: f32, out: &mut [f32]) {
    assert!(x.len() == out.len());
    let lowest = f32::NEG_INFINITY;
    // SAFETY: see the head of this file.
    unsafe {
        let a = V::splat(a);
        for i in (0..x.len()).step_by(V::LANES) {
            // -infinity less -infinity is NaN, and `max` takes its second operand then.
            let v = get::<V>(x, i, lowest).sub(a).max(get(out, i, lowest));
            put(v, out, i);
        }
    }
}

// The two kernels below are plain loops: compiled with the vector features they become vector code.

#[inline(always)]
pub(super) unsafe fn images<V: Vector>(scores: &[f32], out: &mut [u32]) -> u32 {
    assert!(scores.len() == out.len());
    let mut largest = 0;
    for (out, &score) in out.iter_mut().zip(scores) {
        // Adding +0 turns -0 into +0.
        let bits = (score + 0.0).to_bits();
        // All bits of a negative number, the sign of another.
        let flipped = bits ^ (((bits as i32) >> 31) as u32 | 1 << 31);
        // False for NaN and -infinity.
        *out = if score > f32::NEG_INFINITY { flipped } else { 0 };
        largest = largest.max(*out);
    }
    largest
}

#[inline(always)]
pub(super) unsafe fn count_from<V: Vector>(images: &[u32], least: u32) -> usize {
    // Narrow sums for wide vectors; a block is far from their end.
    let block = |b: &[u32]| b.iter().fold(0u32, |n, &i| n.wrapping_add(u32::from(i >= least)));
    images.chunks(1 << 16).map(|b| block(b) as usize).sum()
}
