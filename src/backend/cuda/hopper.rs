//! When the kernels for Hopper's own matrix instructions (`wgmma.cuh`, `score_wgmma.cuh`) read a prompt, and how they
//! are launched; and what the copy engine is told of the pages, for these and for decode attention (`decode_keys.cuh`).

use super::args::{PoolArg, word};
use super::driver::Limits;
use super::launch::Shape;
use crate::backend::{DType, KvPool, PAGE, Result};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicBool, Ordering};

/// Head sizes with such kernels.
const DIMS: [usize; 2] = [64, 128];
/// Dimensions of a panel: what the 128-byte swizzle spans.
pub(super) const PANEL: usize = 64;
/// Query vectors and keys of a tile.
const TILE: usize = 128;
/// One warpgroup copies, two compute.
const THREADS: usize = 384;
/// From so many vectors of a sequence on a tile is full enough.
const LEAST: usize = 64;
/// The ring starts at a multiple of this.
const ALIGN: usize = 1024;
/// Bytes of keys and values that the L2 cache keeps beside what else passes through it.
const NEAR: usize = 16 << 20;

/// `Items` of `wgmma.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(super) struct Items {
    tiles: u32,
    parts: u32,
    planes: u32,
    near: u32,
    mapped: u32,
}

/// `Jobs` of `score_wgmma.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(super) struct Jobs {
    tiles: u32,
    per: u32,
    groups: u32,
    ranges: u32,
    length: u32,
    mapped: u32,
}

/// `TensorMap` of `hopper.cuh`: rows of a pool, for the copy engine.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct TensorMap {
    words: [u64; 16],
}

impl Items {
    /// With K and V for the copy engine, where that can read this pool.
    pub fn mapped(self, cache: &KvPool<'_>, pool: &PoolArg) -> (Items, [TensorMap; 2]) {
        match maps(cache, pool, PAGE, 1) {
            Some(maps) => (Items { mapped: 1, ..self }, maps),
            None => (self, Zeroable::zeroed()),
        }
    }
}

impl Jobs {
    /// With K for the copy engine, where that can read this pool.
    pub fn mapped(self, cache: &KvPool<'_>, pool: &PoolArg) -> (Jobs, TensorMap) {
        match map(cache, pool.k, PAGE, 1) {
            Some(k) => (Jobs { mapped: 1, ..self }, k),
            None => (self, TensorMap::zeroed()),
        }
    }
}

/// K and V for decode attention, whose boxes are 16 whole rows.
pub(super) fn decode_maps(
    l: &Limits,
    cache: &KvPool<'_>,
    pool: &PoolArg,
) -> Option<[TensorMap; 2]> {
    let d = cache.head_dim;
    let reads = l.wgmma && DIMS.contains(&d);
    reads.then(|| maps(cache, pool, 16, d / PANEL)).flatten()
}

fn maps(c: &KvPool<'_>, pool: &PoolArg, rows: usize, panels: usize) -> Option<[TensorMap; 2]> {
    Some([map(c, pool.k, rows, panels)?, map(c, pool.v, rows, panels)?])
}

/// The pool at device address `at` in boxes of so many rows of a page and panels of their dimensions. None: the kernels
/// copy by themselves, as they do where K lies in two pieces.
fn map(cache: &KvPool<'_>, at: u64, rows: usize, panels: usize) -> Option<TensorMap> {
    use sys::CUtensorMapDataType::{
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as BF16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 as F16,
    };
    if cache.lead != cache.head_dim {
        return None;
    }
    let all = cache.n_pages.checked_mul(cache.kv_heads)?.checked_mul(PAGE)?;
    let size = [PANEL as u64, all as u64, (cache.head_dim / PANEL) as u64];
    let stride = [cache.head_dim as u64 * 2, PANEL as u64 * 2];
    let (cut, step) = ([PANEL as u32, rows as u32, panels as u32], [1u32; 3]);
    let dtype = if cache.k.dtype() == DType::BF16 { BF16 } else { F16 };
    let mut made = sys::CUtensorMap { opaque: [0; 16] };
    // Without the function in the driver cudarc panics, once; the kernels then copy by themselves.
    static MISSING: AtomicBool = AtomicBool::new(false);
    if MISSING.load(Ordering::Relaxed) {
        return None;
    }
    let done = catch_unwind(move || {
        // SAFETY: all arrays outlive the call and hold as many numbers as a map of rank 3 takes; the pool's memory is
        // only described here.
        let said = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut made,
                dtype,
                3,
                at as *mut std::ffi::c_void,
                size.as_ptr(),
                stride.as_ptr(),
                cut.as_ptr(),
                step.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        said.result().ok().map(|()| TensorMap { words: made.opaque })
    });
    MISSING.store(done.is_err(), Ordering::Relaxed);
    done.ok().flatten()
}

/// Whether there is a kernel for these activations, this cache and so many vectors of a sequence.
fn serves(limits: &Limits, act: DType, kv: DType, d: usize, scale: f32) -> bool {
    // Running maxima are those of the unscaled logits.
    limits.wgmma && act == kv && kv != DType::F32 && DIMS.contains(&d) && scale > 0.0
}

/// A launch of `attend_wgmma`: `vectors` of each of `planes` (sequences times splits), over at most `max_kv` keys;
/// `parts` sets of heads share keys. None: another kernel is to be taken.
pub(super) fn attend(
    op: &'static str,
    limits: &Limits,
    (act, kv, d, scale): (DType, DType, usize, f32),
    [vectors, parts, planes]: [usize; 3],
    max_kv: usize,
) -> Result<Option<(Items, Shape)>> {
    if !serves(limits, act, kv, d, scale) || vectors < LEAST {
        return Ok(None);
    }
    let stages = if d > 64 { 2 } else { 4 };
    let shared = TILE * d * 2 * (1 + 2 * stages) + 512 + stages * 1024 + ALIGN;
    let tiles = vectors.div_ceil(TILE);
    let near = (NEAR / (max_kv * d * 4).max(1)).clamp(1, parts.max(1));
    let items = Items {
        tiles: word(op, "tiles of rows", tiles)?,
        parts: word(op, "heads", parts)?,
        planes: word(op, "sequences and splits", planes)?,
        near: word(op, "heads", near)?,
        mapped: 0,
    };
    let all = tiles.saturating_mul(parts).saturating_mul(planes);
    word(op, "tiles of rows and heads", all)?;
    Ok(Some((items, shape(limits, all, shared))))
}

/// A launch of `score_wgmma`: `n` tiles of up to `vectors`, `lists` of them each. None: another kernel is to be taken.
pub(super) fn score(
    op: &'static str,
    limits: &Limits,
    (act, kv, d, scale): (DType, DType, usize, f32),
    [vectors, lists, n]: [usize; 3],
    max_kv: usize,
) -> Result<Option<(Jobs, Shape)>> {
    const STAGES: usize = 4;
    /// Jobs for each multiprocessor, where ranges of keys can be had that are not too short.
    const EACH: usize = 8;
    const SHORTEST: usize = 8;
    if !serves(limits, act, kv, d, scale) || !(LEAST..=2 * TILE).contains(&vectors) {
        return Ok(None);
    }
    let per = if vectors <= TILE { 2 } else { 1 };
    let groups = n.div_ceil(per);
    let keys = max_kv.div_ceil(TILE);
    let want = (EACH * limits.sms).div_ceil((groups * lists).max(1));
    let length = keys.div_ceil(want).max(SHORTEST);
    let ranges = keys.div_ceil(length);
    let jobs = Jobs {
        tiles: word(op, "tiles", n)?,
        per: word(op, "tiles of a job", per)?,
        groups: word(op, "tiles", groups)?,
        ranges: word(op, "ranges of keys", ranges)?,
        length: word(op, "keys", length)?,
        mapped: 0,
    };
    let all = groups.saturating_mul(lists).saturating_mul(ranges);
    word(op, "tiles and lists", all)?;
    let shared = TILE * d * 2 * (2 + STAGES) + 4608 + ALIGN;
    Ok(Some((jobs, shape(limits, all, shared))))
}

/// A block for every multiprocessor, which takes items until there are none left.
fn shape(limits: &Limits, items: usize, shared: usize) -> Shape {
    Shape::new([items.min(limits.sms), 1, 1], THREADS).shared(shared)
}

#[cfg(test)]
super::args::same_sizes! {
    "attend_rows" "Items" Items,
    "score_tiles" "Jobs" Jobs,
    "attend_dense" "TensorMap" TensorMap,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::launch::holds;

    const LLAMA: (DType, DType, usize, f32) = (DType::BF16, DType::BF16, 128, 0.088);

    #[test]
    fn kernels_have_the_same_room_behind_their_rings() {
        holds("attend_dense", "room = 512 + stages * 1024;");
        holds("attend_rows", "room = 512 + stages * 1024;");
        holds("score_tiles", "room = 4608;");
    }

    #[test]
    fn other_devices_and_types_take_other_kernels() {
        let ask = |limits: &Limits, kind, vectors| {
            attend("attend_dense", limits, kind, [vectors, 8, 1], 1000).unwrap()
        };
        assert!(ask(&Limits::H100, LLAMA, 64).is_some());
        assert!(ask(&Limits::H100, LLAMA, 63).is_none());
        assert!(ask(&Limits { wgmma: false, ..Limits::H100 }, LLAMA, 64).is_none());
        for kind in [
            (DType::F32, DType::BF16, 128, 1.0),
            (DType::F32, DType::F32, 128, 1.0),
            (DType::F16, DType::F16, 96, 1.0),
            (DType::F16, DType::F16, 128, -1.0),
        ] {
            assert!(ask(&Limits::H100, kind, 4096).is_none(), "{kind:?}");
        }
    }

    #[test]
    fn shared_memory_fits_and_no_item_is_left_out() {
        for d in DIMS {
            let kind = (DType::F16, DType::F16, d, 1.0);
            for max_kv in [1, 4096, 1 << 20] {
                let (items, shape) =
                    attend("attend_rows", &Limits::H100, kind, [300, 8, 5], max_kv)
                        .unwrap()
                        .unwrap();
                assert!(shape.shared <= Limits::H100.shared && (1..=8).contains(&items.near));
                assert_eq!(items.tiles * items.parts * items.planes, 120);
                assert_eq!(shape.grid, [120, 1, 1]);
                for vectors in [64, 128, 129, 256] {
                    let (jobs, shape) =
                        score("score_tiles", &Limits::H100, kind, [vectors, 8, 33], max_kv)
                            .unwrap()
                            .unwrap();
                    assert!(shape.shared <= Limits::H100.shared);
                    assert_eq!(jobs.groups, if vectors > 128 { 33 } else { 17 });
                    assert!(jobs.ranges as usize * jobs.length as usize * 128 >= max_kv);
                }
            }
        }
        assert!(score("score_tiles", &Limits::H100, LLAMA, [257, 8, 33], 1000).unwrap().is_none());
    }
}
