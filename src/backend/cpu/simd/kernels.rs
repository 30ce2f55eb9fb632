//! Dot products and weighted sums, generic over the vector type.
//!
//! Loops over registers are written out (no closures): a closure is compiled without the vector features and
//! would pass registers through memory.
//!
//! SAFETY of every kernel: the CPU has the instructions of `V`. Each checks its slice lengths first; all
//! pointers below stay inside the slices by those checks.

#![allow(clippy::needless_range_loop)] // one index runs over several arrays of registers

use super::vector::{Lane, Vector};

/// Most query heads whose sums are kept in registers at once.
const HEADS: usize = 4;

/// `sum_i x[h * xs + i] * w[g * ws + i]` for `G` rows of `w` and `H` rows of `x`, every element loaded once. With
/// `AHEAD`, what lies `ahead` elements behind those of `w` is asked for.
#[inline(always)]
unsafe fn dots<V: Vector, T: Lane, const G: usize, const H: usize, const AHEAD: bool>(
    x: *const f32,
    xs: usize,
    w: [*const T; G],
    n: usize,
    ahead: usize,
) -> [[f32; H]; G] {
    // SAFETY: the caller's rows hold `n` elements.
    unsafe {
        let zero = [V::splat(0.0); H];
        let mut acc = [zero; G];
        let mut i = 0;
        while i + V::LANES <= n {
            let mut xv = zero;
            for h in 0..H {
                xv[h] = V::load(x.add(h * xs + i));
            }
            for g in 0..G {
                if AHEAD {
                    V::prefetch(w[g].wrapping_add(i + ahead));
                }
                let wv = T::load::<V>(w[g].add(i));
                for h in 0..H {
                    acc[g][h] = wv.fma(xv[h], acc[g][h]);
                }
            }
            i += V::LANES;
        }
        if i + 8 <= n {
            for g in 0..G {
                let wv = T::load8::<V>(w[g].add(i));
                for h in 0..H {
                    acc[g][h] = wv.fma(V::load8(x.add(h * xs + i)), acc[g][h]);
                }
            }
            i += 8;
        }
        let mut out = [[0.0; H]; G];
        for g in 0..G {
            for h in 0..H {
                out[g][h] = acc[g][h].sum();
            }
        }
        while i < n {
            for g in 0..G {
                for h in 0..H {
                    out[g][h] += (*w[g].add(i)).widen() * *x.add(h * xs + i);
                }
            }
            i += 1;
        }
        out
    }
}

/// How far ahead of row `o` of `w` lies what is wanted after these `rows` rows: the same place of the next ones, if
/// there are any. Rows of a few hundred numbers in 16 bits end before the CPU has seen where their streams go; asked
/// for in time they arrive as fast as memory can be read at all.
fn next_rows<T>(w: &[T], n: usize, o: usize, rows: usize) -> usize {
    if (o + 2 * rows) * n <= w.len() { rows * n } else { 0 }
}

#[inline(always)]
pub(super) unsafe fn gemv<V: Vector, T: Lane>(x: &[f32], w: &[T], y: &mut [f32]) {
    let n = x.len();
    assert!(w.len() >= n * y.len());
    // SAFETY: row `o` of `w` starts at `o * n` and ends inside it.
    unsafe {
        let mut o = 0;
        while o + 4 <= y.len() {
            let ahead = next_rows(w, n, o, 4);
            let w = w.as_ptr().add(o * n);
            let rows = [w, w.add(n), w.add(2 * n), w.add(3 * n)];
            let sums = dots::<V, T, 4, 1, true>(x.as_ptr(), 0, rows, n, ahead);
            for g in 0..4 {
                y[o + g] = sums[g][0];
            }
            o += 4;
        }
        while o < y.len() {
            y[o] = dots::<V, T, 1, 1, false>(x.as_ptr(), 0, [w.as_ptr().add(o * n)], n, 0)[0][0];
            o += 1;
        }
    }
}

#[inline(always)]
pub(super) unsafe fn gemv_rows<V: Vector, T: Lane>(
    x: &[f32],
    rows: usize,
    n: usize,
    w: &[T],
    y: &mut [f32],
) {
    assert!((1..=8).contains(&rows) && x.len() >= rows * n);
    let outputs = y.len() / rows;
    assert!(w.len() >= outputs * n);
    // SAFETY: rows of `x` and `w` are inside, checked above.
    unsafe {
        macro_rules! with_rows {
            ($R:literal) => {{
                let mut o = 0;
                while o + 2 <= outputs {
                    let pair = [w.as_ptr().add(o * n), w.as_ptr().add((o + 1) * n)];
                    let ahead = next_rows(w, n, o, 2);
                    let sums = dots::<V, T, 2, $R, true>(x.as_ptr(), n, pair, n, ahead);
                    y[o * $R..(o + 1) * $R].copy_from_slice(&sums[0]);
                    y[(o + 1) * $R..(o + 2) * $R].copy_from_slice(&sums[1]);
                    o += 2;
                }
                if o < outputs {
                    let row = [w.as_ptr().add(o * n)];
                    let sums = dots::<V, T, 1, $R, false>(x.as_ptr(), n, row, n, 0);
                    y[o * $R..(o + 1) * $R].copy_from_slice(&sums[0]);
                }
            }};
        }
        match rows {
            1 => with_rows!(1),
            2 => with_rows!(2),
            3 => with_rows!(3),
            4 => with_rows!(4),
            5 => with_rows!(5),
            6 => with_rows!(6),
            7 => with_rows!(7),
            _ => with_rows!(8),
        }
    }
}

/// Runs `$body` with `$G` bound to the size of each block of up to `HEADS` heads and `$h` to its first head.
macro_rules! head_blocks {
    ($heads:expr, $h:ident, $G:ident => $body:expr) => {
        let mut $h = 0;
        while $h < $heads {
            let block = ($heads - $h).min(HEADS);
            match block {
                4 => {
                    const $G: usize = 4;
                    $body
                }
                3 => {
                    const $G: usize = 3;
                    $body
                }
                2 => {
                    const $G: usize = 2;
                    $body
                }
                _ => {
                    const $G: usize = 1;
                    $body
                }
            }
            $h += block;
        }
    };
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn dot_rows<V: Vector, T: Lane>(
    q: &[f32],
    q_stride: usize,
    heads: usize,
    n: usize,
    base: &[T],
    offsets: &[usize],
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
) {
    if heads == 0 || offsets.is_empty() {
        return;
    }
    assert!((heads - 1) * q_stride + n <= q.len());
    assert!((heads - 1) * out_stride + offsets.len() <= out.len());
    head_blocks!(heads, h, G => {
        for (j, &at) in offsets.iter().enumerate() {
            let row = &base[at..at + n];
            // SAFETY: the row is a slice of `n`, the query rows are inside `q` by the check above.
            let sums = unsafe {
                dots::<V, T, 1, G, false>(q.as_ptr().add(h * q_stride), q_stride, [row.as_ptr()], n, 0)
            };
            for g in 0..G {
                let o = &mut out[(h + g) * out_stride + j];
                *o = if accumulate { *o + sums[0][g] } else { sums[0][g] };
            }
        }
    });
}

#[inline(always)]
pub(super) unsafe fn axpy_rows<V: Vector, T: Lane>(
    p: &[f32],
    p_stride: usize,
    heads: usize,
    n: usize,
    base: &[T],
    offsets: &[usize],
    acc: &mut [f32],
) {
    if heads == 0 || offsets.is_empty() {
        return;
    }
    assert!((heads - 1) * p_stride + offsets.len() <= p.len() && heads * n <= acc.len());
    assert!(offsets.iter().all(|&at| at <= base.len() && n <= base.len() - at));
    head_blocks!(heads, h, G => {
        // SAFETY: weights, rows and sums are inside their slices by the checks above.
        unsafe {
            let weights = p.as_ptr().add(h * p_stride);
            let sums = acc.as_mut_ptr().add(h * n);
            let mut i = 0;
            while i + 4 * V::LANES <= n {
                columns::<V, T, G, 4>(weights, p_stride, base, offsets, sums, n, i);
                i += 4 * V::LANES;
            }
            while i + V::LANES <= n {
                columns::<V, T, G, 1>(weights, p_stride, base, offsets, sums, n, i);
                i += V::LANES;
            }
            if i + 8 <= n {
                for g in 0..G {
                    let to = sums.add(g * n + i);
                    let mut s = V::load8(to);
                    for (j, &at) in offsets.iter().enumerate() {
                        let w = V::splat(*weights.add(g * p_stride + j));
                        s = T::load8::<V>(base.as_ptr().add(at + i)).fma(w, s);
                    }
                    s.store8(to);
                }
                i += 8;
            }
            while i < n {
                for g in 0..G {
                    for (j, &at) in offsets.iter().enumerate() {
                        let w = *weights.add(g * p_stride + j);
                        *sums.add(g * n + i) += (*base.as_ptr().add(at + i)).widen() * w;
                    }
                }
                i += 1;
            }
        }
    });
}

/// `C` vectors of columns from `i` on, for `G` heads, held in registers over all rows.
#[inline(always)]
unsafe fn columns<V: Vector, T: Lane, const G: usize, const C: usize>(
    weights: *const f32,
    p_stride: usize,
    base: &[T],
    offsets: &[usize],
    sums: *mut f32,
    n: usize,
    i: usize,
) {
    // SAFETY: as in `axpy_rows`.
    unsafe {
        let mut s = [[V::splat(0.0); C]; G];
        for g in 0..G {
            for c in 0..C {
                s[g][c] = V::load(sums.add(g * n + i + c * V::LANES));
            }
        }
        for (j, &row) in offsets.iter().enumerate() {
            let mut w = [V::splat(0.0); G];
            for g in 0..G {
                w[g] = V::splat(*weights.add(g * p_stride + j));
            }
            for c in 0..C {
                let v = T::load::<V>(base.as_ptr().add(row + i + c * V::LANES));
                for g in 0..G {
                    s[g][c] = v.fma(w[g], s[g][c]);
                }
            }
        }
        for g in 0..G {
            for c in 0..C {
                s[g][c].store(sums.add(g * n + i + c * V::LANES));
            }
        }
    }
}
