//! The one table of tolerances: NMSE = sum (x - ref)^2 / sum ref^2 per output tensor.

use longsight::backend::DType;

/// How far an output may be from the f64 reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Class {
    /// Copies, indices, states: the reference value rounded once to the dtype, nothing else.
    Exact,
    /// NMSE at most this.
    Nmse(f64),
}

impl Class {
    pub fn nmse(self) -> f64 {
        match self {
            Class::Exact => 0.0,
            Class::Nmse(t) => t,
        }
    }
}

/// f32 arithmetic, f32 result: the unit roundoff is 6e-8; sums of a few thousand products in any order and an
/// `exp` good to a few units give relative errors up to about 3e-6, squared 1e-11.
const F32: f64 = 1e-10;
/// f16 result: the rounding error is at most 2^-11 of the value, NMSE (2^-11)^2 / 3 * E[1 / m^2] = 4.5e-8 over the
/// mantissas m of a tensor. A second rounding of that size is legitimate where matrix units take softmax weights
/// in f16; twice that is the limit.
const F16: f64 = 2e-7;
/// bf16 result: the same with 2^-8; one rounding gives 2.9e-6.
const BF16: f64 = 1.3e-5;

/// (op, f32, f16, bf16); the column is the dtype of the output. For the `out` of attention it is the narrower of
/// activation and output dtype, because matrix units take the softmax weights in the activation dtype.
const TABLE: &[(&str, f64, f64, f64)] = &[
    ("rms_norm", F32, F16, BF16),
    ("linear", F32, F16, BF16),
    ("linear_gated", F32, F16, BF16),
    // Angles reach 1.3e5 rad: a range reduction in f32 leaves about 1e-6 absolute, some devices add 5e-6.
    ("rope", 1e-9, F16, BF16),
    ("swiglu", F32, F16, BF16),
    ("content_bias", F32, F16, BF16),
    // int8 scale: one f32 quotient (GPU divisions are good to 2.5 units in the last place).
    ("kv_append", 1e-12, F16, BF16),
    ("quantise_keys", 1e-12, F16, BF16),
    ("key_stats", F32, F16, BF16),
    ("select_dims", F32, F16, BF16),
    ("score_dims", F32, F16, BF16),
    ("score_rows", F32, F16, BF16),
    // Probabilities: an error in the exponent is a relative one.
    ("score_tiles", F32, F16, BF16),
    ("pool_scores", F32, F16, BF16),
    ("project", F32, F16, BF16),
    ("kv_summaries", F32, F16, BF16),
    ("score_summaries", F32, F16, BF16),
    ("pool_blocks", F32, F16, BF16),
    ("attend_dense", F32, F16, BF16),
    ("attend_rows", F32, F16, BF16),
    ("merge", F32, F16, BF16),
    ("mean_value", F32, F16, BF16),
];

/// The tolerance of output `name` of `op`, stored as `out`, computed from activations of `act`.
pub fn class(op: &str, name: &str, out: DType, act: DType) -> Class {
    let narrow = |d: DType| match d {
        DType::BF16 => 2,
        DType::F16 => 1,
        _ => 0,
    };
    let attention = matches!(op, "attend_dense" | "attend_rows") && name == "out";
    let dtype = if attention && narrow(act) > narrow(out) { act } else { out };
    match (TABLE.iter().find(|row| row.0 == op), dtype) {
        (Some(row), DType::F32) => Class::Nmse(row.1),
        (Some(row), DType::F16) => Class::Nmse(row.2),
        (Some(row), DType::BF16) => Class::Nmse(row.3),
        _ => Class::Exact,
    }
}
