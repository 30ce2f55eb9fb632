//! What a test of bad model files needs: good ones to spoil, and a judge of complaints.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use longsight::model::quant::Quant;
use longsight::model::{Arch, ChatTemplate, Checkpoint, ModelError, Tokenizer};

use crate::common::tiny::Tiny;

/// Remembers the largest allocation asked for.
struct Watching;
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; only the size is noted.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static WATCHING: Watching = Watching;

/// The files here have at most half a megabyte.
const SANE: usize = 32 << 20;

/// Opens a model and uses everything in it.
pub fn load(path: &Path) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(path)?;
    for weight in longsight::model::Weight::all(checkpoint.config()) {
        checkpoint.read(weight)?;
    }
    checkpoint.fingerprint();
    let tokenizer = Tokenizer::for_checkpoint(&checkpoint)?;
    let ids = tokenizer.encode("some text, \u{e9}\u{1f600}", true)?;
    tokenizer.decode(&ids);
    match ChatTemplate::for_checkpoint(&checkpoint, &tokenizer) {
        Ok(_) | Err(ModelError::NoTemplate | ModelError::Template { .. }) => Ok(()),
        Err(e) => Err(e),
    }
}

/// The error's message: a sentence that names `file`.
pub fn complaint(path: &Path, file: &str) -> String {
    let message = load(path).expect_err("a bad file was accepted").to_string();
    assert!(message.contains(file), "{message:?} does not name {file}");
    assert!(message.contains(' ') && message.len() > 30, "{message:?}");
    message
}

/// A temporary folder with good model files.
pub struct Bench {
    pub dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Bench {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    pub fn folder(&self) -> PathBuf {
        let path = self.dir.path().join("tiny-folder");
        Tiny::new(Arch::Qwen2, false, 5).write_hf(&path, Quant::BF16, 1);
        path
    }

    /// A GGUF file, and where its tensor data begins.
    pub fn gguf(&self) -> (PathBuf, usize) {
        let path = self.dir.path().join("tiny.gguf");
        let start = Tiny::new(Arch::Llama, false, 5).write_gguf(&path, Quant::Q8_0);
        (path, start)
    }
}

/// Fails when anything so far asked for more memory at once than these files justify.
pub fn assert_sane_allocations() {
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < SANE, "{largest} bytes were allocated at once");
}
