//! Device memory, pinned staging and copies.

use super::clock::{self, timed};
use super::error::Said;
use super::replay;
use crate::backend::{BackendError, DType, DeviceBuffer, Result, Tensor};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use std::any::Any;
use std::sync::Arc;

/// Smallest allocation: an empty tensor still has an address.
const LEAST: usize = 256;

/// Device memory of one tensor; freed when the last view is gone.
pub(super) struct Memory {
    stream: Arc<CudaStream>,
    ptr: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer for Memory {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !replay::free_later(&self.stream, self.ptr) {
            Memory::free(&self.stream, self.ptr);
        }
    }
}

impl Memory {
    /// Frees the address of a dropped [`Memory`].
    pub fn free(stream: &CudaStream, ptr: sys::CUdeviceptr) {
        // Kernels may still use it. Errors show at the next call; nothing can be done about them here.
        let _ = stream.synchronize();
        let _ = stream.context().bind_to_thread();
        // SAFETY: allocated by `Memory::new`, freed once, and the stream has drained.
        let _ = unsafe { result::free_sync(ptr) };
    }

    /// `bytes` of device memory, zero-filled on `stream`.
    pub fn new(stream: &Arc<CudaStream>, bytes: usize, what: &str) -> Result<Self> {
        let ctx = stream.context();
        ctx.bind_to_thread().said("binding the context")?;
        // SAFETY: the memory is zero-filled below, on the stream that every later use is on.
        let ptr = match unsafe { result::malloc_sync(bytes.max(LEAST)) } {
            Ok(ptr) => ptr,
            Err(e) => {
                // After a fault every call fails, this one too: that is no lack of memory.
                let free = ctx.mem_get_info().ok().map(|(free, _)| free as u64);
                let need = bytes as u64;
                let full = e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
                if full || free.is_some_and(|free| need > free) {
                    let (what, free) = (what.into(), free.unwrap_or(0));
                    return Err(BackendError::OutOfMemory { what, need, free });
                }
                return Err(e).said(&format!("allocating {what}"));
            }
        };
        let memory = Memory { stream: stream.clone(), ptr, bytes };
        // SAFETY: the memory was just allocated with at least this size.
        unsafe { result::memset_d8_async(ptr, 0, bytes.max(LEAST), stream.cu_stream()) }
            .said("clearing new memory")?;
        Ok(memory)
    }

    pub fn ptr(&self) -> sys::CUdeviceptr {
        self.ptr
    }
}

/// Address of a tensor's first element.
///
/// # Errors
/// [`BackendError::BadArgument`] when the tensor lives on another device.
pub(super) fn address(
    op: &'static str,
    t: &Tensor,
    stream: &CudaStream,
) -> Result<sys::CUdeviceptr> {
    let memory = t.buffer().downcast_ref::<Memory>();
    match memory.filter(|m| m.stream.context() == stream.context()) {
        Some(m) => Ok(m.ptr + t.byte_offset() as u64),
        None => Err(BackendError::BadArgument {
            op,
            reason: format!("a tensor of {} {} lives on another device", t.len(), t.dtype()),
        }),
    }
}

/// Pinned host memory.
struct Pinned {
    ctx: Arc<CudaContext>,
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory, reached only through `&mut self`.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(ctx: &Arc<CudaContext>, bytes: usize) -> std::result::Result<Self, DriverError> {
        ctx.bind_to_thread()?;
        // Cacheable (flags 0): downloads read it.
        // SAFETY: written before it is read.
        let ptr = unsafe { result::malloc_host(bytes, 0) }?.cast();
        Ok(Pinned { ctx: ctx.clone(), ptr, bytes })
    }
    fn slice(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= self.bytes);
        // SAFETY: `bytes` of live memory, borrowed from self.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.ctx.bind_to_thread();
        // SAFETY: allocated by malloc_host, freed once; `Staging` waits for copies first.
        let _ = unsafe { result::free_host(self.ptr.cast()) };
    }
}

/// A pinned buffer and the event behind the copy that last used it.
struct Slot {
    pinned: Pinned,
    event: CudaEvent,
}

/// Pinned buffers in turn: small uploads return without waiting for the device, large ones overlap the host's
/// copying with the link.
pub(super) struct Staging {
    stream: Arc<CudaStream>,
    small: Vec<Slot>,
    large: Vec<Slot>,
    next: usize,
}

const SMALL: usize = 64 << 10;
const LARGE: usize = 16 << 20;
const SMALL_SLOTS: usize = 32;
const LARGE_SLOTS: usize = 2;

impl Staging {
    pub fn new(stream: &Arc<CudaStream>) -> Self {
        Staging { stream: stream.clone(), small: Vec::new(), large: Vec::new(), next: 0 }
    }

    /// The next buffer of at least `bytes` (at most `LARGE`), once its last copy is done.
    fn slot(&mut self, bytes: usize) -> Result<&mut Slot> {
        let (slots, count, size) = match bytes <= SMALL {
            true => (&mut self.small, SMALL_SLOTS, SMALL),
            false => (&mut self.large, LARGE_SLOTS, LARGE),
        };
        let at = self.next % count;
        self.next = self.next.wrapping_add(1);
        let ctx = self.stream.context();
        while slots.len() <= at {
            let pinned = Pinned::new(ctx, size).said("pinning host memory")?;
            slots.push(Slot { pinned, event: ctx.new_event(None).said("creating an event")? });
        }
        slots[at].event.synchronize().said("waiting for a copy")?;
        Ok(&mut slots[at])
    }

    /// Copies host bytes to the device address `dst`, ordered on the stream.
    pub fn upload(&mut self, dst: sys::CUdeviceptr, bytes: &[u8]) -> Result<()> {
        let stream = self.stream.clone();
        for (i, part) in bytes.chunks(LARGE).enumerate() {
            let slot = self.slot(part.len())?;
            let host = slot.pinned.slice(part.len());
            host.copy_from_slice(part);
            // SAFETY: `dst` holds `bytes.len()` bytes (checked by the caller); the slot is not touched again
            // before its event.
            unsafe {
                result::memcpy_htod_async(dst + (i * LARGE) as u64, host, stream.cu_stream())
            }
            .said("uploading")?;
            slot.event.record(&stream).said("recording an event")?;
        }
        Ok(())
    }

    /// Waits for the stream and copies from the device address `src`.
    pub fn download(&mut self, src: sys::CUdeviceptr, out: &mut [u8]) -> Result<()> {
        let stream = self.stream.clone();
        for (i, part) in out.chunks_mut(LARGE).enumerate() {
            let slot = self.slot(part.len())?;
            let host = slot.pinned.slice(part.len());
            // SAFETY: `src` holds `out.len()` bytes (checked by the caller); the copy ends before `host` is read.
            unsafe {
                result::memcpy_dtoh_async(host, src + (i * LARGE) as u64, stream.cu_stream())
            }
            .said("downloading")?;
            stream.synchronize().said("waiting for the device")?;
            part.copy_from_slice(host);
        }
        Ok(())
    }

    /// Host-to-device GB/s (1e9 bytes per second) of one pinned copy of `bytes` into `dst`.
    pub fn bandwidth(&self, dst: &Memory, bytes: usize) -> Result<f64> {
        let mut pinned = Pinned::new(self.stream.context(), bytes).said("pinning host memory")?;
        let host = pinned.slice(bytes);
        host.fill(1);
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let ms = timed(&self.stream, &mut || {
                clock::begin(&self.stream)?;
                // SAFETY: `dst` has `bytes`; `timed` waits before `pinned` is dropped.
                unsafe { result::memcpy_htod_async(dst.ptr(), host, self.stream.cu_stream()) }
                    .said("uploading")
            })?;
            best = best.min(ms);
        }
        Ok(bytes as f64 / best / 1e6)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
    }
}

/// Bytes of `len` elements, checked.
pub(super) fn size(dtype: DType, len: usize, what: &str) -> Result<usize> {
    len.checked_mul(dtype.bytes())
        .filter(|b| isize::try_from(*b).is_ok())
        .ok_or_else(|| BackendError::OutOfMemory { what: what.into(), need: u64::MAX, free: 0 })
}
