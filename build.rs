//! Compiles `kernels/*.cu` with nvcc where there is one, and embeds sources and fatbins.
//!
//! `LONGSIGHT_NVCC=off` skips nvcc. Without it the embedded sources are compiled by NVRTC at first use.

use std::collections::HashSet;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const FLAGS: [&str; 10] = [
    "-O3",
    "--std=c++17",
    "-Xptxas",
    "-v",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--fatbin",
    "-I",
    "kernels",
    "-o",
];
/// nvcc processes at a time.
const JOBS: usize = 2;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["LONGSIGHT_NVCC", "NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_else(|| fail("OUT_DIR is not set")));
    let mut ops: Vec<String> = fs::read_dir("kernels")
        .unwrap_or_else(|e| fail(&format!("kernels/: {e}")))
        .filter_map(|f| {
            f.ok()?.file_name().into_string().ok()?.strip_suffix(".cu").map(String::from)
        })
        .collect();
    ops.sort();
    for op in &ops {
        let mut text = String::new();
        inline(&format!("{op}.cu"), &mut HashSet::new(), &mut text);
        write(&out.join(format!("{op}.inlined.cu")), &text);
    }
    let nvcc = find_nvcc();
    if let Some(nvcc) = &nvcc {
        compile_all(nvcc, &ops, &out);
    }
    write(&out.join("kernels.rs"), &table(&ops, nvcc.is_some(), &out));
}

fn fail(message: &str) -> ! {
    eprintln!("build.rs: {message}");
    std::process::exit(1)
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())));
}

/// Appends `file` to `text`, each `#include "..."` replaced by that file's text at its first mention.
fn inline(file: &str, seen: &mut HashSet<String>, text: &mut String) {
    if !seen.insert(file.to_string()) {
        return;
    }
    let path = Path::new("kernels").join(file);
    let source =
        fs::read_to_string(&path).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())));
    for line in source.lines() {
        match line.strip_prefix("#include \"").and_then(|l| l.strip_suffix('"')) {
            Some(name) => inline(name, seen, text),
            None if line == "#pragma once" => {}
            None => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
}

fn find_nvcc() -> Option<PathBuf> {
    if env::var("LONGSIGHT_NVCC").is_ok_and(|v| v == "off") {
        return None;
    }
    let exe = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let homes = homes.chain([PathBuf::from("/usr/local/cuda")]).map(|h| h.join("bin").join(&exe));
    let path = env::var_os("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = env::split_paths(&path).map(|d| d.join(&exe)).collect();
    let named = env::var_os("NVCC").map(PathBuf::from);
    named.into_iter().chain(homes).chain(path).find(|p| p.is_file())
}

fn compile_all(nvcc: &Path, ops: &[String], out: &Path) {
    let version = Command::new(nvcc).arg("--version").output();
    let version = version.unwrap_or_else(|e| fail(&format!("{}: {e}", nvcc.display())));
    let left = Mutex::new(ops.iter());
    std::thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap_or_else(|e| e.into_inner()).next();
                    let Some(op) = next else { break };
                    compile(nvcc, &version.stdout, op, out);
                }
            });
        }
    });
}

/// Compiles one op, or takes what an earlier build in this target directory made of the same source, flags
/// and nvcc: cargo gives every change of Cargo.toml a new OUT_DIR, and the kernels take minutes.
fn compile(nvcc: &Path, version: &[u8], op: &str, out: &Path) {
    let made = |end: &str| out.join(format!("{op}.{end}"));
    let mut hash = DefaultHasher::new();
    (fs::read(made("inlined.cu")).ok(), FLAGS, nvcc, version).hash(&mut hash);
    let cache = out.join("../../longsight-kernels");
    let kept = |end: &str| cache.join(format!("{op}-{:016x}.{end}", hash.finish()));
    // The log is written last: where it is, the fatbin is whole.
    if !kept("ptxas").is_file() {
        let source = format!("kernels/{op}.cu");
        let run = Command::new(nvcc).args(FLAGS).arg(made("fatbin")).arg(&source).output();
        let run = run.unwrap_or_else(|e| fail(&format!("{}: {e}", nvcc.display())));
        let log = String::from_utf8_lossy(&run.stderr);
        for line in log.lines().filter(|l| l.contains("warning")) {
            println!("cargo:warning={line}");
        }
        if !run.status.success() {
            let said = String::from_utf8_lossy(&run.stdout);
            fail(&format!(
                "nvcc could not compile {source} (set LONGSIGHT_NVCC=off to build without nvcc):\n{said}{log}"
            ));
        }
        fs::create_dir_all(&cache).unwrap_or_else(|e| fail(&format!("{}: {e}", cache.display())));
        copy(&made("fatbin"), &kept("fatbin"));
        write(&kept("ptxas"), &log);
    }
    copy(&kept("fatbin"), &made("fatbin"));
    copy(&kept("ptxas"), &made("ptxas"));
}

fn copy(from: &Path, to: &Path) {
    if let Err(e) = fs::copy(from, to) {
        fail(&format!("{} to {}: {e}", from.display(), to.display()));
    }
}

fn table(ops: &[String], compiled: bool, out: &Path) -> String {
    let mut text = String::from("pub(super) static SOURCES: &[Source] = &[\n");
    for op in ops {
        let file = |end: &str| out.join(format!("{op}.{end}")).display().to_string();
        let fatbin = match compiled {
            true => format!("Some(include_bytes!({:?}))", file("fatbin")),
            false => "None".to_string(),
        };
        let _ = writeln!(
            text,
            "    Source {{ op: {op:?}, text: include_str!({:?}), fatbin: {fatbin} }},",
            file("inlined.cu")
        );
    }
    text.push_str("];\n\n/// What ptxas said about each op; empty without nvcc.\n#[cfg(test)]\n");
    text.push_str("static PTXAS: &[(&str, &str)] = &[\n");
    for op in ops.iter().filter(|_| compiled) {
        let file = out.join(format!("{op}.ptxas")).display().to_string();
        let _ = writeln!(text, "    ({op:?}, include_str!({file:?})),");
    }
    text.push_str("];\n");
    text
}
