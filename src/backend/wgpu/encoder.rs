//! Records dispatches into one pending command encoder and submits them in batches.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::memory::{Gpu, GpuBuffer, within};
use super::pipelines::{Access, Constants, Kernel};
use crate::backend::{BackendError, Result, Tensor};

/// Dispatches recorded before they are submitted without being asked for.
const BATCH: usize = 256;
/// Bytes of one kernel's parameter block: the largest uniform offset alignment a device may ask for.
pub const PARAMS_BYTES: usize = 256;
/// Size of the buffer that holds the parameter blocks of a batch.
pub const ARENA_BYTES: usize = BATCH * PARAMS_BYTES;
/// Bound tensors start at a multiple of this, the largest storage offset alignment a device may ask for.
pub const BIND_ALIGN: usize = 256;
/// Workgroups per grid dimension that every device allows.
pub const MAX_GROUPS: usize = 65535;

/// Locks, also after a panic in another thread.
pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is recorded and not yet submitted.
#[derive(Debug, Default)]
pub struct Pending {
    // The pass borrows the encoder's state: it must end (drop) before the encoder is used.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    params: Vec<u8>,
}

/// Errors that wgpu reported outside a call, told at the next one.
#[derive(Debug, Default)]
pub struct Faults {
    /// The device is gone: every later call fails.
    pub lost: Option<String>,
    /// First error since the last report.
    pub error: Option<String>,
}

/// One storage binding of a dispatch.
#[derive(Clone, Copy, Debug)]
pub enum Bind<'a> {
    /// The tensor's bytes; must start at a multiple of 256 bytes.
    Tensor(&'a Tensor),
    /// The tensor's bytes with whatever comes before them back to a multiple of 256 bytes; the kernel gets
    /// [`loose_offset`] as a parameter.
    Loose(&'a Tensor),
    /// `len` bytes from byte `start` of the tensor (a multiple of 256).
    Part { tensor: &'a Tensor, start: usize, len: usize },
    /// A buffer of the backend itself.
    Raw(&'a wgpu::Buffer),
    /// An optional tensor that is absent; the kernel does not touch it.
    Absent,
}

/// Elements between the start of a [`Bind::Loose`] binding and the tensor's first element.
pub fn loose_offset(t: &Tensor) -> usize {
    (t.byte_offset() % BIND_ALIGN) / t.dtype().bytes()
}

/// A kernel launch.
#[derive(Debug)]
pub struct Dispatch<'a> {
    pub kernel: &'a Kernel,
    pub constants: Constants<'a>,
    /// In the order of the kernel's bindings.
    pub binds: &'a [Bind<'a>],
    /// Words of the kernel's `Params`, in order.
    pub params: &'a [u32],
    pub grid: [u32; 3],
}

/// A size as a u32 kernel parameter or grid dimension.
pub fn word(op: &'static str, v: usize) -> Result<u32> {
    u32::try_from(v).map_err(|_| BackendError::BadArgument {
        op,
        reason: format!("{v} does not fit in 32 bits"),
    })
}

/// A one-dimensional grid folded into two dimensions; kernels undo it with `flat_group`.
pub fn flat_grid(op: &'static str, groups: usize) -> Result<[u32; 3]> {
    let x = groups.min(MAX_GROUPS);
    let y = if x == 0 { 0 } else { groups.div_ceil(x) };
    grid(op, [x, y, 1])
}

/// A grid, checked against what every device allows.
pub fn grid(op: &'static str, groups: [usize; 3]) -> Result<[u32; 3]> {
    if groups.iter().any(|&g| g > MAX_GROUPS) {
        return Err(BackendError::Unsupported {
            op,
            backend: "wgpu",
            what: format!("a grid of {groups:?} workgroups"),
        });
    }
    Ok(groups.map(|g| g as u32))
}

struct Bound<'a> {
    buffer: &'a wgpu::Buffer,
    offset: u64,
    size: u64,
}

impl Gpu {
    /// Records one dispatch. An empty grid records nothing.
    pub fn dispatch(&self, d: &Dispatch<'_>) -> Result<()> {
        self.fault()?;
        if d.grid.contains(&0) {
            return Ok(());
        }
        let op = d.kernel.op;
        debug_assert_eq!(d.binds.len(), d.kernel.bindings.len(), "bindings of {op}");
        debug_assert!(d.params.len() * 4 <= PARAMS_BYTES);
        let storage_buffers = self.limits.max_storage_buffers_per_shader_stage as usize;
        if d.binds.len() > storage_buffers {
            return Err(BackendError::Unsupported {
                op,
                backend: "wgpu",
                what: format!(
                    "{} buffers at once, this device binds {storage_buffers}",
                    d.binds.len()
                ),
            });
        }
        let pipeline = self.pipelines.get(&self.device, d.kernel, d.constants)?;
        let mut bound = Vec::with_capacity(d.binds.len());
        for (bind, &(_, access)) in d.binds.iter().zip(d.kernel.bindings) {
            bound.push(self.resolve(op, bind, access)?);
        }

        let mut pending = lock(&self.pending);
        // wgpu forbids one buffer as input and output of a dispatch, even in separate ranges: copy the input.
        let mut copies: Vec<(usize, wgpu::Buffer)> = Vec::new();
        for (i, b) in bound.iter().enumerate() {
            let is_input = d.kernel.bindings[i].1 == Access::Read;
            let aliased = is_input
                && bound
                    .iter()
                    .zip(d.kernel.bindings)
                    .any(|(o, a)| a.1 == Access::Write && o.buffer == b.buffer);
            if aliased {
                let copy = self.temporary(b.size)?;
                let encoder = pending.encoder(&self.device);
                encoder.copy_buffer_to_buffer(b.buffer, b.offset, &copy, 0, b.size);
                copies.push((i, copy));
            }
        }
        for (i, copy) in &copies {
            let size = bound[*i].size;
            bound[*i] = Bound { buffer: copy, offset: 0, size };
        }

        let mut entries = vec![entry(0, &self.arena, 0, PARAMS_BYTES as u64)];
        for (b, &(slot, _)) in bound.iter().zip(d.kernel.bindings) {
            entries.push(entry(slot, b.buffer, b.offset, b.size));
        }
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(op),
            layout: &pipeline.layout,
            entries: &entries,
        });
        let at = pending.params.len() as u32;
        pending.params.extend_from_slice(bytemuck::cast_slice(d.params));
        pending.params.resize(at as usize + PARAMS_BYTES, 0);
        let pass = pending.pass(&self.device);
        pass.set_pipeline(&pipeline.raw);
        pass.set_bind_group(0, &group, &[at]);
        pass.dispatch_workgroups(d.grid[0], d.grid[1], d.grid[2]);
        if pending.params.len() >= ARENA_BYTES {
            self.submit(&mut pending);
        }
        Ok(())
    }

    /// Records with the pending encoder, outside a compute pass.
    pub fn record(&self, f: impl FnOnce(&mut wgpu::CommandEncoder)) {
        f(lock(&self.pending).encoder(&self.device));
    }

    /// Submits what is pending.
    pub fn flush(&self) {
        self.submit(&mut lock(&self.pending));
    }

    fn submit(&self, pending: &mut Pending) {
        pending.pass = None;
        if !pending.params.is_empty() {
            self.queue.write_buffer(&self.arena, 0, &pending.params);
            pending.params.clear();
        }
        self.queue.submit(pending.encoder.take().map(wgpu::CommandEncoder::finish));
    }

    fn bindable(&self, op: &str, size: u64) -> Result<()> {
        let limit = self.limits.max_storage_buffer_binding_size;
        within(limit, size, || format!("a tensor of op {op}"))
    }

    fn resolve<'a>(
        &'a self,
        op: &'static str,
        bind: &Bind<'a>,
        access: Access,
    ) -> Result<Bound<'a>> {
        let (tensor, start, len) = match *bind {
            Bind::Absent => {
                let buffer = if access == Access::Read { &self.absent[0] } else { &self.absent[1] };
                return Ok(Bound { buffer, offset: 0, size: buffer.size() });
            }
            Bind::Raw(buffer) => {
                self.bindable(op, buffer.size())?;
                return Ok(Bound { buffer, offset: 0, size: buffer.size() });
            }
            Bind::Tensor(t) => (t, t.byte_offset(), t.bytes()),
            Bind::Loose(t) => {
                let back = t.byte_offset() % BIND_ALIGN;
                (t, t.byte_offset() - back, t.bytes() + back)
            }
            Bind::Part { tensor, start, len } => (tensor, tensor.byte_offset() + start, len),
        };
        if !start.is_multiple_of(BIND_ALIGN) {
            return Err(BackendError::BadArgument {
                op,
                reason: format!(
                    "a tensor starts at byte {start}, not at a multiple of {BIND_ALIGN}"
                ),
            });
        }
        // Bindings are whole vec4 words; allocations are padded so that these exist.
        let size = len.next_multiple_of(16).max(16) as u64;
        self.bindable(op, size)?;
        let buffer = &GpuBuffer::of(op, tensor)?.raw;
        Ok(Bound { buffer, offset: start as u64, size })
    }

    /// Reports what wgpu said since the last call.
    pub fn fault(&self) -> Result<()> {
        let mut faults = lock(&self.faults);
        let reason = match &faults.lost {
            Some(lost) => Some(lost.clone()),
            None => faults.error.take(),
        };
        match reason {
            None => Ok(()),
            Some(reason) => Err(BackendError::Driver { backend: "wgpu", reason }),
        }
    }
}

/// Makes wgpu keep its errors for [`Gpu::fault`] instead of panicking.
pub fn catch_faults(device: &wgpu::Device) -> Arc<Mutex<Faults>> {
    let faults = Arc::new(Mutex::new(Faults::default()));
    let sink = faults.clone();
    device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
        lock(&sink).error.get_or_insert_with(|| e.to_string());
    }));
    let sink = faults.clone();
    device.set_device_lost_callback(move |reason, message| {
        // Dropping the device also ends here.
        if reason != wgpu::DeviceLostReason::Destroyed {
            lock(&sink).lost = Some(format!("the device was lost: {message}"));
        }
    });
    faults
}

fn entry(binding: u32, buffer: &wgpu::Buffer, offset: u64, size: u64) -> wgpu::BindGroupEntry<'_> {
    wgpu::BindGroupEntry {
        binding,
        resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer,
            offset,
            size: std::num::NonZeroU64::new(size),
        }),
    }
}

impl Pending {
    /// The encoder, outside a pass.
    fn encoder(&mut self, device: &wgpu::Device) -> &mut wgpu::CommandEncoder {
        self.pass = None;
        self.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()))
    }

    fn pass(&mut self, device: &wgpu::Device) -> &mut wgpu::ComputePass<'static> {
        let encoder =
            self.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()));
        self.pass.get_or_insert_with(|| {
            encoder.begin_compute_pass(&Default::default()).forget_lifetime()
        })
    }
}
