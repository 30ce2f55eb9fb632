//! Vectors of f32 and the element types that are widened into them.

use half::{bf16, f16};

/// A register of `LANES` f32 values. The kernels are written once over this trait.
///
/// # Safety
/// Of all methods: the CPU has the instructions of the implementation, and pointers are valid for `LANES`
/// elements (8 for the `8` methods, which leave the other lanes zero). No alignment is needed.
pub(in crate::backend::cpu) trait Vector: Copy {
    /// 8 or 16.
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self;
    /// Asks for the cache line at `p`, which need not be valid.
    fn prefetch<T>(p: *const T);
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn load_f16(p: *const f16) -> Self;
    unsafe fn load_bf16(p: *const bf16) -> Self;
    unsafe fn load_i8(p: *const i8) -> Self;
    unsafe fn load8(p: *const f32) -> Self;
    unsafe fn load8_f16(p: *const f16) -> Self;
    unsafe fn load8_bf16(p: *const bf16) -> Self;
    unsafe fn load8_i8(p: *const i8) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn store8(self, p: *mut f32);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `self * b + c`, fused where the CPU can.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// Lane-wise; `b` where either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// Lane-wise; `b` where either is NaN.
    unsafe fn min(self, b: Self) -> Self;
    /// To the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for integers `n` in -252 ..= 252.
    unsafe fn scale2(self, n: Self) -> Self;
    /// Sum of the lanes, in a fixed order.
    unsafe fn sum(self) -> f32;
    /// Largest lane.
    unsafe fn largest(self) -> f32;
}

/// Element types that the kernels read.
pub(in crate::backend::cpu) trait Lane:
    super::super::memory::Element
{
    /// Exact widening.
    fn widen(self) -> f32;
    /// # Safety
    /// As [`Vector::load`].
    unsafe fn load<V: Vector>(p: *const Self) -> V;
    /// # Safety
    /// As [`Vector::load8`].
    unsafe fn load8<V: Vector>(p: *const Self) -> V;
}

macro_rules! lane {
    ($t:ty, $load:ident, $load8:ident, $widen:expr) => {
        impl Lane for $t {
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self)
            }
            #[inline(always)]
            unsafe fn load<V: Vector>(p: *const Self) -> V {
                // SAFETY: passed on to the caller.
                unsafe { V::$load(p) }
            }
            #[inline(always)]
            unsafe fn load8<V: Vector>(p: *const Self) -> V {
                // SAFETY: passed on to the caller.
                unsafe { V::$load8(p) }
            }
        }
    };
}
lane!(f32, load, load8, |x: f32| x);
lane!(f16, load_f16, load8_f16, f16::to_f32);
lane!(bf16, load_bf16, load8_bf16, bf16::to_f32);
lane!(i8, load_i8, load8_i8, f32::from);

/// Element types that results are stored in.
pub(in crate::backend::cpu) trait Narrow: Lane {
    /// To nearest, ties to even.
    fn narrow(x: f32) -> Self;
}
impl Narrow for f32 {
    fn narrow(x: f32) -> Self {
        x
    }
}
impl Narrow for f16 {
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
}
impl Narrow for bf16 {
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// Eight lanes in plain Rust: what every other CPU runs, and what the others are tested against.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
    /// # Safety
    /// `p` is valid for 8 elements.
    #[inline(always)]
    unsafe fn widen<T: Lane>(p: *const T) -> Self {
        // SAFETY: the caller's promise; arrays of elements have the element's layout.
        Portable(unsafe { p.cast::<[T; 8]>().read_unaligned() }.map(T::widen))
    }
}

impl Vector for Portable {
    const LANES: usize = 8;
    #[inline(always)]
    fn prefetch<T>(_: *const T) {}
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's promise. The same holds for the loads below.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: see `load`.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self {
        // SAFETY: see `load`.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: see `load`.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load8(p: *const f32) -> Self {
        // SAFETY: see `load`.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load8_f16(p: *const f16) -> Self {
        // SAFETY: see `load`.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load8_bf16(p: *const bf16) -> Self {
        // SAFETY: see `load`.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn load8_i8(p: *const i8) -> Self {
        // SAFETY: see `load`.
        unsafe { Self::widen(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store8(self, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.store(p) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // `mul_add` is a slow library call where the target has no such instruction.
        let one = |x: f32, y: f32, z: f32| {
            if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                x.mul_add(y, z)
            } else {
                x * y + z
            }
        };
        Portable(std::array::from_fn(|i| one(self.0[i], b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.zip(b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to an integer; larger ones never come here.
        const MAGIC: f32 = 12_582_912.0;
        Portable(self.0.map(|x| (x + MAGIC) - MAGIC))
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        // Two steps, so that results below 2^-126 are reached without leaving the exponent's range.
        let pow = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        self.zip(n, |x, n| {
            let half = (n as i32) >> 1;
            x * pow(half) * pow(n as i32 - half)
        })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let a = &self.0;
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}
