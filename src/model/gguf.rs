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
use super::gguf_cursor::{Cursor, Kind, Value};
use super::mapped::Mapped;
use super::quant::Quant;

const MAX_DIMS: u32 = 4;
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
