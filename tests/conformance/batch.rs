//! Ragged batches, shuffled page lists and filled KV pools.

use super::rig::{Outcome, Rig};
use longsight::backend::{DType, KvPool, META_WORDS, Meta, PAGE, Seqs, Tensor};

/// One sequence of a [`Batch`].
#[derive(Clone, Debug)]
pub struct Placed {
    pub q_start: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub slot: usize,
    pub step: u32,
    pub pages: Vec<u32>,
    list_at: usize,
}

/// Sequences with their device records. Rows 0 and `rows - 1` belong to nobody.
pub struct Batch {
    pub seqs: Vec<Placed>,
    meta: Tensor,
    pages: Tensor,
    pub max_kv: usize,
    pub max_q: usize,
    pub rows: usize,
    pub slots: usize,
    pub n_pages: usize,
    settled: bool,
}

impl Batch {
    /// `shape`: (rows of the step, cached tokens) per sequence. Rows are laid out in reverse order of the
    /// sequences, pages and slots shuffled, and each sequence has room for 64 tokens more.
    pub fn new(rig: &mut Rig, shape: &[(usize, usize)]) -> Outcome<Batch> {
        let need: usize = shape.iter().map(|(_, kv)| (kv + PAGE).div_ceil(PAGE)).sum();
        let n_pages = need + 3;
        let mut free = rig.shuffled(n_pages);
        let slots = shape.len() + 1;
        let slot = rig.shuffled(slots);
        let rows = shape.iter().map(|(q, _)| q).sum::<usize>() + 2;
        let mut end = rows - 1;
        let mut lists = vec![u32::MAX; 3];
        let mut seqs = Vec::new();
        for (n, (q_len, kv_len)) in shape.iter().copied().enumerate() {
            end -= q_len;
            let take = (kv_len + PAGE).div_ceil(PAGE);
            let pages: Vec<u32> = free.drain(..take).map(|p| p as u32).collect();
            let list_at = lists.len();
            lists.extend(&pages);
            lists.push(u32::MAX);
            let (q_start, slot) = (end, slot[n]);
            seqs.push(Placed { q_start, q_len, kv_len, slot, step: 0, pages, list_at });
        }
        let pages = rig.words(&lists)?;
        let meta = rig.zeros(DType::U32, shape.len() * META_WORDS)?;
        let max_kv = shape.iter().map(|s| s.1).max().unwrap_or(0) + 37;
        let max_q = shape.iter().map(|s| s.0).max().unwrap_or(0);
        let batch = Batch { seqs, meta, pages, max_kv, max_q, rows, slots, n_pages, settled: true };
        batch.publish(rig)?;
        Ok(batch)
    }

    /// The same rows as sequences of up to `tile` rows each, which share the page list of the one they are cut from.
    pub fn cut(self, rig: &mut Rig, tile: usize) -> Outcome<Batch> {
        let mut seqs = Vec::new();
        for s in &self.seqs {
            for at in (0..s.q_len).step_by(tile) {
                let q_len = tile.min(s.q_len - at);
                let kv_len = s.kv_len - s.q_len + at + q_len;
                seqs.push(Placed { q_start: s.q_start + at, q_len, kv_len, ..s.clone() });
            }
        }
        let meta = rig.zeros(DType::U32, seqs.len() * META_WORDS)?;
        let batch = Batch { seqs, meta, max_q: tile, settled: false, ..self };
        batch.publish(rig)?;
        Ok(batch)
    }

    /// Decode: one row per sequence.
    pub fn decode(rig: &mut Rig, kv: &[usize]) -> Outcome<Batch> {
        Batch::new(rig, &kv.iter().map(|kv| (1, *kv)).collect::<Vec<_>>())
    }

    /// Writes the records to the device.
    pub fn publish(&self, rig: &mut Rig) -> Outcome {
        // Words without a meaning are poisoned.
        let mut words = vec![f64::from(u32::MAX); self.seqs.len() * META_WORDS];
        for (s, m) in self.seqs.iter().zip(words.chunks_exact_mut(META_WORDS)) {
            m[Meta::Q_START] = s.q_start as f64;
            m[Meta::Q_LEN] = s.q_len as f64;
            m[Meta::KV_LEN] = s.kv_len as f64;
            m[Meta::PAGES] = s.list_at as f64;
            m[Meta::SLOT] = s.slot as f64;
            m[Meta::STEP] = f64::from(s.step);
        }
        rig.write(&self.meta, &words)
    }

    /// One decode step later: every sequence has one token more.
    pub fn advance(&mut self, rig: &mut Rig) -> Outcome {
        for s in &mut self.seqs {
            s.kv_len += 1;
            s.step += 1;
        }
        self.publish(rig)
    }

    pub fn seqs(&self) -> Seqs<'_> {
        Seqs {
            meta: &self.meta,
            pages: &self.pages,
            n: self.seqs.len(),
            max_kv: self.max_kv,
            max_q: self.max_q,
            rows: self.rows,
            settled: self.settled,
        }
    }

    pub fn n(&self) -> usize {
        self.seqs.len()
    }

    /// Smallest legal stride of score rows.
    pub fn stride(&self) -> usize {
        self.max_kv.next_multiple_of(PAGE)
    }

    /// `[rows, stride]` normal values in the first `width` columns of the sequences' rows, NaN elsewhere.
    pub fn row_values(&self, rig: &mut Rig, width: usize, stride: usize) -> Vec<f64> {
        let mut values = vec![f64::NAN; (self.rows - 1) * stride + width];
        for s in &self.seqs {
            for r in s.q_start..s.q_start + s.q_len {
                values[r * stride..][..width].copy_from_slice(&rig.normal(width, 1.0));
            }
        }
        values
    }

    /// Queries `[rows, heads, head_dim]`.
    pub fn queries(&self, rig: &mut Rig, dtype: DType, width: usize) -> Outcome<Tensor> {
        let values = self.row_values(rig, width, width);
        rig.input(dtype, &values)
    }

    /// Scores `[n, rows_per_seq, stride]` with NaN from `kv_len` on.
    pub fn scores(&self, rig: &mut Rig, rows_per_seq: usize, scale: f64) -> Vec<f64> {
        let stride = self.stride();
        let mut values = vec![f64::NAN; self.n() * rows_per_seq * stride];
        for (s, rows) in self.seqs.iter().zip(values.chunks_exact_mut(rows_per_seq * stride)) {
            for row in rows.chunks_exact_mut(stride) {
                row[..s.kv_len].copy_from_slice(&rig.normal(s.kv_len, scale));
            }
        }
        values
    }
}

/// Shape of a KV pool.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub kv_heads: usize,
    pub d: usize,
    pub lead: usize,
}

/// A filled KV pool.
pub struct Cache {
    pub k: Tensor,
    pub v: Tensor,
    n_pages: usize,
    shape: Shape,
}

impl Cache {
    /// Keys and values of the first `hold(sequence)` tokens; NaN in all other rows and pages.
    pub fn new(
        rig: &mut Rig,
        b: &Batch,
        shape: Shape,
        dtype: DType,
        hold: impl Fn(&Placed) -> usize,
    ) -> Outcome<Cache> {
        let k = Cache::values(rig, b, shape, shape.lead, &hold);
        let v = Cache::values(rig, b, shape, shape.d, &hold);
        Cache::of(rig, b, shape, dtype, &k, &v)
    }

    pub fn of(
        rig: &mut Rig,
        b: &Batch,
        shape: Shape,
        dtype: DType,
        k: &[f64],
        v: &[f64],
    ) -> Outcome<Cache> {
        Ok(Cache { k: rig.input(dtype, k)?, v: rig.input(dtype, v)?, n_pages: b.n_pages, shape })
    }

    /// A pool of normal values in the rows of held tokens, NaN elsewhere.
    pub fn values(
        rig: &mut Rig,
        b: &Batch,
        shape: Shape,
        lead: usize,
        hold: &impl Fn(&Placed) -> usize,
    ) -> Vec<f64> {
        let mut values = vec![f64::NAN; b.n_pages * shape.kv_heads * PAGE * shape.d];
        for s in &b.seqs {
            for (j, h) in (0..hold(s)).flat_map(|j| (0..shape.kv_heads).map(move |h| (j, h))) {
                for (i, x) in rig.normal(shape.d, 1.0).into_iter().enumerate() {
                    values[Cache::at(s, Shape { lead, ..shape }, h, j, i)] = x;
                }
            }
        }
        values
    }

    /// Index of dimension `i` of token `j` and KV head `h`.
    pub fn at(s: &Placed, shape: Shape, h: usize, j: usize, i: usize) -> usize {
        let tile = s.pages[j / PAGE] as usize * shape.kv_heads + h;
        tile * PAGE * shape.d + KvPool::k_offset(shape.lead, shape.d, j % PAGE, i)
    }

    pub fn pool(&self) -> KvPool<'_> {
        KvPool {
            k: &self.k,
            v: &self.v,
            n_pages: self.n_pages,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.d,
            lead: self.shape.lead,
        }
    }
}
