//! Named arrays with a few words about them, as a safetensors file that is complete or not there.

use crate::files::write_atomic;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

/// Numbers of one array.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Numbers {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// The contents of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct TensorFile {
    /// Words about the file.
    pub about: BTreeMap<String, String>,
    /// Shape and numbers by name.
    pub tensors: BTreeMap<String, (Vec<usize>, Numbers)>,
}

fn invalid(e: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e.to_string())
}

impl TensorFile {
    /// What the file says under `key`; nothing where it says nothing.
    pub fn word(&self, key: &str) -> &str {
        self.about.get(key).map_or("", String::as_str)
    }

    /// Adds an array of one dimension.
    pub fn f64s(&mut self, name: &str, numbers: Vec<f64>) {
        self.tensors.insert(name.into(), (vec![numbers.len()], Numbers::F64(numbers)));
    }

    /// Adds an array; its shape must fit.
    pub fn f32s(&mut self, name: &str, shape: Vec<usize>, numbers: Vec<f32>) {
        self.tensors.insert(name.into(), (shape, Numbers::F32(numbers)));
    }

    /// Takes an array of `len` f64.
    pub fn take_f64s(&mut self, name: &str, len: usize) -> Option<Vec<f64>> {
        match self.tensors.remove(name)?.1 {
            Numbers::F64(n) if n.len() == len => Some(n),
            _ => None,
        }
    }

    /// Takes an f32 array of `len` numbers.
    pub fn take_f32s(&mut self, name: &str, len: usize) -> Option<Vec<f32>> {
        match self.tensors.remove(name)?.1 {
            Numbers::F32(n) if n.len() == len => Some(n),
            _ => None,
        }
    }

    /// Writes the file.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut views = Vec::with_capacity(self.tensors.len());
        for (name, (shape, numbers)) in &self.tensors {
            let (dtype, bytes) = match numbers {
                Numbers::F32(n) => (Dtype::F32, bytemuck::cast_slice::<f32, u8>(n)),
                Numbers::F64(n) => (Dtype::F64, bytemuck::cast_slice::<f64, u8>(n)),
            };
            views.push((name, TensorView::new(dtype, shape.clone(), bytes).map_err(invalid)?));
        }
        let about: HashMap<String, String> = self.about.clone().into_iter().collect();
        write_atomic(path, &serialize(views, Some(about)).map_err(invalid)?)
    }

    /// Reads a file; `None` when there is none.
    pub fn load(path: &Path) -> io::Result<Option<TensorFile>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(invalid)?;
        let about = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let mut file = TensorFile { about, ..TensorFile::default() };
        for (name, view) in SafeTensors::deserialize(&bytes).map_err(invalid)?.tensors() {
            // Bytes of a file are aligned to nothing, so numbers are collected one by one.
            let numbers = match view.dtype() {
                Dtype::F32 => {
                    let words = view.data().as_chunks().0;
                    Numbers::F32(words.iter().map(|&w| f32::from_le_bytes(w)).collect())
                }
                Dtype::F64 => {
                    let words = view.data().as_chunks().0;
                    Numbers::F64(words.iter().map(|&w| f64::from_le_bytes(w)).collect())
                }
                other => return Err(invalid(format!("array {name} is {other:?}, not f32 or f64"))),
            };
            file.tensors.insert(name, (view.shape().to_vec(), numbers));
        }
        Ok(Some(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_bit_for_bit_and_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        assert!(TensorFile::load(&path).unwrap().is_none());
        let mut file = TensorFile::default();
        file.about.insert("model".into(), "x".into());
        file.f64s("sums", vec![0.1, f64::MIN_POSITIVE, -0.0]);
        file.f32s("w", vec![2, 1], vec![1.5, -2.0]);
        file.save(&path).unwrap();
        let mut back = TensorFile::load(&path).unwrap().unwrap();
        assert_eq!(back, file);
        assert_eq!(back.take_f64s("sums", 2), None);
        assert_eq!(back.take_f32s("w", 2), Some(vec![1.5, -2.0]));
        let bytes = std::fs::read(&path).unwrap();
        for cut in [0, 7, 20, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(TensorFile::load(&path).is_err(), "{cut} bytes");
        }
    }
}
