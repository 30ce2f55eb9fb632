//! The primitive values of a GGUF file, read without ever leaving the file's bounds.

use std::ops::Range;
use std::path::Path;

use super::error::{ModelError, Result};

/// Arrays of arrays nest at most this deep.
const MAX_NESTING: u32 = 4;
const MAX_NAME: u64 = 1 << 16;

/// Scalar value types of the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_id(id: u32) -> Option<Kind> {
        use Kind::*;
        const KINDS: [Kind; 13] =
            [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        KINDS.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of a value of fixed size.
    fn size(self) -> Option<usize> {
        Some(match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 => 8,
            Kind::String | Kind::Array => return None,
        })
    }
}

/// One metadata value. Arrays stay in the file: only their place is kept.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array { kind: Kind, count: usize, at: Range<usize> },
}

/// A position in the file that never runs past its end.
pub(super) struct Cursor<'a> {
    pub path: &'a Path,
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len());
        let Some(end) = end else {
            return Err(ModelError::truncated(self.path, what));
        };
        let piece = &self.bytes[self.at..end];
        self.at = end;
        Ok(piece)
    }

    pub fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    pub fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length or count that must be covered by the rest of the file at `unit` bytes each.
    pub fn count(&mut self, unit: usize, what: &str) -> Result<usize> {
        let claimed = self.u64(what)?;
        match usize::try_from(claimed) {
            Ok(n) if n <= self.remaining() / unit => Ok(n),
            _ => Err(ModelError::corrupt(
                self.path,
                format!(
                    "its {what} claims {claimed} entries, more than the rest of the file can hold"
                ),
            )),
        }
    }

    pub fn string(&mut self, what: &str) -> Result<&'a str> {
        let n = self.count(1, what)?;
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| ModelError::corrupt(self.path, format!("its {what} is not valid UTF-8")))
    }

    pub fn name(&mut self, what: &str) -> Result<&'a str> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() as u64 > MAX_NAME {
            return Err(ModelError::corrupt(
                self.path,
                format!("a {what} has {} bytes", name.len()),
            ));
        }
        Ok(name)
    }

    pub fn kind(&mut self, what: &str) -> Result<Kind> {
        let id = self.u32(what)?;
        Kind::from_id(id).ok_or_else(|| {
            ModelError::corrupt(self.path, format!("its {what} has the unknown type {id}"))
        })
    }

    pub fn value(&mut self, kind: Kind, what: &str) -> Result<Value> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(u8::from_le_bytes(self.array(what)?).into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(self.array(what)?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(self.array(what)?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(self.array(what)?).into()),
            Kind::U32 => Value::Unsigned(self.u32(what)?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(self.array(what)?).into()),
            Kind::U64 => Value::Unsigned(self.u64(what)?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            Kind::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            Kind::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            Kind::Bool => Value::Bool(self.array::<1>(what)?[0] != 0),
            Kind::String => Value::String(self.string(what)?.to_owned()),
            Kind::Array => {
                let (kind, count, at) = self.skip_array(what, 0)?;
                Value::Array { kind, count, at }
            }
        })
    }

    /// Walks over an array, checking it, and returns its element type, count and bytes.
    fn skip_array(&mut self, what: &str, depth: u32) -> Result<(Kind, usize, Range<usize>)> {
        if depth >= MAX_NESTING {
            return Err(ModelError::corrupt(
                self.path,
                format!("its {what} nests arrays too deeply"),
            ));
        }
        let kind = self.kind(what)?;
        // A string costs at least its 8-byte length, an inner array its type and count.
        let count = self.count(kind.size().unwrap_or(8), what)?;
        let start = self.at;
        match kind.size() {
            Some(size) => {
                self.take(count * size, what)?;
            }
            None => {
                for _ in 0..count {
                    if kind == Kind::Array {
                        self.skip_array(what, depth + 1)?;
                    } else {
                        self.string(what)?;
                    }
                }
            }
        }
        Ok((kind, count, start..self.at))
    }
}
