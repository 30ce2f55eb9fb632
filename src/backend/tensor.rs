//! Typed views of device buffers.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// Element types that buffers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// Signed bytes (quantised keys).
    I8,
    /// Unsigned 32-bit (tokens, indices, page tables).
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 => 1,
        }
    }

    /// True for the three float types.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }

    /// Lower-case name, as in tables and test names.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I8 => "i8",
            DType::U32 => "u32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "f32" => Ok(DType::F32),
            "f16" => Ok(DType::F16),
            "bf16" => Ok(DType::BF16),
            _ => Err(format!("unknown dtype {s:?}; known: f32, f16, bf16")),
        }
    }
}

/// A backend's own buffer object behind a [`Tensor`].
pub trait DeviceBuffer: Any + Send + Sync {
    /// For downcasting inside the backend that made it.
    fn as_any(&self) -> &dyn Any;
    /// Size in bytes.
    fn bytes(&self) -> usize;
}

/// A typed view into a device buffer: `len` elements of `dtype` from element `offset`.
///
/// Shapes are not part of it; every op's parameter struct names them. Clones share the buffer. Tensors passed to
/// ops start at multiples of [`ALIGN`](super::ALIGN) bytes of their buffer (64 elements of f32, 128 of f16).
#[derive(Clone)]
pub struct Tensor {
    buffer: Arc<dyn DeviceBuffer>,
    dtype: DType,
    offset: usize,
    len: usize,
}

impl Tensor {
    /// Wraps a whole buffer of `len` elements. Called by backends in `alloc`.
    pub fn from_buffer(buffer: Arc<dyn DeviceBuffer>, dtype: DType, len: usize) -> Self {
        debug_assert!(len * dtype.bytes() <= buffer.bytes());
        Tensor { buffer, dtype, offset: 0, len }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// First element, counted in elements of `dtype` from the start of the buffer.
    pub fn offset(&self) -> usize {
        self.offset
    }
    /// First byte inside the buffer.
    pub fn byte_offset(&self) -> usize {
        self.offset * self.dtype.bytes()
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }
    /// True when the view holds no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Size of the view in bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.bytes()
    }
    /// The buffer object, for the backend that made it.
    pub fn buffer(&self) -> &dyn Any {
        self.buffer.as_any()
    }
    /// True when both views share one buffer.
    pub fn same_buffer(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer)
    }

    /// True when both views begin at the same byte of one buffer.
    pub fn same_place(&self, other: &Tensor) -> bool {
        self.same_buffer(other) && self.byte_offset() == other.byte_offset()
    }

    /// True when the views share bytes, which an empty one does not.
    pub fn overlaps(&self, other: &Tensor) -> bool {
        let end = |t: &Tensor| t.byte_offset() + t.bytes();
        let first = self.byte_offset().max(other.byte_offset());
        self.same_buffer(other) && first < end(self).min(end(other))
    }

    /// A sub-view of `len` elements from element `start` of this view.
    ///
    /// Panics when it does not fit: offsets are computed by this crate, never read from input.
    pub fn slice(&self, start: usize, len: usize) -> Tensor {
        let fits = start.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "slice {start}+{len} of a tensor of {}", self.len);
        Tensor { buffer: self.buffer.clone(), dtype: self.dtype, offset: self.offset + start, len }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} x {} at {})", self.len, self.dtype, self.offset)
    }
}
