//! Writes small GGUF files (version 3) for tests.

use std::path::Path;

use longsight::model::quant::Quant;

/// A metadata value.
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A tensor: dimensions as GGUF lists them (the fastest first), type, bytes.
pub struct Tensor {
    pub name: String,
    pub dims: Vec<usize>,
    pub quant: Quant,
    pub bytes: Vec<u8>,
}

const ALIGNMENT: usize = 32;

fn ggml_id(quant: Quant) -> u32 {
    (0..64).find(|&id| Quant::from_ggml(id) == Some(quant)).unwrap()
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put_array_head(out: &mut Vec<u8>, kind: u32, len: usize) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}

fn put_meta(out: &mut Vec<u8>, value: &Meta) {
    match value {
        Meta::U32(v) => {
            out.extend(4u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        Meta::F32(v) => {
            out.extend(6u32.to_le_bytes());
            out.extend(v.to_le_bytes());
        }
        Meta::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*v));
        }
        Meta::Str(v) => {
            out.extend(8u32.to_le_bytes());
            put_str(out, v);
        }
        Meta::Strs(list) => {
            put_array_head(out, 8, list.len());
            list.iter().for_each(|s| put_str(out, s));
        }
        Meta::I32s(list) => {
            put_array_head(out, 5, list.len());
            list.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        Meta::F32s(list) => {
            put_array_head(out, 6, list.len());
            list.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
    }
}

/// The file's bytes and where its tensor data begins.
pub fn encode(metadata: &[(&str, Meta)], tensors: &[Tensor]) -> (Vec<u8>, usize) {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_str(&mut out, key);
        put_meta(&mut out, value);
    }
    let mut offset = 0usize;
    for t in tensors {
        put_str(&mut out, &t.name);
        out.extend((t.dims.len() as u32).to_le_bytes());
        t.dims.iter().for_each(|&d| out.extend((d as u64).to_le_bytes()));
        out.extend(ggml_id(t.quant).to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += t.bytes.len().next_multiple_of(ALIGNMENT);
    }
    let mut start = 0;
    for (i, t) in tensors.iter().enumerate() {
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        if i == 0 {
            start = out.len();
        }
        out.extend(&t.bytes);
    }
    (out, start)
}

/// Writes a file; returns where its tensor data begins.
pub fn write(path: &Path, metadata: &[(&str, Meta)], tensors: &[Tensor]) -> usize {
    let (bytes, start) = encode(metadata, tensors);
    std::fs::write(path, bytes).unwrap();
    start
}
