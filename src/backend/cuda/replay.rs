//! Launches that repeat from step to step, replayed as one CUDA graph.
//!
//! While a thread records, what its ops put on the stream is only listed. At the end the list is compared with those
//! of earlier recordings: one that came before, to the last argument, runs as a graph, which spares the driver a call
//! per kernel and the device the gaps between them; a new one runs kernel by kernel. So a graph can never be stale: a
//! buffer that moved or a bound that grew makes another list. A recording is cut into parts, each a list of its own, so
//! that the device works on the first while the host still goes through the ops of the rest.

use super::blas::{self, Blas, Product};
use super::clock;
use super::error::Said;
use super::launch::{Args, Kernels, Shape, lock};
use super::memory::Memory;
use crate::backend::Result;
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, result, sys};
use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// One thing on a stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Node {
    Kernel { op: &'static str, entry: String, shape: Shape, args: Args },
    Product { product: Product, x: u64, w: u64, y: u64 },
    Zero { at: u64, bytes: usize },
    Copy { from: u64, to: u64, bytes: usize },
}

/// What runs nodes.
#[derive(Clone, Copy)]
pub(super) struct Runner<'a> {
    pub kernels: &'a Kernels,
    pub blas: Option<&'a Blas>,
    /// Held while a list runs: its ops use the scratch memory, and other threads' ops must not come between them.
    pub scratch: &'a Mutex<Option<Arc<Memory>>>,
}

impl Runner<'_> {
    /// Puts a node on `stream`.
    ///
    /// # Safety
    /// The node's addresses hold what its op's `check` has gone over, until the stream has run it.
    pub unsafe fn run(&self, node: &Node, stream: &CudaStream) -> Result<()> {
        stream.context().bind_to_thread().said("binding the context")?;
        match node {
            // SAFETY: the caller's promise.
            Node::Kernel { op, entry, shape, args } => unsafe {
                self.kernels.launch(stream, op, entry, *shape, args)
            },
            Node::Product { product, x, w, y } => match self.blas {
                // SAFETY: the caller's promise.
                Some(blas) => unsafe { blas.run(stream, *product, *x, *w, *y) },
                None => Err(blas::missing()),
            },
            // SAFETY: the caller's promise.
            Node::Zero { at, bytes } => {
                unsafe { result::memset_d8_async(*at, 0, *bytes, stream.cu_stream()) }
                    .said("clearing memory")
            }
            // SAFETY: the caller's promise; the ranges do not overlap.
            Node::Copy { from, to, bytes } => {
                unsafe { result::memcpy_dtod_async(*to, *from, *bytes, stream.cu_stream()) }
                    .said("copying on the device")
            }
        }
    }
}

/// What one thread has listed for one device.
struct Recording {
    /// Address of the device's [`Replays`]: other devices of the thread are not recorded.
    of: usize,
    nodes: Vec<Node>,
    /// Parts that run already.
    parts: u32,
    /// Memory that nodes use and that another thread could free.
    keep: Vec<Arc<Memory>>,
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
    /// Device memory that was given up while nodes may still name it.
    static FREED: RefCell<Vec<(Arc<CudaStream>, sys::CUdeviceptr)>> = const { RefCell::new(Vec::new()) };
}

/// Keeps memory that this thread gives up until its recording has run; false where nothing is recorded.
pub(super) fn free_later(stream: &Arc<CudaStream>, ptr: sys::CUdeviceptr) -> bool {
    let recording = RECORDING.with_borrow(Option::is_some);
    if recording {
        FREED.with_borrow_mut(|f| f.push((stream.clone(), ptr)));
    }
    recording
}

/// A list and, once it has come twice, its graph.
struct Known {
    hash: u64,
    nodes: Vec<Node>,
    graph: Option<Graph>,
    tried: bool,
    /// Number of the recording that last asked for it.
    used: u64,
}

struct Graph(CudaGraph);

// SAFETY: a graph is only touched under the lock of `Replays::known`; the driver's contexts are free of threads.
unsafe impl Send for Graph {}

/// The graphs of a device.
pub(super) struct Replays {
    /// Work is captured on a stream of its own, so that other threads' work cannot get into a graph.
    capture: Arc<CudaStream>,
    known: Mutex<Vec<Known>>,
    replayed: AtomicU64,
    on: bool,
}

/// Lists that are kept.
const MOST: usize = 512;
/// Shorter lists are not worth a graph.
const LEAST: usize = 8;
/// Nodes of a part: the device should get work soon, and a graph more is a launch more.
const PART: [usize; 3] = [8, 24, 48];

impl Replays {
    /// `on`: there are graphs.
    pub fn new(ctx: &Arc<CudaContext>, on: bool) -> Result<Self> {
        Ok(Replays {
            capture: ctx.new_stream().said("creating a stream")?,
            known: Mutex::default(),
            replayed: AtomicU64::new(0),
            on,
        })
    }

    /// Parts of recordings that ran as a graph.
    pub fn replayed(&self) -> u64 {
        self.replayed.load(Ordering::Relaxed)
    }

    fn id(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Lists `node` where this thread records; else gives it back.
    pub fn listed(&self, node: Node) -> Option<Node> {
        RECORDING.with_borrow_mut(|r| match r {
            Some(r) if r.of == self.id() => {
                r.nodes.push(node);
                None
            }
            _ => Some(node),
        })
    }

    /// Keeps memory alive until this thread's recording has run.
    pub fn keep(&self, memory: &Arc<Memory>) {
        RECORDING.with_borrow_mut(|r| {
            if let Some(r) = r.as_mut().filter(|r| r.of == self.id()) {
                r.keep.push(memory.clone());
            }
        });
    }

    /// Runs what this thread has listed so far: before something that cannot be part of a graph.
    pub fn flush(&self, runner: Runner<'_>, stream: &CudaStream) -> Result<()> {
        let nodes = RECORDING.with_borrow_mut(|r| {
            r.as_mut().filter(|r| r.of == self.id()).map(|r| std::mem::take(&mut r.nodes))
        });
        let Some(nodes) = nodes.filter(|n| !n.is_empty()) else { return Ok(()) };
        let _turn = lock(runner.scratch);
        run_now(runner, &nodes, stream)
    }

    /// Runs what this thread has listed so far if that is enough for a part. No op of this thread is under way.
    pub fn advance(&self, runner: Runner<'_>, stream: &CudaStream) -> Result<()> {
        let part = RECORDING.with_borrow_mut(|r| {
            let r = r.as_mut().filter(|r| r.of == self.id())?;
            let enough = PART[(r.parts as usize).min(PART.len() - 1)];
            (r.nodes.len() >= enough).then(|| {
                r.parts += 1;
                std::mem::take(&mut r.nodes)
            })
        });
        let Some(nodes) = part else { return Ok(()) };
        let _turn = lock(runner.scratch);
        self.run(runner, &nodes, stream)
    }

    /// Lists what `f` does and runs it, the rest of it not where `f` answers false.
    pub fn record(
        &self,
        runner: Runner<'_>,
        stream: &CudaStream,
        f: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let busy = RECORDING.with_borrow(Option::is_some);
        if !self.on || busy {
            f();
            return Ok(());
        }
        let (of, nodes, keep) = (self.id(), Vec::new(), Vec::new());
        RECORDING.set(Some(Recording { of, nodes, parts: 0, keep }));
        let end = End;
        let go_on = f();
        let taken = RECORDING.take();
        let outcome = match &taken {
            Some(r) if go_on => {
                let _turn = lock(runner.scratch);
                self.run(runner, &r.nodes, stream)
            }
            _ => Ok(()),
        };
        drop(end);
        outcome
    }

    fn run(&self, runner: Runner<'_>, nodes: &[Node], stream: &CudaStream) -> Result<()> {
        if nodes.len() < LEAST {
            return run_now(runner, nodes, stream);
        }
        let mut hasher = DefaultHasher::new();
        nodes.hash(&mut hasher);
        let hash = hasher.finish();
        let mut known = lock(&self.known);
        let now = known.iter().map(|k| k.used).max().unwrap_or(0) + 1;
        let Some(k) = known.iter_mut().find(|k| k.hash == hash && k.nodes == nodes) else {
            if known.len() >= MOST {
                // Their graphs may still run.
                stream.synchronize().said("waiting for the device")?;
                known.sort_unstable_by_key(|k| std::cmp::Reverse(k.used));
                known.truncate(MOST * 3 / 4);
            }
            known.push(Known { hash, nodes: nodes.to_vec(), graph: None, tried: false, used: now });
            drop(known);
            return run_now(runner, nodes, stream);
        };
        k.used = now;
        if !k.tried {
            // What cannot be made a graph of still runs kernel by kernel, and says there what is wrong.
            k.tried = true;
            k.graph = self.captured(runner, nodes).ok().flatten();
        }
        let Some(graph) = &k.graph else { return run_now(runner, nodes, stream) };
        clock::begin(stream)?;
        stream.context().bind_to_thread().said("binding the context")?;
        // SAFETY: the graph is live; its nodes are those just listed, whose memory is live.
        unsafe { result::graph::launch(graph.0.cu_graph_exec(), stream.cu_stream()) }
            .said("replaying a step")?;
        self.replayed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn captured(&self, runner: Runner<'_>, nodes: &[Node]) -> Result<Option<Graph>> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.capture.begin_capture(mode).said("recording a graph")?;
        let listed = run_all(runner, nodes, &self.capture);
        // Ends the capture whatever came before, or the stream stays useless.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.capture.end_capture(flags).said("building a graph");
        listed?;
        Ok(graph?.map(Graph))
    }
}

/// [`run_all`] on the stream that measurements run on.
fn run_now(runner: Runner<'_>, nodes: &[Node], stream: &CudaStream) -> Result<()> {
    clock::begin(stream)?;
    run_all(runner, nodes, stream)
}

fn run_all(runner: Runner<'_>, nodes: &[Node], stream: &CudaStream) -> Result<()> {
    // SAFETY: nodes come from ops that were checked; what they use is kept by the caller of `replayable`, or freed later
    // by this thread.
    nodes.iter().try_for_each(|n| unsafe { runner.run(n, stream) })
}

/// Ends a recording, also after a panic, and frees what was given up meanwhile.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        // Outside the borrow: memory that goes with it asks whether something is recorded.
        drop(RECORDING.take());
        for (stream, ptr) in FREED.take() {
            Memory::free(&stream, ptr);
        }
    }
}
