//! What reads the cache right behind the op that appends to it finds the new token there, also where its kernel begins
//! before that op's has ended: the same bits as with a wait in between, and nothing of the NaN that lay there before.

mod common;

use common::cache::backends;
use longsight::backend::reference::encode;
use longsight::backend::{
    AttendDense, Backend, DType, HeadPool, Int8Keys, KvAppend, KvPool, LogitScale, Logits,
    META_WORDS, Meta, PAGE, Rope, ScoreDims, ScoreSource, Seqs, Tensor,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const D: usize = 64;
const KV: usize = 2;
const HEADS: usize = 8;
const PAGES: usize = 34;
/// Tokens with the new one: the first of its sequence, of a page and of a tile, the last of one, and within.
const LENGTHS: [usize; 10] = [1, 64, 65, 128, 129, 257, 300, 1024, 1025, 2000];

#[derive(Clone, Copy, Debug)]
enum Reader {
    Attend,
    AttendAndScore,
    Lead,
    Int8,
}

/// A cache, one row to append, and room for what comes out.
struct Step<'a> {
    dev: &'a dyn Backend,
    act: DType,
    len: usize,
    /// Keys, values, int8 keys and their scales with NaN or nonsense from the new token on.
    poisoned: [(Tensor, Vec<u8>); 4],
    meta: Tensor,
    pages: Tensor,
    position: Tensor,
    freq: Tensor,
    /// Queries, keys and values before, queries and keys after the embedding.
    rows: [Tensor; 5],
    out: Tensor,
    scores: Tensor,
}

fn put(dev: &dyn Backend, dtype: DType, n: usize, bytes: &[u8]) -> Tensor {
    let t = dev.alloc(dtype, n, "test").unwrap();
    dev.upload(&t, bytes).unwrap();
    t
}

fn filled(dev: &dyn Backend, dtype: DType, values: &[f64]) -> Tensor {
    put(dev, dtype, values.len(), &encode(dtype, values))
}

impl<'a> Step<'a> {
    fn new(dev: &'a dyn Backend, len: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(len as u64);
        let mut random = |n: usize| -> Vec<f64> {
            (0..n).map(|_| f64::from(rng.random_range(-1.0f32..1.0))).collect()
        };
        let act = dev.caps().activations(DType::F16);
        let rows = PAGES * KV * PAGE;
        // Tokens lie in the pages from the last on.
        let settled = |row: usize| {
            let page = row / (KV * PAGE);
            (PAGES - 1 - page) * PAGE + row % PAGE < len - 1
        };
        let mut poison = |width: usize, dtype: DType, range: f64, with: f64| {
            let mut x = random(rows * width);
            for (i, x) in x.iter_mut().enumerate() {
                *x = if settled(i / width) { *x * range } else { with };
            }
            let t = dev.alloc(dtype, x.len(), "test").unwrap();
            (t, encode(dtype, &x))
        };
        let poisoned = [
            poison(D, DType::F16, 1.0, f64::NAN),
            poison(D, DType::F16, 1.0, f64::NAN),
            poison(D, DType::I8, 127.0, 127.0),
            poison(1, DType::F32, 0.01, f64::NAN),
        ];
        let words =
            |values: &[u32]| put(dev, DType::U32, values.len(), bytemuck::cast_slice(values));
        let mut record = [0; META_WORDS];
        (record[Meta::Q_LEN], record[Meta::KV_LEN]) = (1, len as u32);
        let list: Vec<u32> = (0..PAGES as u32).rev().collect();
        let widths = [HEADS, KV, KV, HEADS, KV];
        Step {
            act,
            len,
            poisoned,
            meta: words(&record),
            pages: words(&list),
            position: words(&[len as u32 - 1]),
            freq: filled(dev, DType::F32, &random(KV * D / 2)),
            rows: widths.map(|heads| filled(dev, act, &random(heads * D))),
            out: dev.alloc(act, HEADS * D, "test").unwrap(),
            scores: dev.alloc(DType::F32, HEADS * PAGES * PAGE, "test").unwrap(),
            dev,
        }
    }

    /// What `reader` finds right behind an append, with the embedding or without.
    fn run(&self, rope: bool, reader: Reader, wait: bool) -> [Vec<u8>; 2] {
        let dev = self.dev;
        for (t, bytes) in &self.poisoned {
            dev.upload(t, bytes).unwrap();
        }
        dev.zero(&self.out).unwrap();
        dev.zero(&self.scores).unwrap();
        let [k, v, int8, int8_scale] = &self.poisoned;
        let [q_in, k_in, v_in, q_out, k_out] = &self.rows;
        let seqs = Seqs {
            meta: &self.meta,
            pages: &self.pages,
            n: 1,
            max_kv: self.len,
            max_q: 1,
            rows: 1,
            settled: true,
        };
        let cache = KvPool { k: &k.0, v: &v.0, n_pages: PAGES, kv_heads: KV, head_dim: D, lead: D };
        let keys = Int8Keys { data: &int8.0, scale: &int8_scale.0, dims: D };
        let of = |x, heads: usize, out| Rope {
            x,
            x_stride: heads * D,
            positions: &self.position,
            inv_freq: &self.freq,
            heads_per_freq: heads / KV,
            norm: None,
            factor: 1.0,
            out,
            rows: 1,
            heads,
            head_dim: D,
        };
        let ropes = [of(q_in, HEADS, q_out), of(k_in, KV, k_out)];
        let append = KvAppend {
            k: k_out,
            k_stride: KV * D,
            v: v_in,
            v_stride: KV * D,
            seqs,
            cache,
            int8: Some(keys),
            slice: None,
        };
        if rope {
            dev.rope_append([&ropes[0], &ropes[1]], &append).unwrap();
        } else {
            dev.rope_both([&ropes[0], &ropes[1]]).unwrap();
            dev.kv_append(&append).unwrap();
        }
        if wait {
            dev.sync().unwrap();
        }
        let (scores, stride) = (&self.scores, PAGES * PAGE);
        let attend = |logits| {
            let scale = 1.0 / (D as f32).sqrt();
            let (window, splits, values, lse) = (None, 1, true, None);
            let (q, heads, out) = (q_out, HEADS, &self.out);
            let p = AttendDense {
                q,
                seqs,
                cache,
                heads,
                scale,
                window,
                splits,
                out,
                lse,
                values,
                logits,
            };
            dev.attend_dense(&p).unwrap();
        };
        let score = |source, pool| {
            let scale = LogitScale::InvSqrtDim;
            let (q, heads) = (q_out, HEADS);
            let p = ScoreDims { q, seqs, cache, source, heads, pool, scale, scores, stride };
            dev.score_dims(&p).unwrap();
        };
        match reader {
            Reader::Attend => attend(None),
            Reader::AttendAndScore => attend(Some(Logits { scores, stride, pool: HeadPool::None })),
            Reader::Lead => score(ScoreSource::Lead { n: D }, HeadPool::None),
            Reader::Int8 => score(ScoreSource::Int8 { keys, n: D }, HeadPool::SumLogit),
        }
        [&self.out, scores].map(|t| {
            let mut bytes = vec![0; t.bytes()];
            dev.download(t, &mut bytes).unwrap();
            bytes
        })
    }
}

#[test]
fn what_is_appended_is_there_for_the_next_op() {
    for dev in backends() {
        // Only there kernels may begin early.
        let times = if dev.name() == "cuda" { 50 } else { 1 };
        for len in LENGTHS {
            let step = Step::new(&*dev, len);
            for reader in [Reader::Attend, Reader::AttendAndScore, Reader::Lead, Reader::Int8] {
                for rope in [true, false] {
                    let want = step.run(rope, reader, true);
                    let name = format!("{}: {len} tokens, {reader:?}, rope {rope}", dev.name());
                    let nan = |dtype, bytes: &[u8]| {
                        longsight::backend::reference::decode(dtype, bytes)
                            .iter()
                            .any(|x| !x.is_finite())
                    };
                    assert!(!nan(step.act, &want[0]) && !nan(DType::F32, &want[1]), "{name}");
                    assert!(
                        want.iter().any(|t| t.iter().any(|b| *b != 0)),
                        "{name}: nothing written"
                    );
                    for time in 0..times {
                        assert!(step.run(rope, reader, false) == want, "{name}, time {time}");
                    }
                }
            }
        }
    }
}
