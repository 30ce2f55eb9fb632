//! Host memory behind the tensors, and the borrows that an op takes of it.
//!
//! Ops get shared references to tensors and write through them, so the borrow rules are kept at run time:
//! an op takes its turn on the backend's [`Stream`] (one op at a time), and [`Io`] refuses views that overlap
//! another view of the same op when either is written.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::MmapMut;

use crate::backend::{ALIGN, BackendError, DType, DeviceBuffer, Result, Tensor};

/// From this size on a buffer is its own mapping, in huge pages where the system has them.
const LARGE: usize = 4 << 20;

/// Element types that tensors hold.
pub(super) trait Element: Pod + Send + Sync {
    const DTYPE: DType;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}
impl Element for i8 {
    const DTYPE: DType = DType::I8;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

/// The order of ops: whoever holds the lock runs its op. Also the identity of the backend.
#[derive(Debug, Default)]
pub(super) struct Stream(Mutex<()>);

/// A zero-filled block of host memory, aligned to [`ALIGN`] at least.
pub(super) struct CpuBuffer {
    ptr: NonNull<u8>,
    bytes: usize,
    stream: Arc<Stream>,
    block: Block,
}

enum Block {
    Heap(Layout),
    /// Keeps the mapping alive; reached through `ptr` only.
    Map {
        _map: MmapMut,
    },
}

// SAFETY: the block is owned by this object alone and only reached through `Io`, under the stream's lock.
unsafe impl Send for CpuBuffer {}
// SAFETY: as above; `&CpuBuffer` by itself gives no access to the block.
unsafe impl Sync for CpuBuffer {}

impl CpuBuffer {
    /// None when there is no such block.
    pub(super) fn new(bytes: usize, stream: Arc<Stream>) -> Option<CpuBuffer> {
        if bytes >= LARGE {
            let mut map = MmapMut::map_anon(bytes).ok()?;
            // Weights and caches are streamed: huge pages spare most TLB misses. Touching the pages now
            // keeps the free memory that is reported honest. Both are advice, a refusal is harmless.
            #[cfg(target_os = "linux")]
            {
                let _ = map.advise(memmap2::Advice::HugePage);
                let _ = map.advise(memmap2::Advice::PopulateWrite);
            }
            let ptr = NonNull::new(map.as_mut_ptr())?;
            return Some(CpuBuffer { ptr, bytes, stream, block: Block::Map { _map: map } });
        }
        let layout = Layout::from_size_align(bytes.max(1), ALIGN).ok()?;
        // SAFETY: the layout's size is at least 1.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(CpuBuffer { ptr, bytes, stream, block: Block::Heap(layout) })
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        if let Block::Heap(layout) = self.block {
            // SAFETY: allocated in `new` with this layout, freed once.
            unsafe { dealloc(self.ptr.as_ptr(), layout) }
        }
    }
}

impl DeviceBuffer for CpuBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

struct Lent {
    buffer: usize,
    bytes: Range<usize>,
    written: bool,
}

thread_local! {
    static IN_OP: Cell<bool> = const { Cell::new(false) };
}

/// One op's turn on the stream and the views it has taken.
pub(super) struct Io<'s> {
    op: &'static str,
    stream: &'s Arc<Stream>,
    lent: RefCell<Vec<Lent>>,
    _turn: MutexGuard<'s, ()>,
}

impl<'s> Io<'s> {
    /// Waits for the running op to end. An op started by a task of another op on the same thread is refused: it
    /// would wait for itself.
    pub(super) fn begin(op: &'static str, stream: &'s Arc<Stream>) -> Result<Io<'s>> {
        if IN_OP.get() {
            let reason = "called from a parallel task while this thread runs another op";
            return Err(BackendError::BadArgument { op, reason: reason.into() });
        }
        // A panic inside an op leaves plain numbers behind, nothing to repair: ignore the poison.
        let turn = stream.0.lock().unwrap_or_else(PoisonError::into_inner);
        IN_OP.set(true);
        Ok(Io { op, stream, lent: RefCell::default(), _turn: turn })
    }

    /// [`BackendError::BadArgument`] of this op.
    pub(super) fn bad(&self, reason: impl Into<String>) -> BackendError {
        BackendError::BadArgument { op: self.op, reason: reason.into() }
    }

    /// The elements of `t`, to read.
    pub(super) fn read<'a, T: Element>(&'a self, t: &'a Tensor) -> Result<&'a [T]> {
        let ptr = self.lend::<T>(t, false)?;
        // SAFETY: `lend` checked bounds, type (alignment follows: 64-byte base, offset in elements) and that
        // no written view of this op overlaps; no other op runs while `self` holds the stream.
        Ok(unsafe { std::slice::from_raw_parts(ptr, t.len()) })
    }

    /// The elements of `t`, to write. Fails when another view of this op overlaps.
    #[allow(clippy::mut_from_ref)] // exclusive by the run-time check in `lend`
    pub(super) fn write<'a, T: Element>(&'a self, t: &'a Tensor) -> Result<&'a mut [T]> {
        let ptr = self.lend::<T>(t, true)?;
        // SAFETY: as in `read`; `lend` made sure that no view of this op overlaps at all.
        Ok(unsafe { std::slice::from_raw_parts_mut(ptr, t.len()) })
    }

    /// The bytes of `t`, whatever its type, to read.
    pub(super) fn read_bytes<'a>(&'a self, t: &'a Tensor) -> Result<&'a [u8]> {
        let ptr = self.lend_bytes(t, false)?;
        // SAFETY: as in `read`; every element type is plain bytes.
        Ok(unsafe { std::slice::from_raw_parts(ptr, t.bytes()) })
    }

    /// The bytes of `t`, whatever its type, to write.
    #[allow(clippy::mut_from_ref)] // exclusive by the run-time check in `lend_bytes`
    pub(super) fn write_bytes<'a>(&'a self, t: &'a Tensor) -> Result<&'a mut [u8]> {
        let ptr = self.lend_bytes(t, true)?;
        // SAFETY: as in `write`; every bit pattern is a valid element.
        Ok(unsafe { std::slice::from_raw_parts_mut(ptr, t.bytes()) })
    }

    fn lend<T: Element>(&self, t: &Tensor, written: bool) -> Result<*mut T> {
        if t.dtype() != T::DTYPE {
            let what = format!("{} where {} is computed", t.dtype(), T::DTYPE);
            return Err(BackendError::Unsupported { op: self.op, backend: "cpu", what });
        }
        Ok(self.lend_bytes(t, written)?.cast())
    }

    fn lend_bytes(&self, t: &Tensor, written: bool) -> Result<*mut u8> {
        let buffer = t
            .buffer()
            .downcast_ref::<CpuBuffer>()
            .filter(|b| Arc::ptr_eq(&b.stream, self.stream))
            .ok_or_else(|| self.bad("a tensor was made by another backend"))?;
        let bytes = t.byte_offset()..t.byte_offset() + t.bytes();
        if bytes.end > buffer.bytes {
            return Err(self.bad("a tensor is larger than its buffer"));
        }
        let base = buffer.ptr.as_ptr();
        let mut lent = self.lent.borrow_mut();
        let overlaps = |l: &Lent| {
            // An empty range shares no byte, wherever it lies.
            l.bytes.start.max(bytes.start) < l.bytes.end.min(bytes.end) && l.buffer == base as usize
        };
        if lent.iter().any(|l| (l.written || written) && overlaps(l)) {
            return Err(self.bad("an output overlaps another tensor of the op"));
        }
        lent.push(Lent { buffer: base as usize, bytes: bytes.clone(), written });
        // SAFETY: inside the block, checked above.
        Ok(unsafe { base.add(bytes.start) })
    }
}

impl Drop for Io<'_> {
    fn drop(&mut self) {
        IN_OP.set(false);
    }
}

/// A slice whose disjoint parts are written by parallel tasks.
pub(super) struct Parts<'a, T> {
    ptr: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: stands for the `&mut [T]` it was made from; `part` makes its caller promise disjoint parts.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Parts { ptr: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Elements `start .. start + len`. Panics when they are out of range.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[allow(clippy::mut_from_ref)] // what this type is for
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part out of range");
        // SAFETY: in range; disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }
}

impl<T> Parts<'_, T> {
    /// Pointer to element `start`, for writing a rectangle whose last element is before `start + len`.
    /// Panics when that is out of range.
    pub(super) fn part_ptr(&self, start: usize, len: usize) -> *mut T {
        assert!(start <= self.len && len <= self.len - start, "part out of range");
        // SAFETY: in range.
        unsafe { self.ptr.add(start) }
    }
}

/// Runs `body` with `T` bound to the Rust type of a float dtype.
macro_rules! with_float {
    ($io:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::backend::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::backend::DType::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::backend::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($io.bad(format!("{other} is not a float type"))),
        }
    };
}
pub(super) use with_float;

/// Bytes that can still be allocated without swapping, from `/proc/meminfo` where there is one, or fewer in a container
/// with a limit of its own.
pub(in super::super) fn available() -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/memory.{name}"));
    let left = match [read("max"), read("current"), read("stat")] {
        [Ok(max), Ok(current), Ok(stat)] => left_of(&max, &current, &stat),
        _ => None,
    };
    Some(meminfo("MemAvailable:")?.min(left.unwrap_or(u64::MAX)))
}

/// What a control group (version 2) leaves of its limit; None without one. Pages of files make way.
fn left_of(max: &str, current: &str, stat: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let files = ["inactive_file ", "active_file "]
        .iter()
        .filter_map(|key| stat.lines().find_map(|l| l.strip_prefix(key)).and_then(number))
        .fold(0, u64::saturating_add);
    Some(number(max)?.saturating_sub(number(current)?.saturating_sub(files)))
}

/// Installed memory in bytes, from `/proc/meminfo` where there is one.
pub(super) fn installed() -> Option<u64> {
    meminfo("MemTotal:")
}

fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(stream: &Arc<Stream>, len: usize) -> Tensor {
        let b = CpuBuffer::new(len * 4, stream.clone()).expect("memory for a few numbers");
        Tensor::from_buffer(Arc::new(b), DType::F32, len)
    }

    #[test]
    fn overlapping_output_is_refused() {
        let stream = Arc::new(Stream::default());
        let t = tensor(&stream, 64);
        let io = Io::begin("test", &stream).unwrap();
        let (head, tail) = (t.slice(0, 33), t.slice(32, 32));
        io.read::<f32>(&head).unwrap();
        io.read::<f32>(&tail).unwrap();
        assert!(io.write::<f32>(&tail).is_err());
        let last = t.slice(33, 0);
        io.write::<f32>(&last).unwrap();
    }

    #[test]
    fn another_backends_tensor_and_a_wrong_type_are_refused() {
        let (a, b) = (Arc::new(Stream::default()), Arc::new(Stream::default()));
        let t = tensor(&a, 8);
        let io = Io::begin("test", &b).unwrap();
        assert!(io.read::<f32>(&t).is_err());
        drop(io);
        let io = Io::begin("test", &a).unwrap();
        assert!(io.read::<u32>(&t).is_err());
        assert!(Io::begin("nested", &a).is_err());
    }

    #[test]
    fn a_container_may_have_less() {
        let stat = "anon 1\nfile 900\ninactive_file 300\nactive_file 200\n";
        assert_eq!(left_of("1000\n", "700\n", stat), Some(800));
        assert_eq!(left_of("1000", "400", stat), Some(1000));
        assert_eq!(left_of("1000", "4000", "no such line\n"), Some(0));
        assert_eq!(left_of("max\n", "700\n", stat), None);
        assert_eq!(left_of("1000", "", stat), None);
    }

    #[test]
    fn buffers_are_zero_and_aligned() {
        let stream = Arc::new(Stream::default());
        let t = tensor(&stream, 5);
        let io = Io::begin("test", &stream).unwrap();
        let x = io.read::<f32>(&t).unwrap();
        assert_eq!(x, [0.0; 5]);
        assert_eq!(x.as_ptr() as usize % ALIGN, 0);
    }
}
