//! Compiling kernels at run time, with a cache of the results on disk.

use super::launch::Source;
use crate::backend::{BackendError, Result};
use crate::files::{cache_dir, hex, write_cached};
use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};
use std::ffi::{CStr, CString};
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

fn failed(kernel: &str, reason: impl Into<String>) -> BackendError {
    BackendError::Compile { backend: "cuda", kernel: kernel.into(), reason: reason.into() }
}

/// Architectures with instructions of their own are compiled for them (sm_90a), others plainly.
fn arch(cc: (i32, i32)) -> String {
    let own = if cc == (9, 0) { "a" } else { "" };
    format!("sm_{}{}{own}", cc.0, cc.1)
}

/// How kernels are compiled for `arch`; lambdas with types of their own count as device code.
fn options(arch: &str) -> [String; 3] {
    let arch = format!("--gpu-architecture={arch}");
    ["--std=c++17".to_string(), "-default-device".to_string(), arch]
}

/// NVRTC's version, or the sentence that says that it is not there.
fn version(kernel: &str) -> Result<(i32, i32)> {
    let probe = catch_unwind(|| {
        // SAFETY: only tries to load the library by name.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both integers outlive the call.
        unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
        Some((major, minor))
    });
    probe.ok().flatten().ok_or_else(|| {
        failed(
            kernel,
            "this build has no machine code for the GPU and NVRTC was not found (looked for \
             libnvrtc.so on the library path); install the CUDA toolkit's NVRTC, or build with nvcc \
             on the PATH or CUDA_HOME set",
        )
    })
}

/// Machine code of `source` for compute capability `cc`, from the cache where it is there.
pub(super) fn cubin(source: &Source, cc: (i32, i32)) -> Result<Vec<u8>> {
    let version = version(source.op)?;
    let arch = arch(cc);
    let options = options(&arch);
    let key = format!("{}\n{options:?}\n{version:?}", source.text);
    let hash: String = hex(&Sha256::digest(key));
    let name = format!("{}-{arch}-{}.cubin", source.op, &hash[..32]);
    let cached = cache_dir().map(|d| d.join("kernels").join(name));
    if let Some(bytes) = cached.as_deref().and_then(read) {
        return Ok(bytes);
    }
    let bytes = compile(source, &options)?;
    if let Some(path) = &cached {
        // A cache that cannot be written costs a compilation next time, nothing else.
        let _ = write_cached(path, &bytes);
    }
    Ok(bytes)
}

/// A cached file, if it is whole: cubins are ELF files.
fn read(path: &Path) -> Option<Vec<u8>> {
    fs::read(path).ok().filter(|b| b.starts_with(b"\x7fELF"))
}

fn compile(source: &Source, options: &[String]) -> Result<Vec<u8>> {
    let error = |e: result::NvrtcError| failed(source.op, format!("NVRTC says {e}"));
    let text = CString::new(source.text).map_err(|e| failed(source.op, e.to_string()))?;
    let name =
        CString::new(format!("{}.cu", source.op)).map_err(|e| failed(source.op, e.to_string()))?;
    let program = result::create_program(&text, Some(&name)).map_err(error)?;
    // SAFETY: `program` is live until destroy_program below; `text` and `name` outlive it.
    let compiled = unsafe { result::compile_program(program, options) };
    let bytes = match compiled {
        // SAFETY: as above.
        Err(e) => Err(failed(source.op, format!("NVRTC says {e}: {}", unsafe { log(program) }))),
        // SAFETY: as above, and the program is compiled.
        Ok(()) => unsafe { image(program) }.map_err(error),
    };
    // SAFETY: the last use of `program`.
    unsafe { result::destroy_program(program) }.map_err(error)?;
    bytes
}

/// # Safety
/// `program` must be live.
unsafe fn log(program: sys::nvrtcProgram) -> String {
    // SAFETY: the caller's promise.
    let Ok(mut text) = (unsafe { result::get_program_log(program) }) else { return String::new() };
    text.push(0);
    // SAFETY: ends in NUL and outlives the borrow.
    unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned()
}

/// # Safety
/// `program` must be live and compiled for a real architecture.
unsafe fn image(program: sys::nvrtcProgram) -> std::result::Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: the caller's promise; `size` outlives the call.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut size) }.result()?;
    let mut bytes = vec![0u8; size];
    // SAFETY: NVRTC writes exactly `size` bytes.
    unsafe { sys::nvrtcGetCUBIN(program, bytes.as_mut_ptr().cast()) }.result()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::launch::SOURCES;
    use super::*;

    /// The fallback path of machines whose GPU the fatbins do not cover must not rot.
    #[test]
    fn nvrtc_compiles_every_kernel() {
        if let Err(e) = version("any") {
            println!("skipped: {e}");
            return;
        }
        for source in SOURCES {
            let bytes = compile(source, &options("sm_80")).unwrap_or_else(|e| panic!("{e}"));
            assert!(bytes.starts_with(b"\x7fELF"), "{}", source.op);
        }
        // Hopper has kernels of its own.
        let source = SOURCES.iter().find(|s| s.op == "score_tiles").unwrap();
        let bytes = compile(source, &options("sm_90a")).unwrap_or_else(|e| panic!("{e}"));
        let name = b"score_tiles_wgmma_bf16_d128";
        assert!(bytes.windows(name.len()).any(|w| w == name));
    }

    #[test]
    fn broken_source_is_a_sentence() {
        if version("any").is_err() {
            println!("skipped: NVRTC is not on the library path");
            return;
        }
        let bad = Source { op: "bad", text: "__global__ void f( {", fatbin: None };
        let e = compile(&bad, &["--gpu-architecture=sm_80".to_string()]).unwrap_err();
        assert!(e.to_string().contains("bad.cu"), "{e}");
    }

    #[test]
    fn cache_files_are_whole_or_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.cubin");
        assert!(read(&path).is_none());
        write_cached(&path, b"\x7fELF123").unwrap();
        assert_eq!(read(&path).unwrap(), b"\x7fELF123");
        std::fs::write(&path, b"cut").unwrap();
        assert!(read(&path).is_none());
    }
}
