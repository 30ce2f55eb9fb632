//! Reader of GGUF files, versions 2 and 3, little endian.
//!
//! Layout (GGUF specification): magic, version, tensor count, metadata count; the metadata as
//! key, type, value; one entry per tensor (name, dimensions with the fastest first, type, offset);
//! padding to the alignment; the tensor data. Every length, count and offset of the file is
//! checked against the file's size before it is used, so a header that lies allocates nothing.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::error::{ModelError, Result};
use super::mapped::Mapped;
use super::quant::Quant;

const MAX_DIMS: u32 = 4;
/// Arrays of arrays nest at most this deep.
const MAX_NESTING: u32 = 4;
const MAX_NAME: u64 = 1 << 16;

/// Scalar value types of the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
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
enum Value {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array { kind: Kind, count: usize, at: Range<usize> },
}

/// One entry of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Dimensions as the file lists them, the fastest first.
    pub dims: Vec<usize>,
    /// How the elements are stored.
    pub quant: Quant,
    /// The tensor's bytes within the file, checked to lie inside it.
    pub bytes: Range<usize>,
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    file: Mapped,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorEntry>,
}

/// A position in the file that never runs past its end.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
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

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length or count that must be covered by the rest of the file at `unit` bytes each.
    fn count(&mut self, unit: usize, what: &str) -> Result<usize> {
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

    fn string(&mut self, what: &str) -> Result<&'a str> {
        let n = self.count(1, what)?;
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| ModelError::corrupt(self.path, format!("its {what} is not valid UTF-8")))
    }

    fn name(&mut self, what: &str) -> Result<&'a str> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() as u64 > MAX_NAME {
            return Err(ModelError::corrupt(
                self.path,
                format!("a {what} has {} bytes", name.len()),
            ));
        }
        Ok(name)
    }

    fn kind(&mut self, what: &str) -> Result<Kind> {
        let id = self.u32(what)?;
        Kind::from_id(id).ok_or_else(|| {
            ModelError::corrupt(self.path, format!("its {what} has the unknown type {id}"))
        })
    }

    fn value(&mut self, kind: Kind, what: &str) -> Result<Value> {
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

impl Gguf {
    /// Maps `path` and reads its header.
    ///
    /// # Errors
    /// `Missing`, `Truncated`, `Corrupt`, `Unsupported` (other versions, big endian) and
    /// `UnsupportedType` (a tensor in a block format that [`Quant`] does not know).
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        let (metadata, tensors) = read_header(path, file.bytes())?;
        Ok(Self { file, metadata, tensors })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The whole mapped file; tensor entries give ranges of it.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    /// The tensor table by name.
    pub fn tensors(&self) -> &HashMap<String, TensorEntry> {
        &self.tensors
    }

    /// A non-negative integer of the metadata, whatever its width.
    pub fn uint(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key)? {
            Value::Unsigned(v) => Some(*v),
            Value::Signed(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// A number of the metadata. An f32 becomes the f64 with the same shortest decimal spelling,
    /// so that 1e-5 stored as f32 is 1e-5 again.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::F32(v) => v.to_string().parse().ok(),
            Value::F64(v) => Some(*v),
            Value::Unsigned(v) => Some(*v as f64),
            Value::Signed(v) => Some(*v as f64),
            _ => None,
        }
    }

    /// A flag of the metadata.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// A string of the metadata.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::String(v) => Some(v),
            _ => None,
        }
    }

    /// Whether the metadata has `key`, of whatever type.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// Number of elements of an array of the metadata.
    pub fn array_len(&self, key: &str) -> Option<usize> {
        match self.metadata.get(key)? {
            Value::Array { count, .. } => Some(*count),
            _ => None,
        }
    }

    /// An array of strings, borrowed from the file.
    pub fn strings(&self, key: &str) -> Option<Vec<&str>> {
        let (mut cursor, kind, count) = self.array(key)?;
        if kind != Kind::String {
            return None;
        }
        (0..count).map(|_| cursor.string(key).ok()).collect()
    }

    /// An array of integers of any width.
    pub fn ints(&self, key: &str) -> Option<Vec<i64>> {
        let (mut cursor, kind, count) = self.array(key)?;
        (0..count)
            .map(|_| match cursor.value(kind, key).ok()? {
                Value::Unsigned(v) => i64::try_from(v).ok(),
                Value::Signed(v) => Some(v),
                _ => None,
            })
            .collect()
    }

    /// An array of f32 values.
    pub fn floats(&self, key: &str) -> Option<Vec<f32>> {
        let (mut cursor, kind, count) = self.array(key)?;
        (0..count)
            .map(|_| match cursor.value(kind, key).ok()? {
                Value::F32(v) => Some(v),
                _ => None,
            })
            .collect()
    }

    fn array(&self, key: &str) -> Option<(Cursor<'_>, Kind, usize)> {
        match self.metadata.get(key)? {
            Value::Array { kind, count, at } => {
                let cursor =
                    Cursor { path: self.path(), bytes: &self.bytes()[..at.end], at: at.start };
                Some((cursor, *kind, *count))
            }
            _ => None,
        }
    }
}

type Header = (HashMap<String, Value>, HashMap<String, TensorEntry>);

fn read_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { path, bytes, at: 0 };
    if &cursor.array::<4>("magic number")? != b"GGUF" {
        return Err(ModelError::corrupt(path, "it does not begin with the letters GGUF"));
    }
    let version = cursor.u32("version")?;
    if !(2..=3).contains(&version) {
        return Err(ModelError::unsupported(
            path,
            format!("GGUF version {version} (little-endian versions 2 and 3 are read)"),
        ));
    }
    // The smallest tensor entry has 8 + 4 + 4 + 8 bytes besides its name, the smallest metadata
    // entry 8 + 4 + 1.
    let n_tensors = cursor.count(24, "tensor count")?;
    let n_metadata = cursor.count(13, "metadata count")?;

    let mut metadata = HashMap::new();
    for _ in 0..n_metadata {
        let key = cursor.name("metadata key")?;
        let kind = cursor.kind("metadata")?;
        let value = cursor.value(kind, &format!("metadata value {key}"))?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(ModelError::corrupt(path, format!("it has {key} twice")));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(a)) if a.is_power_of_two() && *a <= 1 << 20 => *a as usize,
        Some(_) => {
            return Err(ModelError::corrupt(path, "its alignment is not a power of two"));
        }
    };

    let mut entries = Vec::new();
    for _ in 0..n_tensors {
        entries.push(read_tensor_entry(&mut cursor)?);
    }
    let data = cursor.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    let mut tensors = HashMap::with_capacity(entries.len());
    for (name, entry, offset) in entries {
        let entry = place(path, bytes.len(), &name, entry, data, offset, alignment)?;
        if tensors.contains_key(&name) {
            return Err(ModelError::corrupt(path, format!("it has the tensor {name} twice")));
        }
        tensors.insert(name, entry);
    }
    Ok((metadata, tensors))
}

/// Name, entry with its byte range still relative to nothing (`0..length`), and offset.
fn read_tensor_entry(cursor: &mut Cursor<'_>) -> Result<(String, TensorEntry, u64)> {
    let path = cursor.path;
    let name = cursor.name("tensor name")?.to_owned();
    let n_dims = cursor.u32("tensor table")?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(ModelError::corrupt(
            path,
            format!("the tensor {name} claims {n_dims} dimensions"),
        ));
    }
    let mut dims = Vec::with_capacity(n_dims as usize);
    let mut elements = 1usize;
    for _ in 0..n_dims {
        let dim = usize::try_from(cursor.u64("tensor table")?).unwrap_or(usize::MAX);
        elements = elements.checked_mul(dim).filter(|&n| n > 0).ok_or_else(|| {
            ModelError::corrupt(path, format!("the tensor {name} has impossible dimensions"))
        })?;
        dims.push(dim);
    }
    let type_id = cursor.u32("tensor table")?;
    let offset = cursor.u64("tensor table")?;
    let quant = Quant::from_ggml(type_id).ok_or_else(|| ModelError::UnsupportedType {
        path: path.to_owned(),
        name: name.clone(),
        dtype: format!("GGUF type number {type_id}"),
    })?;
    // Rows are whole blocks; so is then the tensor.
    let length =
        quant.bytes_for(dims[0]).and_then(|_| quant.bytes_for(elements)).ok_or_else(|| {
            ModelError::corrupt(
                path,
                format!("rows of the tensor {name} are not whole {} blocks", quant.name()),
            )
        })?;
    let entry = TensorEntry { dims, quant, bytes: 0..length };
    Ok((name, entry, offset))
}

/// Moves an entry's byte range to its place in the file and checks that it lies there.
fn place(
    path: &Path,
    file_len: usize,
    name: &str,
    mut entry: TensorEntry,
    data: usize,
    offset: u64,
    alignment: usize,
) -> Result<TensorEntry> {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    if !offset.is_multiple_of(alignment) {
        return Err(ModelError::corrupt(
            path,
            format!("the tensor {name} is not aligned to {alignment} bytes"),
        ));
    }
    let start = data.checked_add(offset);
    let end = start.and_then(|s| s.checked_add(entry.bytes.end));
    match (start, end) {
        (Some(start), Some(end)) if end <= file_len => {
            entry.bytes = start..end;
            Ok(entry)
        }
        _ => Err(ModelError::truncated(path, format!("tensor {name}"))),
    }
}
