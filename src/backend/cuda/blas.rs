//! Large matrix products through cuBLASLt, where it is installed.

use super::error::Said;
use super::memory::Memory;
use super::options::switched_off;
use crate::backend::{BackendError, DType, Result};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::CudaStream;
use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::catch_unwind;
use std::sync::{Arc, Mutex};

/// What NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// One product `y[rows, outputs] = x[rows, inputs] w[outputs, inputs]^T`, plus the old `y` when `accumulate`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Product {
    /// dtype of `x` and `w`.
    pub input: DType,
    /// dtype of `y`.
    pub output: DType,
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub accumulate: bool,
}

impl Product {
    /// Of w, x and y. Row-major y[rows, outputs] is column-major outputs x rows: w transposed times x.
    fn layouts(self) -> Result<[Layout; 3]> {
        let (m, n, k) = (self.outputs as u64, self.rows as u64, self.inputs as u64);
        Ok([
            Layout::new(self.input, k, m)?,
            Layout::new(self.input, k, n)?,
            Layout::new(self.output, m, n)?,
        ])
    }
}

/// A cuBLASLt handle, its workspace, and the algorithms chosen so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    /// Locked while a product is recorded: one of several kernels keeps its partial sums there, and another
    /// thread's product must not come between them.
    workspace: Mutex<Option<Memory>>,
    /// None: cuBLASLt has nothing for this product.
    chosen: Mutex<HashMap<Product, Option<sys::cublasLtMatmulAlgo_t>>>,
}

// SAFETY: cuBLASLt handles may be used from any thread; the algorithms are plain data behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// A product that cuBLASLt was to run and cannot: [`Blas::takes`] was not asked.
pub(super) fn missing() -> BackendError {
    let what = "cuBLASLt has no kernel for this product".into();
    BackendError::Unsupported { op: "linear", backend: "cuda", what }
}

impl Blas {
    /// None when the library is missing, does not start, or `LONGSIGHT_CUBLAS=off`.
    pub fn open(stream: &Arc<CudaStream>) -> Option<Self> {
        if switched_off("LONGSIGHT_CUBLAS") {
            return None;
        }
        let handle = catch_unwind(|| {
            // SAFETY: only tries to load the library by name.
            if !unsafe { sys::is_culib_present() } {
                return None;
            }
            result::create_handle().ok()
        });
        let handle = handle.ok().flatten()?;
        // Without room for it, algorithms that need none are chosen.
        let workspace = Memory::new(stream, WORKSPACE, "the cuBLASLt workspace").ok();
        Some(Blas { handle, workspace: Mutex::new(workspace), chosen: Mutex::default() })
    }

    /// cuBLASLt has an algorithm for the product.
    pub fn takes(&self, p: Product) -> Result<bool> {
        let known = self.chosen.lock().unwrap_or_else(|e| e.into_inner()).get(&p).copied();
        if let Some(algo) = known {
            return Ok(algo.is_some());
        }
        let (desc, [a, b, d]) = (Desc::new()?, p.layouts()?);
        let workspace = self.workspace.lock().unwrap_or_else(|e| e.into_inner());
        let bytes = workspace.as_ref().map_or(0, |_| WORKSPACE);
        Ok(self.algorithm(p, bytes, &desc, [&a, &b, &d])?.is_some())
    }

    /// Records a product that it [takes](Blas::takes).
    ///
    /// # Safety
    /// The addresses must hold `x`, `w` and `y` of the product's shapes.
    pub unsafe fn run(
        &self,
        stream: &CudaStream,
        p: Product,
        x: u64,
        w: u64,
        y: u64,
    ) -> Result<()> {
        stream.context().bind_to_thread().said("binding the context")?;
        let (desc, [a, b, d]) = (Desc::new()?, p.layouts()?);
        let workspace = self.workspace.lock().unwrap_or_else(|e| e.into_inner());
        let (space, bytes) = workspace.as_ref().map_or((0, 0), |w| (w.ptr(), WORKSPACE));
        let algo = self.algorithm(p, bytes, &desc, [&a, &b, &d])?.ok_or_else(missing)?;
        let (alpha, beta) = (1.0f32, if p.accumulate { 1.0f32 } else { 0.0 });
        // SAFETY: descriptors live until the end of this call, which copies what it needs; the rest is the
        // caller's promise.
        unsafe {
            result::matmul(
                self.handle,
                desc.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                w as *const c_void,
                a.0,
                x as *const c_void,
                b.0,
                y as *const c_void,
                d.0,
                y as *mut c_void,
                d.0,
                &raw const algo,
                space as *mut c_void,
                bytes,
                stream.cu_stream().cast(),
            )
        }
        .said("a matrix product")
    }

    fn algorithm(
        &self,
        p: Product,
        workspace: usize,
        desc: &Desc,
        [a, b, d]: [&Layout; 3],
    ) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
        let mut chosen = self.chosen.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(algo) = chosen.get(&p) {
            return Ok(*algo);
        }
        let pref = Preference::new(workspace)?;
        // SAFETY: all descriptors are live.
        let found = unsafe {
            result::get_matmul_algo_heuristic(self.handle, desc.0, a.0, b.0, d.0, d.0, pref.0)
        };
        let algo = found.ok().map(|f| f.algo);
        chosen.insert(p, algo);
        Ok(algo)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: created in `open`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A column-major matrix without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DType, rows: u64, cols: u64) -> Result<Self> {
        let kind = match dtype {
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
            _ => sys::cudaDataType_t::CUDA_R_32F,
        };
        let made = result::create_matrix_layout(kind, rows, cols, rows as i64);
        Ok(Layout(made.said("describing a matrix")?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// The operation: first operand transposed, f32 sums.
struct Desc(sys::cublasLtMatmulDesc_t);

impl Desc {
    fn new() -> Result<Self> {
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        let made = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32);
        let desc = Desc(made.said("describing a product")?);
        // CUBLAS_OP_T of cublasOperation_t.
        let transposed: i32 = 1;
        let name = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute is an i32, which outlives the call.
        unsafe {
            result::set_matmul_desc_attribute(desc.0, name, (&raw const transposed).cast(), 4)
        }
        .said("describing a product")?;
        Ok(desc)
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(workspace: usize) -> Result<Self> {
        let pref = Preference(result::create_matmul_pref().said("asking for an algorithm")?);
        let name =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = workspace as u64;
        // SAFETY: the attribute is a u64, which outlives the call.
        unsafe { result::set_matmul_pref_attribute(pref.0, name, (&raw const bytes).cast(), 8) }
            .said("asking for an algorithm")?;
        Ok(pref)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
