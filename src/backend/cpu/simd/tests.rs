//! Every kernel on every instruction set of this machine against f64.

use half::{bf16, f16};

use super::*;

/// Lengths around the vector widths and the unrolled loops.
const LENGTHS: [usize; 12] = [0, 1, 7, 8, 9, 16, 24, 31, 64, 72, 129, 576];

/// Pseudo-random numbers in -1 .. 1, the same at every run.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

trait FromF32: Lane {
    fn from(x: f32) -> Self;
}
impl FromF32 for f32 {
    fn from(x: f32) -> Self {
        x
    }
}
impl FromF32 for f16 {
    fn from(x: f32) -> Self {
        f16::from_f32(x)
    }
}
impl FromF32 for bf16 {
    fn from(x: f32) -> Self {
        bf16::from_f32(x)
    }
}
impl FromF32 for i8 {
    fn from(x: f32) -> Self {
        (x * 127.0) as i8
    }
}

fn elements<T: FromF32>(n: usize, seed: u32) -> Vec<T> {
    numbers(n, seed).into_iter().map(T::from).collect()
}

/// Sum of products in f64, and the sum of their sizes (what rounding errors scale with).
fn exact<T: Lane>(x: &[f32], w: &[T]) -> (f64, f64) {
    let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(w.widen()));
    terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()))
}

fn close(got: f32, (want, size): (f64, f64), what: &str) {
    let error = (f64::from(got) - want).abs();
    assert!(error <= 1e-6 * size + 1e-30, "{what}: {got} for {want} (terms of {size})");
}

fn dots<T: FromF32>() {
    for isa in Isa::all() {
        for n in LENGTHS {
            let x = numbers(8 * n, 1);
            let w = elements::<T>(7 * n, 2);
            let row = |o: usize| &w[o * n..(o + 1) * n];
            let mut y = vec![f32::NAN; 7];
            gemv_on(isa, &x[..n], &w, &mut y);
            for (o, &y) in y.iter().enumerate() {
                close(y, exact(&x[..n], row(o)), &format!("gemv {isa:?} {n}"));
            }
            // Rows that follow are no part of the result.
            let more = [&w[..], &elements::<T>(9 * n, 8)].concat();
            let mut again = vec![f32::NAN; 7];
            gemv_on(isa, &x[..n], &more, &mut again);
            assert_eq!(again, y, "gemv {isa:?} {n}");
            for rows in 1..=8 {
                let mut y = vec![f32::NAN; 7 * rows];
                gemv_rows_on(isa, &x, rows, n, &w, &mut y);
                let mut again = y.clone();
                gemv_rows_on(isa, &x, rows, n, &more, &mut again);
                assert_eq!(again, y, "gemv_rows {isa:?} {n}");
                for (i, y) in y.iter().enumerate() {
                    let (o, r) = (i / rows, i % rows);
                    close(*y, exact(&x[r * n..(r + 1) * n], row(o)), &format!("gemv_rows {isa:?}"));
                }
            }
        }
    }
}

fn row_lists<T: FromF32>() {
    for isa in Isa::all() {
        for n in LENGTHS {
            for heads in [1, 2, 3, 4, 7, 16] {
                let base = elements::<T>(n * 9 + 5, 3);
                let offsets: Vec<usize> = [5, 0, 3, 8, 8].iter().map(|i| i * n + 5).collect();
                let q = numbers(heads * (n + 3), 4);
                let mut out = numbers(heads * 6, 5);
                let before = out.clone();
                dot_rows_on(isa, &q, n + 3, heads, n, &base, &offsets, &mut out, 6, true);
                for h in 0..heads {
                    for (j, &at) in offsets.iter().enumerate() {
                        let (s, a) = exact(&q[h * (n + 3)..][..n], &base[at..at + n]);
                        let old = f64::from(before[h * 6 + j]);
                        close(out[h * 6 + j], (s + old, a + old.abs()), "dot_rows");
                    }
                    assert_eq!(out[h * 6 + 5], before[h * 6 + 5], "behind the list");
                }
                let p = numbers(heads * 6, 6);
                let mut acc = numbers(heads * n, 7);
                let before = acc.clone();
                axpy_rows_on(isa, &p, 6, heads, n, &base, &offsets, &mut acc);
                for (i, got) in acc.iter().enumerate() {
                    let (h, c) = (i / n, i % n);
                    let column: Vec<T> = offsets.iter().map(|at| base[at + c]).collect();
                    let (s, a) = exact(&p[h * 6..][..5], &column);
                    let old = f64::from(before[i]);
                    close(*got, (s + old, a + old.abs()), "axpy_rows");
                }
            }
        }
    }
}

#[test]
fn dot_products() {
    dots::<f32>();
    dots::<f16>();
    dots::<bf16>();
}

#[test]
fn listed_rows() {
    row_lists::<f32>();
    row_lists::<f16>();
    row_lists::<bf16>();
    row_lists::<i8>();
}

#[test]
fn widening_is_exact() {
    fn check<T: FromF32>(all: &[T]) {
        for isa in Isa::all() {
            let mut wide = vec![0.0; all.len()];
            widen_on(isa, all, &mut wide);
            for (x, w) in all.iter().zip(wide) {
                assert!(x.widen().to_bits() == w.to_bits() || w.is_nan() && x.widen().is_nan());
            }
        }
    }
    let bits: Vec<u16> = (0..=u16::MAX).collect();
    check(&bits.iter().map(|b| f16::from_bits(*b)).collect::<Vec<_>>());
    check(&bits.iter().map(|b| bf16::from_bits(*b)).collect::<Vec<_>>());
    check(&(i8::MIN..=i8::MAX).collect::<Vec<_>>());
}

#[test]
fn exp_is_good_to_2e_7() {
    // 2^21 points over all normal results.
    let xs: Vec<f32> =
        (0..1 << 21).map(|i| -87.3 + i as f32 * (176.0 / (1 << 21) as f32)).collect();
    for isa in Isa::all() {
        let mut got = xs.clone();
        exp_sub_on(isa, &mut got, 0.0);
        for (x, got) in xs.iter().zip(got) {
            let want = f64::from(*x).exp();
            let error = (f64::from(got) - want).abs() / want;
            assert!(error <= 2e-7, "{isa:?}: exp({x}) = {got}, {error:e} off");
        }
        let mut ends = vec![0.0, f32::NEG_INFINITY, -1e30, 89.0, f32::INFINITY, f32::NAN, -100.0];
        exp_sub_on(isa, &mut ends, 0.0);
        assert_eq!(ends[..3], [1.0, 0.0, 0.0], "{isa:?}");
        assert_eq!(ends[3..5], [f32::INFINITY; 2], "{isa:?}");
        assert!(ends[5].is_nan(), "{isa:?}");
        assert!((ends[6] - (-100.0f32).exp()).abs() <= 1e-44, "{isa:?}: {:e}", ends[6]);
    }
}

#[test]
fn reductions_and_elementwise() {
    for isa in Isa::all() {
        for n in LENGTHS {
            let (x, w, ones) = (numbers(n, 8), numbers(n, 9), vec![1.0; n]);
            close(sum_on(isa, &x), exact(&ones, &x), "sum");
            close(sum_squares_on(isa, &x), exact(&x, &x), "sum_squares");
            assert_eq!(largest_on(isa, &x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let want: f64 = x.iter().map(|x| (f64::from(*x) - 0.5).exp()).sum();
            close(sum_exp_on(isa, &x, 0.5), (want, want), "sum_exp");
            close(exp_sub_on(isa, &mut x.clone(), 0.5), (want, want), "exp_sub");
            let mut got = x.clone();
            scale_on(isa, &mut got, 3.0);
            assert!(got.iter().zip(&x).all(|(g, x)| *g == 3.0 * x));
            scale_by_on(isa, &x, 0.5, &w, &mut got);
            assert!(got.iter().zip(&x).zip(&w).all(|((g, x), w)| *g == x * 0.5 * w));
            swiglu_on(isa, &x, &w, &mut got);
            for ((g, x), w) in got.iter().zip(&x).zip(&w) {
                let (x, w) = (f64::from(*x), f64::from(*w));
                let want = x / (1.0 + (-x).exp()) * w;
                close(*g, (want, want.abs()), "swiglu");
            }
        }
        let mut got = [0.0; 4];
        swiglu_on(isa, &[-200.0, 200.0, -88.0, 0.0], &[1.0; 4], &mut got);
        assert!(got[0].abs() < 1e-30 && got[1] == 200.0 && got[2].abs() < 1e-30 && got[3] == 0.0);
    }
}

#[test]
fn nan_is_passed_over_by_largest() {
    for isa in Isa::all() {
        assert_eq!(largest_on(isa, &[f32::NAN, 1.0, f32::NAN]), 1.0, "{isa:?}");
        assert_eq!(largest_on(isa, &[f32::NAN; 20]), f32::NEG_INFINITY, "{isa:?}");
    }
}

#[test]
fn images_keep_the_order_of_scores() {
    let inf = f32::INFINITY;
    let special = [inf, f32::MAX, 1.0, 1e-45, 0.0, -1e-45, -1.0, f32::MIN];
    for isa in Isa::all() {
        for n in LENGTHS {
            let mut x = numbers(n, 5);
            x.extend(special);
            x.extend([f32::NAN, -inf, -f32::NAN, -0.0]);
            let mut images = vec![9; x.len()];
            let largest = images_on(isa, &x, &mut images);
            assert_eq!(largest, images[n], "{isa:?}");
            assert!(images[n..n + special.len()].is_sorted_by(|a, b| a > b), "{isa:?}");
            assert_eq!(images[n + special.len()..], [0, 0, 0, images[n + 4]], "{isa:?}");
            for (x, image) in x.iter().zip(&images).take(n + special.len()) {
                assert!(*image > 0);
                let above = special.iter().zip(&images[n..]);
                above.for_each(|(s, i)| assert_eq!(x > s, image > i, "{isa:?}: {x} and {s}"));
                let from = images.iter().filter(|i| *i >= image).count();
                assert_eq!(count_from_on(isa, &images, *image), from, "{isa:?}");
            }
        }
    }
}

#[test]
fn max_sub_passes_over_what_is_no_number() {
    let inf = f32::INFINITY;
    for isa in Isa::all() {
        for n in LENGTHS {
            let (x, old) = (numbers(n, 6), numbers(n, 7));
            let mut out = old.clone();
            max_sub_on(isa, &x, 0.25, &mut out);
            let want: Vec<f32> = x.iter().zip(&old).map(|(x, o)| (x - 0.25).max(*o)).collect();
            assert_eq!(out, want, "{isa:?}");
            max_sub_on(isa, &vec![-inf; n], -inf, &mut out);
            max_sub_on(isa, &vec![-inf; n], 1.0, &mut out);
            assert_eq!(out, want, "{isa:?}");
        }
    }
}
