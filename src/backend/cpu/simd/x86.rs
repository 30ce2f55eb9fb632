//! AVX-512 and AVX2 + FMA + F16C vectors. Every method is one instruction or a short fixed sequence.
//!
//! SAFETY of every block here: the methods of [`Vector`] promise that the CPU has the instructions and that
//! pointers are valid; all loads and stores are unaligned ones.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::vector::Vector;

/// 16 lanes; needs avx512f, avx512bw, avx512dq, avx512vl, f16c.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

/// 8 lanes; needs avx2, fma, f16c.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256);

/// Bits of a bf16 are the upper half of an f32.
const BF16_SHIFT: i32 = 16;

macro_rules! methods {
    ($(fn $name:ident($($a:ident: $t:ty),*) $(-> $r:ty)? $body:block)*) => {
        $(#[inline(always)]
        unsafe fn $name($($a: $t),*) $(-> $r)? {
            // SAFETY: see the head of this file.
            unsafe { $body }
        })*
    };
}

impl Vector for Avx512 {
    const LANES: usize = 16;
    #[inline(always)]
    fn prefetch<T>(p: *const T) {
        // SAFETY: a hint; it reads nothing and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    methods! {
        fn splat(x: f32) -> Self { Avx512(_mm512_set1_ps(x)) }
        fn load(p: *const f32) -> Self { Avx512(_mm512_loadu_ps(p)) }
        fn load_f16(p: *const f16) -> Self { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
        fn load_bf16(p: *const bf16) -> Self {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<{ BF16_SHIFT as u32 }>(wide)))
        }
        fn load_i8(p: *const i8) -> Self {
            Avx512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))))
        }
        fn load8(p: *const f32) -> Self { Avx512(_mm512_zextps256_ps512(Avx2::load(p).0)) }
        fn load8_f16(p: *const f16) -> Self { Avx512(_mm512_zextps256_ps512(Avx2::load_f16(p).0)) }
        fn load8_bf16(p: *const bf16) -> Self { Avx512(_mm512_zextps256_ps512(Avx2::load_bf16(p).0)) }
        fn load8_i8(p: *const i8) -> Self { Avx512(_mm512_zextps256_ps512(Avx2::load_i8(p).0)) }
        fn store(self: Self, p: *mut f32) { _mm512_storeu_ps(p, self.0) }
        fn store8(self: Self, p: *mut f32) { _mm256_storeu_ps(p, _mm512_castps512_ps256(self.0)) }
        fn add(self: Self, b: Self) -> Self { Avx512(_mm512_add_ps(self.0, b.0)) }
        fn sub(self: Self, b: Self) -> Self { Avx512(_mm512_sub_ps(self.0, b.0)) }
        fn mul(self: Self, b: Self) -> Self { Avx512(_mm512_mul_ps(self.0, b.0)) }
        fn div(self: Self, b: Self) -> Self { Avx512(_mm512_div_ps(self.0, b.0)) }
        fn fma(self: Self, b: Self, c: Self) -> Self { Avx512(_mm512_fmadd_ps(self.0, b.0, c.0)) }
        fn max(self: Self, b: Self) -> Self { Avx512(_mm512_max_ps(self.0, b.0)) }
        fn min(self: Self, b: Self) -> Self { Avx512(_mm512_min_ps(self.0, b.0)) }
        fn round(self: Self) -> Self { Avx512(_mm512_roundscale_ps::<0>(self.0)) }
        fn scale2(self: Self, n: Self) -> Self { Avx512(_mm512_scalef_ps(self.0, n.0)) }
        fn sum(self: Self) -> f32 {
            let low = _mm512_castps512_ps256(self.0);
            let high = _mm512_extractf32x8_ps::<1>(self.0);
            Avx2(_mm256_add_ps(low, high)).sum()
        }
        fn largest(self: Self) -> f32 {
            let low = _mm512_castps512_ps256(self.0);
            let high = _mm512_extractf32x8_ps::<1>(self.0);
            Avx2(_mm256_max_ps(low, high)).largest()
        }
    }
}

impl Vector for Avx2 {
    const LANES: usize = 8;
    #[inline(always)]
    fn prefetch<T>(p: *const T) {
        // SAFETY: a hint; it reads nothing and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    methods! {
        fn splat(x: f32) -> Self { Avx2(_mm256_set1_ps(x)) }
        fn load(p: *const f32) -> Self { Avx2(_mm256_loadu_ps(p)) }
        fn load_f16(p: *const f16) -> Self { Avx2(_mm256_cvtph_ps(_mm_loadu_si128(p.cast()))) }
        fn load_bf16(p: *const bf16) -> Self {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<BF16_SHIFT>(wide)))
        }
        fn load_i8(p: *const i8) -> Self {
            Avx2(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))))
        }
        fn load8(p: *const f32) -> Self { Self::load(p) }
        fn load8_f16(p: *const f16) -> Self { Self::load_f16(p) }
        fn load8_bf16(p: *const bf16) -> Self { Self::load_bf16(p) }
        fn load8_i8(p: *const i8) -> Self { Self::load_i8(p) }
        fn store(self: Self, p: *mut f32) { _mm256_storeu_ps(p, self.0) }
        fn store8(self: Self, p: *mut f32) { _mm256_storeu_ps(p, self.0) }
        fn add(self: Self, b: Self) -> Self { Avx2(_mm256_add_ps(self.0, b.0)) }
        fn sub(self: Self, b: Self) -> Self { Avx2(_mm256_sub_ps(self.0, b.0)) }
        fn mul(self: Self, b: Self) -> Self { Avx2(_mm256_mul_ps(self.0, b.0)) }
        fn div(self: Self, b: Self) -> Self { Avx2(_mm256_div_ps(self.0, b.0)) }
        fn fma(self: Self, b: Self, c: Self) -> Self { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0)) }
        fn max(self: Self, b: Self) -> Self { Avx2(_mm256_max_ps(self.0, b.0)) }
        fn min(self: Self, b: Self) -> Self { Avx2(_mm256_min_ps(self.0, b.0)) }
        fn round(self: Self) -> Self { Avx2(_mm256_round_ps::<8>(self.0)) }
        fn scale2(self: Self, n: Self) -> Self {
            // Two steps, so that results below 2^-126 are reached without leaving the exponent's range.
            let n = _mm256_cvtps_epi32(n.0);
            let half = _mm256_srai_epi32::<1>(n);
            let pow = |n| {
                let biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            let first = _mm256_mul_ps(self.0, pow(half));
            Avx2(_mm256_mul_ps(first, pow(_mm256_sub_epi32(n, half))))
        }
        fn sum(self: Self) -> f32 {
            let a = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let b = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)))
        }
        fn largest(self: Self) -> f32 {
            let a = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let b = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)))
        }
    }
}
