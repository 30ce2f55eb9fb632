//! A backend made of the reference functions, in host memory, that can be told to misbehave: the harness must
//! pass it as it is and catch every fault.

use longsight::backend::reference::{self, Cell, Output, encode};
use longsight::backend::*;
use std::any::Any;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

/// What the oracle does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// Writes one element behind every output.
    PastTheEnd,
    /// Writes one element that should be left alone.
    Beside,
    /// Leaves the last element of every output as it was.
    Skip,
    /// Results are 0.1 % too large, and indices one too large.
    Inexact,
    /// One element is wrong by a tenth of its value.
    OneElement,
    /// Every call gives slightly different results.
    Restless,
    /// Accepts arguments that do not fit.
    Gullible,
}

pub struct Oracle {
    caps: Capabilities,
    fault: Fault,
    calls: AtomicU32,
}

impl Oracle {
    pub fn new(fault: Fault, storage: Vec<DType>, activations_follow_weights: bool) -> Oracle {
        let caps = Capabilities {
            backend: "oracle",
            device: "f64 reference".into(),
            driver: "none".into(),
            software: false,
            memory: None,
            topology: Topology::Unified,
            f16: true,
            subgroup: (0, 0),
            tensor_cores: "none".into(),
            max_binding: 1 << 40,
            storage,
            activations_follow_weights,
            prompt_rows: 512,
        };
        Oracle { caps, fault, calls: AtomicU32::new(0) }
    }

    fn bytes<'t>(&self, op: &'static str, t: &'t Tensor) -> Result<&'t Mutex<Vec<u8>>> {
        let memory = t.buffer().downcast_ref::<Memory>().map(|m| &m.0);
        memory
            .ok_or(BackendError::BadArgument { op, reason: "not a buffer of this backend".into() })
    }

    fn patch(&self, t: &Tensor, at: usize, value: f64) -> Result<()> {
        let size = t.dtype().bytes();
        let mut memory = self.bytes("patch", t)?.lock().unwrap();
        let bytes = encode(t.dtype(), &[value]);
        memory[t.byte_offset() + at * size..][..size].copy_from_slice(&bytes);
        Ok(())
    }

    fn finish<'p>(
        &self,
        checked: Result<()>,
        outs: impl FnOnce() -> Result<Vec<Output<'p>>>,
    ) -> Result<()> {
        if self.fault == Fault::Gullible && checked.is_err() {
            return Ok(());
        }
        checked?;
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        for o in outs()? {
            let written: Vec<usize> = (0..o.cells.len())
                .filter(|i| matches!(o.cells[*i], Cell::Is(_) | Cell::Near(..)))
                .collect();
            for (n, i) in written.iter().copied().enumerate() {
                let (Cell::Is(mut v) | Cell::Near(mut v, _)) = o.cells[i] else { continue };
                match self.fault {
                    Fault::Skip if n + 1 == written.len() => continue,
                    Fault::Inexact => {
                        v = v * 1.001 + f64::from(u8::from(!o.tensor.dtype().is_float()))
                    }
                    Fault::OneElement if n == written.len() / 2 => v *= 1.1,
                    Fault::Restless => v *= 1.0 + f64::from(call) * 1e-6,
                    _ => {}
                }
                self.patch(o.tensor, i, v)?;
            }
            match (self.fault, o.cells.iter().position(|c| *c == Cell::Keep)) {
                (Fault::PastTheEnd, _) => self.patch(o.tensor, o.cells.len(), 7.0)?,
                (Fault::Beside, Some(i)) => self.patch(o.tensor, i, 7.0)?,
                _ => {}
            }
        }
        Ok(())
    }
}

struct Memory(Mutex<Vec<u8>>);

impl DeviceBuffer for Memory {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn bytes(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// One method per op: check the arguments, compute, write.
macro_rules! ops {
    ($($op:ident: $params:ident),* $(,)?) => {
        $(fn $op(&self, p: &$params<'_>) -> Result<()> {
            self.finish(p.check(), || reference::$op(p, self))
        })*
    };
}

impl Backend for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }
    fn caps(&self) -> &Capabilities {
        &self.caps
    }
    fn alloc(&self, dtype: DType, len: usize, what: &str) -> Result<Tensor> {
        let need = len as u64 * dtype.bytes() as u64;
        if need > self.caps.max_binding {
            return Err(BackendError::OutOfMemory { what: what.into(), need, free: 0 });
        }
        let memory = Memory(Mutex::new(vec![0; need as usize]));
        Ok(Tensor::from_buffer(std::sync::Arc::new(memory), dtype, len))
    }
    fn upload(&self, dst: &Tensor, bytes: &[u8]) -> Result<()> {
        check_host("upload", dst, bytes.len())?;
        let mut memory = self.bytes("upload", dst)?.lock().unwrap();
        memory[dst.byte_offset()..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn download(&self, src: &Tensor, out: &mut [u8]) -> Result<()> {
        check_host("download", src, out.len())?;
        let memory = self.bytes("download", src)?.lock().unwrap();
        out.copy_from_slice(&memory[src.byte_offset()..][..src.bytes()]);
        Ok(())
    }
    fn copy(&self, src: &Tensor, dst: &Tensor) -> Result<()> {
        check_copy(src, dst)?;
        let mut bytes = vec![0; src.bytes()];
        self.download(src, &mut bytes)?;
        self.upload(dst, &bytes)
    }
    fn zero(&self, dst: &Tensor) -> Result<()> {
        self.upload(dst, &vec![0; dst.bytes()])
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn free_memory(&self) -> Option<u64> {
        None
    }
    fn bandwidth(&self) -> Result<Bandwidth> {
        let what = "host memory".into();
        Err(BackendError::Unsupported { op: "bandwidth", backend: "oracle", what })
    }
    ops! {
        embed: Embed, gather_rows: GatherRows, rms_norm: RmsNorm, linear: Linear, rope: Rope,
        swiglu: SwiGlu, content_bias: ContentBias, kv_append: KvAppend, key_stats: KeyStats, select_dims: SelectDims,
        rebuild_slice: RebuildSlice, score_dims: ScoreDims, score_rows: ScoreRows, score_tiles: ScoreTiles, pool_scores: PoolScores, force: Force,
        trim_scores: TrimScores, project: Project, quantise_keys: QuantiseKeys, mean_value: MeanValue,
        top_k: TopK, union_ranks: UnionRanks, hold_lists: HoldLists, kv_summaries: KvSummaries, score_summaries: ScoreSummaries,
        pool_blocks: PoolBlocks, force_blocks: ForceBlocks, expand_blocks: ExpandBlocks, attend_dense: AttendDense, attend_rows: AttendRows, merge: Merge,
    }
}
