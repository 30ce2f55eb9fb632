//! exp on a vector, relative error at most 2e-7 wherever the result is a normal number.
//!
//! `x = n ln 2 + r` with integer `n` and `|r| <= ln 2 / 2` (`ln 2` in two parts, so that `r` is exact to
//! rounding), `exp(x) = 2^n exp(r)`, and `exp(r)` by its Taylor polynomial of degree 7
//! (the next term is below 6e-9 relative).

use super::vector::Vector;

/// Upper part of ln 2: nine bits, so that its product with `n` is exact.
const LN2_HIGH: f32 = 0.693_359_4;
/// ln 2 - `LN2_HIGH`.
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Below it exp is 0 in f32, above the second it is infinite.
const LOWEST: f32 = -110.0;
const HIGHEST: f32 = 100.0;

/// `exp(x)` in every lane: 0 for very small values and -infinity, infinity for large ones, NaN for NaN.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        // The clamped value comes second: a NaN stays one.
        let x = V::splat(HIGHEST).min(V::splat(LOWEST).max(x));
        let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
        let r = n.fma(V::splat(-LN2_HIGH), x);
        let r = n.fma(V::splat(-LN2_LOW), r);
        let mut p = V::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p.fma(r, V::splat(c));
        }
        p.scale2(n)
    }
}
