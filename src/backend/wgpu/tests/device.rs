//! What conformance cannot see: split weights, limits, driver errors. Skipped without an adapter, unless
//! `LONGSIGHT_REQUIRE` names wgpu.

use super::*;
use crate::backend::{KvPool, Seqs};

fn backend() -> Option<WgpuBackend> {
    match WgpuBackend::open(None) {
        Ok(b) => Some(b),
        Err(e) => {
            let required = std::env::var("LONGSIGHT_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name.trim() == "wgpu"), "{e}");
            eprintln!("skipped: {e}");
            None
        }
    }
}

fn floats(b: &WgpuBackend, values: &[f32]) -> Tensor {
    let t = b.alloc(DType::F32, values.len(), "test").expect("alloc");
    b.upload(&t, bytemuck::cast_slice(values)).expect("upload");
    t
}

fn read(b: &WgpuBackend, t: &Tensor) -> Vec<f32> {
    let mut out = vec![0f32; t.len()];
    b.download(t, bytemuck::cast_slice_mut(&mut out)).expect("download");
    out
}

/// A weight beyond the binding limit is read in pieces, with the same bits as in one.
#[test]
fn weights_above_the_binding_limit_are_split() {
    let Some(mut b) = backend() else { return };
    let (inputs, outputs) = (24, 700);
    let w: Vec<f32> = (0..inputs * outputs).map(|i| ((i * 37 % 101) as f32) / 50.0 - 1.0).collect();
    let w = floats(&b, &w);
    let tokens = b.alloc(DType::U32, 3, "tokens").expect("alloc");
    b.upload(&tokens, bytemuck::cast_slice(&[699u32, 0, 700])).expect("upload");
    let limit = b.gpu.limits.max_storage_buffer_binding_size;
    for rows in [1, 6] {
        let x: Vec<f32> = (0..rows * inputs).map(|i| (i % 7) as f32 - 3.0).collect();
        let x = floats(&b, &x);
        let mut seen: Vec<(Vec<f32>, Vec<f32>)> = Vec::new();
        for limit in [limit, 20_000] {
            b.gpu.limits.max_storage_buffer_binding_size = limit;
            let y = floats(&b, &vec![0.0; rows * outputs]);
            let accumulate = false;
            let l = Linear { x: &x, w: &w, bias: None, y: &y, rows, inputs, outputs, accumulate };
            b.linear(&l).expect("linear");
            let out = floats(&b, &vec![9.0; 3 * inputs]);
            let (cols, vocab) = (inputs, outputs);
            b.embed(&Embed {
                tokens: &tokens,
                table: &w,
                out: &out,
                rows: 3,
                cols,
                vocab,
                scale: 1.0,
            })
            .expect("embed");
            seen.push((read(&b, &y), read(&b, &out)));
        }
        b.gpu.limits.max_storage_buffer_binding_size = limit;
        assert_eq!(seen[0], seen[1]);
        assert!(seen[0].0.iter().all(|v| v.is_finite()) && seen[0].0.iter().any(|v| *v != 0.0));
        assert!(seen[0].1[2 * inputs..].iter().all(|v| *v == 0.0), "unknown token");
    }
}

/// Other tensors beyond the limit are refused with a remedy.
#[test]
fn a_tensor_above_the_binding_limit_is_refused() {
    let Some(mut b) = backend() else { return };
    b.gpu.limits.max_storage_buffer_binding_size = 1024;
    let (x, out) = (floats(&b, &[1.0; 4096]), floats(&b, &[0.0; 2048]));
    let r = b.swiglu(&SwiGlu { x: &x, out: &out, rows: 1, ffn: 2048 });
    assert!(matches!(r, Err(BackendError::BufferLimit { limit: 1024, .. })), "{r:?}");
    b.gpu.limits.max_buffer_size = 1 << 20;
    let r = b.alloc(DType::F32, 1 << 20, "a big one");
    assert!(matches!(&r, Err(BackendError::BufferLimit { what, .. }) if what == "a big one"));
    let r = b.alloc(DType::F32, usize::MAX, "overflow");
    assert!(matches!(r, Err(BackendError::BufferLimit { .. })));
    assert!(matches!(b.gpu.scratch(1 << 21), Err(BackendError::BufferLimit { .. })));
}

/// An error outside a call is told once at the next call, and the device goes on.
#[test]
fn a_driver_error_is_reported_at_the_next_call() {
    let Some(b) = backend() else { return };
    let _ = b.gpu.device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("reading and writing at once"),
        size: 16,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::MAP_WRITE,
        mapped_at_creation: false,
    });
    assert!(matches!(b.sync(), Err(BackendError::Driver { .. })));
    b.sync().expect("reported once");
}

#[test]
fn an_unknown_adapter_is_named() {
    let e = WgpuBackend::open(Some("no such adapter")).expect_err("no such adapter").to_string();
    assert!(e.contains("no such adapter") || e.contains("install"), "{e}");
}

/// Input and output may be slices of one buffer, which wgpu itself forbids.
#[test]
fn slices_of_one_buffer() {
    let Some(b) = backend() else { return };
    let both = floats(&b, &vec![2.0; 192]);
    let (x, out) = (both.slice(0, 128), both.slice(128, 64));
    b.swiglu(&SwiGlu { x: &x, out: &out, rows: 1, ffn: 64 }).expect("swiglu");
    let want = 2.0 / (1.0 + (-2.0f32).exp()) * 2.0;
    assert!(read(&b, &out).iter().all(|v| (v - want).abs() < 1e-5));
    b.copy(&both.slice(0, 64), &both.slice(64, 64)).expect("copy");
}

/// Without `lse`; listing every token gives dense attention.
#[test]
fn attention_without_lse() {
    let Some(b) = backend() else { return };
    let words = |v: &[u32]| {
        let t = b.alloc(DType::U32, v.len(), "words").expect("alloc");
        b.upload(&t, bytemuck::cast_slice(v)).expect("upload");
        t
    };
    let noise = |n: usize, m: usize| -> Vec<f32> {
        (0..n).map(|i| (i * m % 97) as f32 / 48.5 - 1.0).collect()
    };
    let (heads, d) = (2, 8);
    let (k, v) = (floats(&b, &noise(128 * d, 31)), floats(&b, &noise(128 * d, 57)));
    let q = floats(&b, &noise(heads * d, 13));
    let (meta, pages) = (words(&[0, 1, 100, 0, 0, 0, 0, 0]), words(&[1, 0]));
    let seqs =
        Seqs { meta: &meta, pages: &pages, n: 1, max_kv: 100, max_q: 1, rows: 1, settled: false };
    let cache = KvPool { k: &k, v: &v, n_pages: 2, kv_heads: 1, head_dim: d, lead: d };
    let (dense, listed) = (floats(&b, &[0.0; 16]), floats(&b, &[0.0; 16]));
    let (window, lse, splits, scale) = (None, None, 1, 0.35);
    b.attend_dense(&AttendDense {
        q: &q,
        seqs,
        cache,
        heads,
        scale,
        window,
        splits,
        out: &dense,
        lse,
        values: true,
        logits: None,
    })
    .expect("attend_dense");
    let all: Vec<u32> = (0..100).collect();
    let (indices, counts) = (words(&all), words(&[100]));
    b.attend_rows(&AttendRows {
        q: &q,
        seqs,
        cache,
        heads,
        scale,
        indices: &indices,
        counts: &counts,
        k: 100,
        rows_per_seq: 1,
        head_map: None,
        settled: false,
        splits,
        out: &listed,
        lse,
    })
    .expect("attend_rows");
    let (dense, listed) = (read(&b, &dense), read(&b, &listed));
    assert!(dense.iter().zip(&listed).all(|(a, b)| (a - b).abs() < 1e-5), "{dense:?} {listed:?}");
    assert!(dense.iter().any(|v| v.abs() > 1e-3));
}
