//! Vector kernels: dot products, weighted sums and exp, chosen at run time for the CPU.
//!
//! `kernels` and `elementwise` hold each kernel once, generic over the [`Vector`] type and the element type it reads; this
//! module compiles it for AVX-512, for AVX2 + FMA + F16C and in plain Rust, and picks one. Reduction orders are
//! fixed by the shape and the instruction set, so a machine always computes the same bits.

mod elementwise;
mod exp;
mod kernels;
#[cfg(test)]
mod tests;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use vector::{Lane, Narrow};

/// Every kernel under one roof, for the macro below.
mod generic {
    pub(super) use super::elementwise::*;
    pub(super) use super::kernels::*;
}

use std::sync::OnceLock;

/// Instruction sets that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best that this CPU has.
    pub(super) fn detected() -> Isa {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| Isa::all()[0])
    }

    /// All that this CPU has, best first.
    pub(super) fn all() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                all.push(Isa::Avx512);
            }
            if avx2 {
                all.push(Isa::Avx2);
            }
        }
        all.push(Isa::Portable);
        all
    }

    /// Name for the device description.
    pub(super) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "AVX2",
            Isa::Portable => "portable",
        }
    }
}

/// Makes `name(args)` call the generic kernel of the same name compiled for the detected instruction set,
/// and `name_on(isa, args)` for the tests.
macro_rules! kernels {
    ($($(#[$doc:meta])* $name:ident / $on:ident $([$T:ident])? ($($a:ident: $t:ty),* $(,)?) $(-> $r:ty)?;)*) => {$(
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)] // strides and lengths beside each slice
        pub(super) fn $name $(<$T: Lane>)? ($($a: $t),*) $(-> $r)? {
            $on(Isa::detected(), $($a),*)
        }

        #[allow(clippy::too_many_arguments)]
        fn $on $(<$T: Lane>)? (isa: Isa, $($a: $t),*) $(-> $r)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$T: Lane>)? ($($a: $t),*) $(-> $r)? {
                // SAFETY: compiled with the features of `Avx512`.
                unsafe { generic::$name::<x86::Avx512 $(, $T)?>($($a),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$T: Lane>)? ($($a: $t),*) $(-> $r)? {
                // SAFETY: compiled with the features of `Avx2`.
                unsafe { generic::$name::<x86::Avx2 $(, $T)?>($($a),*) }
            }
            match isa {
                // SAFETY: an `Isa` is only made when the CPU has it.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512 $(::<$T>)? ($($a),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2 $(::<$T>)? ($($a),*) },
                // SAFETY: plain Rust runs everywhere.
                Isa::Portable => unsafe {
                    generic::$name::<vector::Portable $(, $T)?>($($a),*)
                },
            }
        }
    )*};
}

kernels! {
    /// `y[o] = sum_i x[i] * w[o * x.len() + i]` for every `o` of `y`; what follows in `w` is read next.
    gemv / gemv_on [T] (x: &[f32], w: &[T], y: &mut [f32]);

    /// `y[o * rows + r] = sum_i x[r * n + i] * w[o * n + i]` for 1 to 8 rows of `n` inputs, reading `w` once;
    /// what follows in `w` is read next.
    gemv_rows / gemv_rows_on [T] (x: &[f32], rows: usize, n: usize, w: &[T], y: &mut [f32]);

    /// `dst[i] = src[i]`, widened.
    widen / widen_on [T] (src: &[T], dst: &mut [f32]);

    /// `out[h * out_stride + j] (+)= sum_i q[h * q_stride + i] * base[offsets[j] + i]` for `i < n`:
    /// the logits of a group of query heads against listed key rows.
    dot_rows / dot_rows_on [T] (
        q: &[f32], q_stride: usize, heads: usize, n: usize,
        base: &[T], offsets: &[usize], out: &mut [f32], out_stride: usize, accumulate: bool,
    );

    /// `acc[h * n + i] += sum_j p[h * p_stride + j] * base[offsets[j] + i]` for `i < n`:
    /// the weighted sum of listed value rows for a group of query heads.
    axpy_rows / axpy_rows_on [T] (
        p: &[f32], p_stride: usize, heads: usize, n: usize,
        base: &[T], offsets: &[usize], acc: &mut [f32],
    );

    /// `x[i] = exp(x[i] - m)`; returns the sum of the results. -infinity gives 0.
    exp_sub / exp_sub_on (x: &mut [f32], m: f32) -> f32;

    /// `sum_i exp(x[i] - m)`.
    sum_exp / sum_exp_on (x: &[f32], m: f32) -> f32;

    /// Largest element, -infinity for none; NaN is passed over.
    largest / largest_on (x: &[f32]) -> f32;

    /// `x[i] *= a`.
    scale / scale_on (x: &mut [f32], a: f32);

    /// `sum_i x[i]`.
    sum / sum_on (x: &[f32]) -> f32;

    /// `sum_i x[i]^2`.
    sum_squares / sum_squares_on (x: &[f32]) -> f32;

    /// `out[i] = x[i] * a * w[i]`.
    scale_by / scale_by_on (x: &[f32], a: f32, w: &[f32], out: &mut [f32]);

    /// `out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]`.
    swiglu / swiglu_on (gate: &[f32], up: &[f32], out: &mut [f32]);

    /// Unsigned images of scores; returns the largest. Larger for larger scores, equal for -0 and +0, and 0 for NaN
    /// and -infinity alone.
    images / images_on (scores: &[f32], out: &mut [u32]) -> u32;

    /// How many images are `least` or more.
    count_from / count_from_on (images: &[u32], least: u32) -> usize;

    /// `out[i] = max(out[i], x[i] - a)`; -infinity and NaN are passed over.
    max_sub / max_sub_on (x: &[f32], a: f32, out: &mut [f32]);
}
