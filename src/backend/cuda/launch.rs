//! Kernel modules, entry points and launches.

use super::driver::Limits;
use super::error::Said;
use super::nvrtc;
use crate::backend::{BackendError, Result};
use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, sys};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};

/// One op's kernels: CUDA source without includes, and machine code where nvcc was there at build time.
pub(super) struct Source {
    pub op: &'static str,
    pub text: &'static str,
    pub fatbin: Option<&'static [u8]>,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Shared memory that a block may use without opting in.
const PLAIN_SHARED: usize = 48 << 10;
/// Largest y and z of a grid.
const GRID_YZ: usize = 65_535;

/// Kernel arguments by value, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Args {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Args {
    pub fn new() -> Self {
        Args::default()
    }
    /// Appends one argument; `T` has the layout of the kernel's parameter. The driver copies it to where the kernel wants it:
    /// alignment does not matter here.
    pub fn with<T: Pod>(mut self, value: T) -> Self {
        self.starts.push(self.words.len());
        let bytes = bytemuck::bytes_of(&value);
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.words.push(u64::from_ne_bytes(word));
        }
        self
    }
}

/// Grid, block, dynamic shared memory (bytes) and cluster (neighbours in x) of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub grid: [usize; 3],
    pub block: usize,
    pub shared: usize,
    pub cluster: usize,
}

impl Shape {
    pub fn new(grid: [usize; 3], block: usize) -> Self {
        Shape { grid, block, shared: 0, cluster: 1 }
    }
    pub fn shared(self, bytes: usize) -> Self {
        Shape { shared: bytes, ..self }
    }
    /// Clusters of `blocks` (at most 8, dividing the grid's x); more than 1 only where `Limits::cluster` allows.
    pub fn cluster(self, blocks: usize) -> Self {
        Shape { cluster: blocks, ..self }
    }
}

/// Loads modules and entry points at first use and keeps them.
pub(super) struct Kernels {
    ctx: Arc<CudaContext>,
    limits: Limits,
    /// Blocks of a kernel may be placed while the kernel before still runs; see `depend` of `common.cuh`.
    overlap: bool,
    modules: Mutex<HashMap<&'static str, Arc<CudaModule>>>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    /// Clusters that run at once, by kernel and (block, shared memory, cluster).
    clusters: Mutex<HashMap<String, HashMap<[usize; 3], usize>>>,
}

/// A poisoned lock only says that another thread panicked; what is behind it stays valid.
pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// The driver found nothing to run in a fatbin, nor could make anything of its PTX: NVRTC can. After any other error (no
/// memory, a fault of an earlier kernel) it would not help.
fn no_code(e: sys::CUresult) -> bool {
    use sys::CUresult::*;
    matches!(
        e,
        CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUDA_ERROR_INVALID_IMAGE
            | CUDA_ERROR_INVALID_PTX
            | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUDA_ERROR_JIT_COMPILATION_DISABLED
    )
}

impl Kernels {
    /// Without `overlap` every kernel runs after the one before.
    pub fn new(ctx: Arc<CudaContext>, limits: Limits, overlap: bool) -> Self {
        Kernels {
            ctx,
            limits,
            overlap: limits.cc == (9, 0) && overlap,
            modules: Mutex::default(),
            functions: Mutex::default(),
            clusters: Mutex::default(),
        }
    }

    fn module(&self, op: &'static str) -> Result<Arc<CudaModule>> {
        if let Some(m) = lock(&self.modules).get(op) {
            return Ok(m.clone());
        }
        let source = SOURCES.iter().find(|s| s.op == op).ok_or_else(|| BackendError::Compile {
            backend: "cuda",
            kernel: op.into(),
            reason: "no such kernel file in this build".into(),
        })?;
        let embedded = source.fatbin.map(|f| self.ctx.load_module(Ptx::from_binary(f.to_vec())));
        let loaded = match embedded {
            Some(Err(e)) if no_code(e.0) => None,
            loaded => loaded,
        };
        let loaded = match loaded {
            Some(loaded) => loaded,
            // No machine code for this GPU in the fatbin, or none at all: compile for it now.
            None => {
                let cubin = nvrtc::cubin(source, self.limits.cc)?;
                self.ctx.load_module(Ptx::from_binary(cubin))
            }
        };
        let module = loaded.said(&format!("loading the kernels of {op}"))?;
        lock(&self.modules).insert(op, module.clone());
        Ok(module)
    }

    fn function(&self, op: &'static str, entry: &str) -> Result<CudaFunction> {
        if let Some(f) = lock(&self.functions).get(entry) {
            return Ok(f.clone());
        }
        let f = self.module(op)?.load_function(entry).said(&format!("kernel {entry} of {op}"))?;
        let fixed = f.shared_size_bytes().said("reading a kernel's shared memory")?.max(0) as usize;
        let most = self.limits.shared.saturating_sub(fixed);
        if most > PLAIN_SHARED {
            let name = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            f.set_attribute(name, most as i32).said("raising a kernel's shared memory")?;
        }
        lock(&self.functions).insert(entry.to_string(), f.clone());
        Ok(f)
    }

    /// Clusters of this shape that the device holds at once; 0 where the driver cannot say.
    pub fn clusters(
        &self,
        stream: &CudaStream,
        op: &'static str,
        entry: &str,
        shape: Shape,
    ) -> Result<usize> {
        let key = [shape.block, shape.shared, shape.cluster];
        if let Some(n) = lock(&self.clusters).get(entry).and_then(|of| of.get(&key)) {
            return Ok(*n);
        }
        let f = self.function(op, entry)?;
        self.ctx.bind_to_thread().said("binding the context")?;
        let mut attributes = [cluster_attribute(shape.cluster)];
        let config = config(shape, stream, &mut attributes);
        let mut n = 0;
        // SAFETY: the function's module is kept by `f`; the driver reads the configuration and writes `n`.
        let counted =
            unsafe { sys::cuOccupancyMaxActiveClusters(&mut n, f.cu_function(), &config) };
        let n = if counted.result().is_ok() { n.max(0) as usize } else { 0 };
        lock(&self.clusters).entry(entry.to_string()).or_default().insert(key, n);
        Ok(n)
    }

    /// Launches `entry` of `kernels/<op>.cu` on `stream`. An empty grid launches nothing.
    ///
    /// # Safety
    /// `args` must match the kernel's parameters, and the device memory that they point to must be large
    /// enough for the shapes in them (the op's `check`) and live until the stream has run the kernel.
    pub unsafe fn launch(
        &self,
        stream: &CudaStream,
        op: &'static str,
        entry: &str,
        shape: Shape,
        args: &Args,
    ) -> Result<()> {
        let Shape { grid, shared, cluster, .. } = shape;
        if grid.contains(&0) {
            return Ok(());
        }
        let fits = grid[0] <= i32::MAX as usize && grid[1] <= GRID_YZ && grid[2] <= GRID_YZ;
        if !fits {
            return Err(BackendError::BadArgument {
                op,
                reason: format!("a grid of {grid:?} blocks is too large; use a smaller batch"),
            });
        }
        if shared > self.limits.shared {
            return Err(BackendError::Unsupported {
                op,
                backend: "cuda",
                what: format!(
                    "{entry} on this GPU: it needs {shared} bytes of shared memory, a block has {}",
                    self.limits.shared
                ),
            });
        }
        let f = self.function(op, entry)?;
        self.ctx.bind_to_thread().said("binding the context")?;
        // The driver only reads them.
        let mut pointers: Vec<*mut c_void> = args
            .starts
            .iter()
            .map(|i| std::ptr::from_ref(&args.words[*i]).cast_mut().cast())
            .collect();
        let mut attributes = Vec::with_capacity(2);
        if cluster > 1 {
            attributes.push(cluster_attribute(cluster));
        }
        if self.overlap {
            attributes.push(sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            });
        }
        let config = config(shape, stream, &mut attributes);
        let none = std::ptr::null_mut();
        // SAFETY: the function's module is kept by `f`; the configuration and the pointers into `args` outlive the
        // call, which copies them; the rest is the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, f.cu_function(), pointers.as_mut_ptr(), none) }
            .result()
            .said(&format!("launching {entry}"))
    }
}

fn cluster_attribute(blocks: usize) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: blocks as u32,
                y: 1,
                z: 1,
            },
        },
    }
}

/// Points to `attributes`.
fn config(
    shape: Shape,
    stream: &CudaStream,
    attributes: &mut [sys::CUlaunchAttribute],
) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: shape.grid[0] as u32,
        gridDimY: shape.grid[1] as u32,
        gridDimZ: shape.grid[2] as u32,
        blockDimX: shape.block as u32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shape.shared as u32,
        hStream: stream.cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

/// The kernels of `op` hold `line`: what both languages must agree on.
#[cfg(test)]
pub(super) fn holds(op: &str, line: &str) {
    let source = SOURCES.iter().find(|s| s.op == op).unwrap_or_else(|| panic!("no {op}.cu"));
    assert!(source.text.contains(line), "{op}.cu does not hold: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn args_keep_order_and_bytes() {
        let a = Args::new().with(7u32).with([1u64, 2]).with(0.5f32);
        assert_eq!(a.starts, [0, 1, 3]);
        assert_eq!(a.words[1..3], [1, 2]);
        assert_eq!(a.words[0] as u32, 7);
        assert_eq!(f32::from_bits(a.words[3] as u32), 0.5);
    }

    #[test]
    fn only_missing_code_is_compiled() {
        use sys::CUresult::*;
        assert!(no_code(CUDA_ERROR_NO_BINARY_FOR_GPU) && no_code(CUDA_ERROR_INVALID_PTX));
        assert!(no_code(CUDA_ERROR_INVALID_IMAGE));
        assert!(!no_code(CUDA_ERROR_OUT_OF_MEMORY) && !no_code(CUDA_ERROR_ILLEGAL_ADDRESS));
    }

    #[test]
    fn no_kernel_spills_registers() {
        if PTXAS.is_empty() {
            println!("skipped: the kernels were not compiled with nvcc in this build");
            return;
        }
        for (op, log) in PTXAS {
            let mut entry = "";
            let mut seen = 0;
            for line in log.lines() {
                if line.contains("Compiling entry function") {
                    entry = line;
                }
                if line.contains("bytes spill stores") {
                    seen += 1;
                    let clean = line.contains(" 0 bytes spill stores, 0 bytes spill loads");
                    assert!(clean, "{op}: {entry}\n{line}");
                }
            }
            assert!(seen >= 2, "{op}: ptxas reported {seen} kernels for two architectures");
        }
    }

    /// The body of the function `name`, without comments.
    fn body(text: &str, name: &str) -> String {
        let head = text.lines().position(|l| {
            l.contains("DEVICE ") && l.contains(&format!(" {name}(")) && !l.starts_with(' ')
        });
        let head = head.unwrap_or_else(|| panic!("no function {name}"));
        let lines = text.lines().skip(head).take_while(|l| *l != "}");
        let code = lines.map(|l| l.split("//").next().unwrap_or_default());
        code.collect::<Vec<_>>().join("\n")
    }

    /// What an `early_` function does before it has waited for certain, or before it hands on to one of `WAITING`, leaves
    /// the kernel only by `depend()`.
    fn waits_later(text: &str, name: &str) -> bool {
        const WAITING: [(&str, &str); 2] =
            [("score_mma", "score_mma<"), ("read_keys", "read_keys<")];
        let code = body(text, name);
        let certain = code.find("\n    depend();").map(|at| (at, true));
        let handed = WAITING.iter().filter_map(|(f, call)| {
            let at = code.find(call)?;
            // It waits in the end if it has not before.
            Some((at, body(text, f).contains("\n    if (early) depend();")))
        });
        let Some((at, waits)) = certain.or(handed.min()) else { return false };
        waits && code[..at].split("return").skip(1).all(|rest| rest.starts_with(" depend();"))
    }

    #[test]
    fn every_kernel_waits_for_the_one_before() {
        for s in SOURCES {
            for entry in s.text.split("__global__").skip(1) {
                let body = entry.split_once('{').map_or("", |b| b.1);
                // Zeros in shared memory may come before it, and functions that wait themselves.
                let lines = body.split(['\n', '\\', ';']).map(str::trim).filter(|l| !l.is_empty());
                let first = lines.clone().find(|l| *l != "clear_histograms()").unwrap_or_default();
                let name = first.split(['<', '(']).next().unwrap_or_default();
                let waits = match name.starts_with("early_") {
                    true => waits_later(s.text, name),
                    false => first == "depend()",
                };
                assert!(waits, "{}: {:?} begins with {first}", s.op, entry.lines().next());
            }
        }
    }

    #[test]
    fn kernels_that_may_not_wait_are_seen() {
        let early =
            |code: &str| waits_later(&format!("DEVICE void early_x() {{\n{code}\n}}\n"), "early_x");
        assert!(early("    if (a) return depend();\n    depend();\n    if (b) return;"));
        assert!(!early("    if (a) return;\n    depend();"));
        assert!(!early("    if (a) depend();"));
        assert!(!early("    // depend();\n    // as\n    //depend();"));
    }

    #[test]
    fn sources_are_self_contained() {
        assert!(!SOURCES.is_empty());
        for s in SOURCES {
            assert!(!s.text.contains("#include"), "{}", s.op);
        }
    }
}
