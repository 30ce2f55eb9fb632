//! Bad model files: every one is an error with a sentence that names it, never a panic, never an
//! allocation that the file's size does not justify.

mod common;
#[path = "common/spoil.rs"]
mod spoil;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use common::tiny::Tiny;
use longsight::model::quant::Quant;
use longsight::model::{Arch, Checkpoint};
use serde_json::{Value, json};
use spoil::{Bench, assert_sane_allocations, complaint, load};

/// A file whose bytes can be changed in place.
struct Patch {
    file: File,
    bytes: Vec<u8>,
}

impl Patch {
    fn new(path: &Path) -> Patch {
        Patch {
            file: OpenOptions::new().write(true).open(path).unwrap(),
            bytes: fs::read(path).unwrap(),
        }
    }

    /// Runs `f` with `new` at `at`, then puts the old bytes back.
    fn with<T>(&mut self, at: usize, new: &[u8], f: impl FnOnce() -> T) -> T {
        self.put(at, new);
        let result = f();
        let old = self.bytes[at..at + new.len()].to_vec();
        self.put(at, &old);
        result
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.file.seek(SeekFrom::Start(at as u64)).unwrap();
        self.file.write_all(bytes).unwrap();
    }

    fn find(&self, text: &str) -> usize {
        let found = self.bytes.windows(text.len()).position(|w| w == text.as_bytes());
        found.unwrap()
    }
}

#[test]
fn missing_files_are_named() {
    let bench = Bench::new();
    complaint(&bench.dir.path().join("nowhere.gguf"), "nowhere.gguf");
    let empty = bench.dir.path().join("empty-folder");
    fs::create_dir(&empty).unwrap();
    complaint(&empty, "config.json");
    for (file, named) in [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("tokenizer.json", "tokenizer"),
    ] {
        let folder = bench.folder();
        fs::remove_file(folder.join(file)).unwrap();
        complaint(&folder, named);
    }
    let shards = bench.dir.path().join("shards");
    Tiny::new(Arch::Llama, true, 5).write_hf(&shards, Quant::F32, 3);
    let shard = "model-00002-of-00003.safetensors";
    fs::remove_file(shards.join(shard)).unwrap();
    complaint(&shards, shard);
}

#[test]
fn empty_files_are_named() {
    let bench = Bench::new();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let folder = bench.folder();
        fs::write(folder.join(file), "").unwrap();
        complaint(&folder, file);
    }
    let (gguf, _) = bench.gguf();
    fs::write(&gguf, "").unwrap();
    assert!(complaint(&gguf, "tiny.gguf").contains("empty"));
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let bench = Bench::new();
    let folder = bench.folder();
    let (gguf, data) = bench.gguf();
    let weights = folder.join("model.safetensors");
    let header = 8 + {
        let bytes = fs::read(&weights).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
    };
    for (open, file, name, header) in
        [(&folder, &weights, "model.safetensors", header), (&gguf, &gguf, "tiny.gguf", data)]
    {
        let whole = fs::metadata(file).unwrap().len() as usize;
        let within = (0..header).step_by(17);
        let beyond = (header..whole).step_by(4099).chain([whole - 1]);
        let mut lengths: Vec<usize> = within.chain(beyond).collect();
        lengths.sort_by(|a, b| b.cmp(a));
        for length in lengths {
            let handle = OpenOptions::new().write(true).open(file).unwrap();
            handle.set_len(length as u64).unwrap();
            complaint(open, name);
        }
    }
    for file in ["config.json", "tokenizer.json"] {
        let folder = bench.folder();
        let text = fs::read(folder.join(file)).unwrap();
        for length in (1..text.len()).step_by(97) {
            fs::write(folder.join(file), &text[..length]).unwrap();
            complaint(&folder, file);
        }
    }
}

/// Every byte of the headers, changed in several ways: some changes are harmless (a letter of
/// the model's name), none may panic or allocate much, every error names the file.
#[test]
fn flipped_header_bits_never_panic() {
    let bench = Bench::new();
    let folder = bench.folder();
    let (gguf, data) = bench.gguf();
    let cases = [
        (&gguf, gguf.clone(), "tiny.gguf", data),
        (&folder, folder.join("config.json"), "config.json", usize::MAX),
        (&folder, folder.join("model.safetensors"), "model.safetensors", 8192),
    ];
    for (open, file, name, end) in cases {
        let mut patch = Patch::new(&file);
        let mut refused = 0;
        for at in 0..patch.bytes.len().min(end) {
            for flip in [0x01, 0x08, 0x80, 0xff] {
                let byte = patch.bytes[at] ^ flip;
                // Using everything takes longest: once a byte is enough.
                let result = patch.with(at, &[byte], || match flip {
                    0x01 if end == data || end == usize::MAX => load(open),
                    _ => Checkpoint::open(open).map(drop),
                });
                if let Err(e) = result {
                    refused += 1;
                    let message = e.to_string();
                    // A lost tensor is the folder's problem, a lost tokenizer as well.
                    let named = message.contains(name) || message.contains("tiny-folder");
                    assert!(named, "{message:?} does not name {name} (byte {at})");
                }
            }
        }
        assert!(refused > 500, "{name}: only {refused} flips were refused");
    }
    assert_sane_allocations();
}

#[test]
fn lying_gguf_counts_and_offsets_are_refused() {
    let bench = Bench::new();
    let (gguf, _) = bench.gguf();
    let mut patch = Patch::new(&gguf);
    let lie = |patch: &mut Patch, at: usize, value: u64| {
        patch.with(at, &value.to_le_bytes(), || complaint(&gguf, "tiny.gguf"))
    };
    // Tensor count, metadata count, length of the first key.
    for at in [8, 16, 24] {
        for value in [u64::MAX, 1 << 60, 1 << 32, 1 << 20] {
            lie(&mut patch, at, value);
        }
    }
    // The token array: kind (4), element kind (4), count (8).
    let tokens = patch.find("tokenizer.ggml.tokens") + "tokenizer.ggml.tokens".len();
    for value in [u64::MAX, 1 << 60, 1 << 33] {
        lie(&mut patch, tokens + 8, value);
    }
    // A tensor entry after its name: dimension count (4), two dimensions (16), type (4), offset.
    let entry = patch.find("blk.0.attn_q.weight") + "blk.0.attn_q.weight".len();
    for value in [u64::MAX, 1 << 63, 1 << 33, 0] {
        lie(&mut patch, entry + 4, value);
        lie(&mut patch, entry + 12, value);
    }
    for value in [u64::MAX, u64::MAX - 31, 1 << 40, 1] {
        lie(&mut patch, entry + 24, value);
    }
    patch.with(entry, &u32::MAX.to_le_bytes(), || complaint(&gguf, "tiny.gguf"));
    let message = patch.with(entry + 20, &23u32.to_le_bytes(), || complaint(&gguf, "tiny.gguf"));
    assert!(message.contains("23"), "{message}");
    load(&gguf).unwrap();
    assert_sane_allocations();
}

/// Writes a safetensors header over the folder's weights.
fn with_header(folder: &Path, header: &str, length: u64) {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 64]);
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn lying_safetensors_headers_are_refused() {
    let bench = Bench::new();
    let folder = bench.folder();
    for length in [u64::MAX, u64::MAX - 7, 1 << 62, 1 << 33, 3] {
        with_header(&folder, "{}", length);
        complaint(&folder, "model.safetensors");
    }
    let tensor = |name: &str, shape: Value, offsets: Value| {
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets});
        json!({name: entry}).to_string()
    };
    let name = "model.embed_tokens.weight";
    for (shape, offsets) in [
        (json!([260, 64]), json!([0, 33_280])),
        (json!([260, 64]), json!([0, 64])),
        (json!([260, 64]), json!([64, 0])),
        (json!([260, 64]), json!([u64::MAX - 33_280, u64::MAX])),
        (json!([u64::MAX, u64::MAX]), json!([0, 64])),
        (json!([1u64 << 63, 2]), json!([0, u64::MAX])),
        (json!([-1]), json!([0, 64])),
        (json!([4, 4, 2]), json!([0, 64])),
    ] {
        let header = tensor(name, shape, offsets);
        with_header(&folder, &header, header.len() as u64);
        complaint(&folder, "model.safetensors");
    }
    for text in ["", "[]", "{\"a\":1}", "{\"a\":{}}", "\u{1}\u{2}", "{"] {
        with_header(&folder, text, text.len() as u64);
        complaint(&folder, "model.safetensors");
    }
    // A type that is no weight type; a complete file without the tensors.
    let header = tensor(name, json!([260, 64]), json!([0, 0])).replace("BF16", "I64");
    with_header(&folder, &header, header.len() as u64);
    assert!(complaint(&folder, "model.safetensors").contains("I64"));
    with_header(&folder, "{}", 2);
    assert!(complaint(&folder, "tiny-folder").contains(name));
}

#[test]
fn an_index_cannot_point_outside_its_folder() {
    let bench = Bench::new();
    let folder = bench.dir.path().join("shards");
    Tiny::new(Arch::Llama, true, 5).write_hf(&folder, Quant::F32, 2);
    let index = "model.safetensors.index.json";
    for name in ["../x.safetensors", "/etc/hostname", "", "a/b.safetensors"] {
        let text = json!({"weight_map": {"model.norm.weight": name}}).to_string();
        fs::write(folder.join(index), text).unwrap();
        complaint(&folder, index);
    }
    fs::write(folder.join(index), "{}").unwrap();
    complaint(&folder, index);
}
