//! alloc, upload, download, copy, zero.

use super::Cases;
use super::rig::{Outcome, Rig, fail};
use longsight::backend::{Backend, BackendError, DType};

const ALL: [DType; 5] = [DType::F32, DType::F16, DType::BF16, DType::I8, DType::U32];

pub fn cases(c: &mut Cases) {
    c.add("memory", "alloc_is_zero_and_round_trips", |rig, _| {
        for dtype in ALL.into_iter().filter(|d| held(rig, *d)) {
            for len in [1, 3, 64, 1000, 70_001] {
                round_trip(&*rig.dev, dtype, len)?;
            }
        }
        Ok(())
    });
    c.add("memory", "copy_and_zero_of_slices", |rig, _| {
        for dtype in ALL.into_iter().filter(|d| held(rig, *d)) {
            copy_and_zero(&*rig.dev, dtype)?;
        }
        Ok(())
    });
    c.add("memory", "refuses_wrong_sizes", |rig, _| {
        let dev = rig.dev.clone();
        let t = dev.alloc(DType::F32, 1024, "test")?;
        let u = dev.alloc(DType::U32, 1024, "test")?;
        rig.refuses("upload too short", dev.upload(&t, &[0; 4092]))?;
        rig.refuses("upload too long", dev.upload(&t, &[0; 4100]))?;
        rig.refuses("download too short", dev.download(&t, &mut [0; 4]))?;
        rig.refuses("copy of other dtype", dev.copy(&t, &u))?;
        rig.refuses("copy of other length", dev.copy(&t, &t.slice(0, 512)))?;
        rig.refuses("overlapping copy", dev.copy(&t.slice(0, 512), &t.slice(256, 512)))
    });
    c.add("memory", "too_large_is_an_error", |rig, _| {
        match rig.dev.alloc(DType::F32, 1 << 50, "huge") {
            Err(BackendError::OutOfMemory { .. } | BackendError::BufferLimit { .. }) => Ok(()),
            Err(e) => fail(format!("4 PiB: expected OutOfMemory or BufferLimit, got: {e}")),
            Ok(_) => fail("4 PiB were allocated"),
        }
    });
}

/// The device stores this dtype (integers always).
fn held(rig: &Rig, dtype: DType) -> bool {
    !dtype.is_float() || rig.dev.caps().storage.contains(&dtype)
}

fn pattern(bytes: usize, salt: u8) -> Vec<u8> {
    (0..bytes).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ salt).collect()
}

fn round_trip(dev: &dyn Backend, dtype: DType, len: usize) -> Outcome {
    let t = dev.alloc(dtype, len, "test")?;
    if t.len() != len || t.dtype() != dtype || t.byte_offset() != 0 {
        return fail(format!("alloc of {len} {dtype} gave {t:?}"));
    }
    let mut back = vec![1; t.bytes()];
    dev.download(&t, &mut back)?;
    if back.iter().any(|b| *b != 0) {
        return fail(format!("a new buffer of {len} {dtype} is not zero"));
    }
    let bytes = pattern(t.bytes(), 0);
    dev.upload(&t, &bytes)?;
    dev.download(&t, &mut back)?;
    if back != bytes { fail(format!("{len} {dtype} changed on the way")) } else { Ok(()) }
}

/// Copies and zeroes inner slices; everything beside them stays.
fn copy_and_zero(dev: &dyn Backend, dtype: DType) -> Outcome {
    let (len, size, step) = (2048, dtype.bytes(), 256 / dtype.bytes());
    let (a, b) = (dev.alloc(dtype, len, "a")?, dev.alloc(dtype, len, "b")?);
    let (mut x, mut y) = (pattern(len * size, 1), pattern(len * size, 2));
    dev.upload(&a, &x)?;
    dev.upload(&b, &y)?;
    // Between buffers, inside one buffer, and a zeroed piece; offsets are multiples of 256 bytes.
    let n = 2 * step;
    dev.copy(&a.slice(step, n), &b.slice(2 * step, n))?;
    y[2 * step * size..][..n * size].copy_from_slice(&x[step * size..][..n * size]);
    dev.copy(&a.slice(0, step), &a.slice(4 * step, step))?;
    x.copy_within(..step * size, 4 * step * size);
    dev.zero(&b.slice(step, step))?;
    y[step * size..][..step * size].fill(0);
    let mut back = vec![0; len * size];
    dev.download(&a, &mut back)?;
    if back != x {
        return fail(format!("{dtype}: copy inside one buffer"));
    }
    dev.download(&b, &mut back)?;
    if back != y {
        return fail(format!("{dtype}: copy between buffers or zero"));
    }
    let mut piece = vec![0; n * size];
    dev.download(&b.slice(2 * step, n), &mut piece)?;
    if piece == y[2 * step * size..][..n * size] { Ok(()) } else { fail("download of a slice") }
}
