//! Device memory: allocation, transfers and the measured bandwidths.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};

use super::encoder::{Bind, Dispatch, Faults, Pending, flat_grid, lock, word};
use super::pipelines::{self, Pipelines};
use crate::backend::{
    BackendError, Bandwidth, DType, DeviceBuffer, Result, Tensor, check_copy, check_host,
};

/// Allocations are padded to this, so that every binding holds whole vec4 words.
const PAD: usize = 256;
/// Bytes staged by one `write_buffer`; uploads wait when this much is under way.
const STAGE: usize = 64 << 20;
/// How long another thread may take to report a finished copy.
const CALLBACK: Duration = Duration::from_secs(10);
/// Largest read-back buffer kept.
const READ_BACK: usize = 64 << 20;

/// The opened device.
#[derive(Debug)]
pub struct Gpu {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub limits: wgpu::Limits,
    /// The adapter runs on the CPU: barriers are dear there and workgroup memory gains nothing.
    pub software: bool,
    pub pipelines: Pipelines,
    pub pending: Mutex<Pending>,
    pub faults: Arc<Mutex<Faults>>,
    /// Parameter blocks of the pending batch.
    pub arena: wgpu::Buffer,
    /// Stand-ins for absent inputs and outputs.
    pub absent: [wgpu::Buffer; 2],
    /// Staging buffer of downloads, grown as needed.
    pub read_back: Mutex<Option<wgpu::Buffer>>,
    /// Scratch memory of ops with two passes, grown as needed.
    pub scratch: Mutex<Option<wgpu::Buffer>>,
}

/// The scratch buffer for the time of one op.
#[derive(Debug)]
pub struct Scratch<'a> {
    pub buffer: wgpu::Buffer,
    _turn: MutexGuard<'a, Option<wgpu::Buffer>>,
}

/// A buffer behind a [`Tensor`].
#[derive(Debug)]
pub struct GpuBuffer {
    pub raw: wgpu::Buffer,
    bytes: usize,
}

impl DeviceBuffer for GpuBuffer {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl GpuBuffer {
    /// The buffer of a tensor that this backend made.
    pub fn of<'a>(op: &'static str, t: &'a Tensor) -> Result<&'a GpuBuffer> {
        t.buffer().downcast_ref().ok_or_else(|| BackendError::BadArgument {
            op,
            reason: "a tensor of another backend".into(),
        })
    }
}

/// Refuses what needs more bytes than a device takes in one buffer.
pub fn within(limit: u64, need: u64, what: impl FnOnce() -> String) -> Result<()> {
    if need <= limit {
        return Ok(());
    }
    let remedy = "use a shorter context, a smaller batch or a 16-bit dtype".into();
    Err(BackendError::BufferLimit { what: what(), need, limit, remedy })
}

const STORAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_SRC)
    .union(wgpu::BufferUsages::COPY_DST);

impl Gpu {
    /// A zero-filled tensor.
    pub fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Tensor> {
        self.fault()?;
        let bytes = len.saturating_mul(dtype.bytes());
        let raw = self.create(bytes as u64, STORAGE, what)?;
        Ok(Tensor::from_buffer(Arc::new(GpuBuffer { raw, bytes }), dtype, len))
    }

    /// A buffer for the time of one submission.
    pub fn temporary(&self, bytes: u64) -> Result<wgpu::Buffer> {
        self.create(bytes, STORAGE, "temporary copy of an input")
    }

    /// The scratch buffer, at least `bytes` long. Keep it until the last pass that uses it is recorded: another
    /// thread's op must not come between the passes.
    pub fn scratch(&self, bytes: usize) -> Result<Scratch<'_>> {
        let mut slot = lock(&self.scratch);
        let buffer = match slot.take().filter(|b| b.size() >= bytes as u64) {
            Some(b) => b,
            None => self.create(bytes as u64, STORAGE, "scratch memory")?,
        };
        *slot = Some(buffer.clone());
        Ok(Scratch { buffer, _turn: slot })
    }

    fn create(&self, bytes: u64, usage: wgpu::BufferUsages, what: &str) -> Result<wgpu::Buffer> {
        let limit = self.limits.max_buffer_size;
        within(limit, bytes, || what.into())?;
        let padded = bytes.next_multiple_of(PAD as u64).max(PAD as u64);
        let size = padded.min(limit / 16 * 16);
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let raw = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage,
            mapped_at_creation: false,
        });
        match pollster::block_on(scope.pop()) {
            None => Ok(raw),
            // wgpu cannot tell how much is free.
            Some(_) => Err(BackendError::OutOfMemory { what: what.into(), need: size, free: 0 }),
        }
    }

    /// Host to device. Copies are whole words; partial words at the ends are read back first.
    pub fn upload(&self, dst: &Tensor, bytes: &[u8]) -> Result<()> {
        const OP: &str = "upload";
        check_host(OP, dst, bytes.len())?;
        self.fault()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let buffer = &GpuBuffer::of(OP, dst)?.raw;
        // What was recorded before must run before: writes happen at the head of the next submission.
        self.flush();
        let start = dst.byte_offset();
        let end = start + bytes.len();
        if start.is_multiple_of(4) && end.is_multiple_of(4) {
            let mut at = start as u64;
            for piece in bytes.chunks(STAGE) {
                self.queue.write_buffer(buffer, at, piece);
                at += piece.len() as u64;
                if bytes.len() > STAGE {
                    // Staging copies live until they have run.
                    self.queue.submit([]);
                    self.wait()?;
                }
            }
            if bytes.len() * 4 >= STAGE {
                self.queue.submit([]);
            }
            return self.fault();
        }
        let first = start / 4 * 4;
        let mut words = vec![0; end.next_multiple_of(4) - first];
        self.read(buffer, first as u64, &mut words)?;
        words[start - first..end - first].copy_from_slice(bytes);
        self.queue.write_buffer(buffer, first as u64, &words);
        self.fault()
    }

    /// Device to host, after everything recorded.
    pub fn download(&self, src: &Tensor, out: &mut [u8]) -> Result<()> {
        const OP: &str = "download";
        check_host(OP, src, out.len())?;
        self.fault()?;
        let buffer = &GpuBuffer::of(OP, src)?.raw;
        let start = src.byte_offset();
        let first = start / 4 * 4;
        let end = (start + out.len()).next_multiple_of(4);
        if start.is_multiple_of(4) && end == start + out.len() {
            return self.read(buffer, first as u64, out);
        }
        let mut words = vec![0; end - first];
        self.read(buffer, first as u64, &mut words)?;
        out.copy_from_slice(&words[start - first..start - first + out.len()]);
        Ok(())
    }

    /// Reads whole words from `offset` on.
    fn read(&self, buffer: &wgpu::Buffer, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut slot = lock(&self.read_back);
        let mut at = offset;
        for piece in out.chunks_mut(READ_BACK) {
            let len = piece.len() as u64;
            let staging = match slot.take().filter(|s| s.size() >= len) {
                Some(s) => s,
                None => {
                    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                    self.create(len.next_power_of_two(), usage, "read-back buffer")?
                }
            };
            self.record(|e| e.copy_buffer_to_buffer(buffer, at, &staging, 0, len));
            self.flush();
            let (done, mapped) = mpsc::channel();
            staging.map_async(wgpu::MapMode::Read, 0..len, move |r| {
                // Nobody listens after a fault.
                let _ = done.send(r);
            });
            self.wait()?;
            // Another thread that waits on the device may be the one that runs the callback, a moment later.
            match mapped.recv_timeout(CALLBACK) {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return Err(driver(e.to_string())),
                Err(_) => return Err(driver("a finished copy was not mapped".into())),
            }
            let view = staging.get_mapped_range(0..len).map_err(|e| driver(e.to_string()))?;
            piece.copy_from_slice(&view);
            drop(view);
            staging.unmap();
            *slot = Some(staging);
            at += len;
        }
        self.fault()
    }

    /// Device to device.
    pub fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        const OP: &str = "copy";
        check_copy(src, dst)?;
        self.fault()?;
        let (from, to) = (&GpuBuffer::of(OP, src)?.raw, &GpuBuffer::of(OP, dst)?.raw);
        let (a, b, n) = (src.byte_offset(), dst.byte_offset(), src.bytes());
        if n == 0 {
            return Ok(());
        }
        if [a, b, n].iter().any(|v| !v.is_multiple_of(4)) {
            let mut bytes = vec![0; n];
            self.download(src, &mut bytes)?;
            return self.upload(dst, &bytes);
        }
        let (a, b, n) = (a as u64, b as u64, n as u64);
        if src.same_buffer(dst) {
            // wgpu copies only between different buffers.
            let between = self.temporary(n)?;
            self.record(|e| {
                e.copy_buffer_to_buffer(from, a, &between, 0, n);
                e.copy_buffer_to_buffer(&between, 0, to, b, n);
            });
        } else {
            self.record(|e| e.copy_buffer_to_buffer(from, a, to, b, n));
        }
        Ok(())
    }

    /// Zero fill.
    pub fn zero(&self, dst: &Tensor) -> Result<()> {
        self.fault()?;
        let buffer = &GpuBuffer::of("zero", dst)?.raw;
        let (start, n) = (dst.byte_offset(), dst.bytes());
        if n == 0 {
            return Ok(());
        }
        if !start.is_multiple_of(4) || !n.is_multiple_of(4) {
            return self.upload(dst, &vec![0; n]);
        }
        self.record(|e| e.clear_buffer(buffer, start as u64, Some(n as u64)));
        Ok(())
    }

    /// Submits and waits.
    pub fn sync(&self) -> Result<()> {
        self.fault()?;
        self.flush();
        self.wait()
    }

    /// Waits for everything submitted.
    fn wait(&self) -> Result<()> {
        let polled = self.device.poll(wgpu::PollType::wait_indefinitely());
        self.fault()?;
        polled.map(|_| ()).map_err(|e| driver(e.to_string()))
    }

    /// Uploads 64 MiB and reads up to 256 MiB with a kernel, a few times each; the best run counts.
    pub fn bandwidth(&self) -> Result<Bandwidth> {
        let largest = self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size);
        let bytes = largest.min(256 << 20) as usize / 256 * 256;
        let up_bytes = bytes.min(STAGE);
        let data = self.alloc(DType::U32, bytes / 4, "bandwidth test")?;
        let groups = 1024;
        let sums = self.alloc(DType::U32, groups * 256, "bandwidth test sums")?;
        self.zero(&data)?;
        self.sync()?;

        let host = vec![1u8; up_bytes];
        let target = data.slice(0, up_bytes / 4);
        let mut up = f64::INFINITY;
        for _ in 0..3 {
            let t = Instant::now();
            self.upload(&target, &host)?;
            self.sync()?;
            up = up.min(t.elapsed().as_secs_f64());
        }

        let launch = || -> Result<()> {
            self.dispatch(&Dispatch {
                kernel: &pipelines::BANDWIDTH,
                constants: &[],
                binds: &[Bind::Tensor(&data), Bind::Tensor(&sums)],
                params: &[word("bandwidth", bytes / 16)?],
                grid: flat_grid("bandwidth", groups)?,
            })
        };
        // Several reads per wait, so that launching and waiting do not count; few on a slow device.
        let t = Instant::now();
        launch()?;
        self.sync()?;
        let repeat = if t.elapsed().as_secs_f64() > 0.02 { 1 } else { 10 };
        let mut read = f64::INFINITY;
        for _ in 0..3 {
            let t = Instant::now();
            for _ in 0..repeat {
                launch()?;
            }
            self.sync()?;
            read = read.min(t.elapsed().as_secs_f64() / f64::from(repeat));
        }
        Ok(Bandwidth {
            host_to_device: up_bytes as f64 / up / 1e9,
            device_read: bytes as f64 / read / 1e9,
        })
    }
}

fn driver(reason: String) -> BackendError {
    BackendError::Driver { backend: "wgpu", reason }
}
