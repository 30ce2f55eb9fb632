//! `score_dims` on the leading dimensions, their int8 copy, and the compact slice.

use super::check::{self, Check, Pair, Small, bytes, expected, f32_limit, part, tiles_of};
use super::inputs::{KvSet, Rig, sets_for, words};
use super::run::Case;
use super::{KernelBench, Op};
use crate::backend::{
    Backend, CompactSlice, DType, HeadPool, Int8Keys, LogitScale, PAGE, Result, ScoreDims,
    ScoreSource, Tensor, reference,
};
use crate::bench::random::Values;

/// Keys besides the pool, one per set.
enum Keys {
    Lead,
    Int8(Vec<(Tensor, Tensor)>),
    Slice { data: Vec<Tensor>, dims: Tensor },
}

/// Scores of every token, the group's logits summed.
pub(super) struct Score<'k> {
    kv: &'k [KvSet],
    keys: Keys,
    q: Tensor,
    scores: Tensor,
    bytes: u64,
}

/// Rows of keys that a launch reads.
fn key_rows(rig: &Rig<'_>) -> usize {
    rig.batch * rig.o.kv_heads * rig.o.depth
}

impl<'k> Score<'k> {
    /// Bytes that scores on the leading dimensions read and write: the least of the three.
    pub fn lead_bytes(rig: &Rig<'_>) -> u64 {
        (key_rows(rig) * (rig.o.dims * rig.o.dtype.bytes() + 4)) as u64
    }

    pub fn new(rig: &mut Rig<'_>, kv: &'k [KvSet], op: Op) -> Result<Self> {
        let (b, o) = (rig.b, rig.o);
        let pairs = rig.batch * o.kv_heads;
        let q = rig.query()?;
        let key = match op {
            Op::ScoreInt8 => o.dims + 4,
            _ => o.dims * o.dtype.bytes(),
        };
        let bytes = (key_rows(rig) * (key + 4) + q.bytes()) as u64;
        let wanted = sets_for(bytes);
        let keys = match op {
            Op::ScoreInt8 => {
                let rows = pairs * o.stride();
                let sets = (0..fit(rig, wanted, rows * key)).map(|_| {
                    let mut new =
                        |dtype, len, what, values| rig.random.tensor(b, dtype, len, what, values);
                    let data = new(DType::I8, rows * o.dims, "int8 keys", Values::Normal)?;
                    Ok((data, new(DType::F32, rows, "int8 key scales", Values::Scale)?))
                });
                Keys::Int8(sets.collect::<Result<_>>()?)
            }
            Op::ScoreSlice => {
                let len = pairs * o.stride() * o.dims;
                let data = (0..fit(rig, wanted, len * o.dtype.bytes()))
                    .map(|_| rig.random.tensor(b, o.dtype, len, "compact slice", Values::Normal))
                    .collect::<Result<_>>()?;
                let mut dims = Vec::with_capacity(pairs * o.dims);
                for _ in 0..pairs {
                    dims.extend_from_slice(&rig.random.shuffled(o.head_dim)[..o.dims]);
                }
                Keys::Slice { data, dims: words(b, &dims, "chosen dimensions")? }
            }
            _ => Keys::Lead,
        };
        let kv = match keys {
            Keys::Lead => &kv[..wanted.min(kv.len())],
            _ => kv,
        };
        let scores = b.alloc(DType::F32, pairs * o.stride(), "token scores")?;
        Ok(Score { kv, keys, q, scores, bytes })
    }

    fn kv(&self, set: usize) -> &KvSet {
        &self.kv[set % self.kv.len()]
    }

    fn source(&self, o: &KernelBench, batch: usize, set: usize) -> ScoreSource<'_> {
        match &self.keys {
            Keys::Lead => ScoreSource::Lead { n: o.dims },
            Keys::Int8(sets) => {
                let (data, scale) = &sets[set];
                ScoreSource::Int8 { keys: Int8Keys { data, scale, dims: o.dims }, n: o.dims }
            }
            Keys::Slice { data, dims } => ScoreSource::Slice(CompactSlice {
                data: &data[set],
                dims,
                n_dims: o.dims,
                capacity: o.stride(),
                slots: batch,
            }),
        }
    }
}

/// As many sets of `bytes` as wanted and as half of the free memory holds; at least one.
fn fit(rig: &Rig<'_>, wanted: usize, bytes: usize) -> usize {
    let free = rig.b.free_memory().unwrap_or(u64::MAX) / 2;
    wanted.min(usize::try_from(free / bytes.max(1) as u64).unwrap_or(usize::MAX)).max(1)
}

impl Case for Score<'_> {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn sets(&self) -> usize {
        match &self.keys {
            Keys::Lead => self.kv.len(),
            Keys::Int8(sets) => sets.len(),
            Keys::Slice { data, .. } => data.len(),
        }
    }
    fn launch(&self, rig: &Rig<'_>, set: usize) -> Result<()> {
        let kv = self.kv(set);
        rig.b.score_dims(&ScoreDims {
            q: &self.q,
            seqs: rig.seqs(kv),
            cache: rig.pool(kv),
            source: self.source(rig.o, rig.batch, set),
            heads: rig.o.heads,
            pool: HeadPool::SumLogit,
            scale: LogitScale::InvSqrtDim,
            scores: &self.scores,
            stride: rig.o.stride(),
        })
    }
    fn check(&self, rig: &Rig<'_>, set: usize) -> Result<Check> {
        let (o, b, pair) = (rig.o, rig.b, Pair::last(rig));
        let small = Small::cut(rig, &pair, self.kv(set), &self.q, false)?;
        let host = &small.host;
        let head = pair.sequence * o.kv_heads + pair.kv_head;
        // The pair's own keys, in tensors of one sequence and one KV head.
        let (one, two) = match &self.keys {
            Keys::Lead => (None, None),
            Keys::Int8(sets) => {
                let tiles = |t: &Tensor, w: usize| {
                    let bytes = tiles_of(rig, &pair, self.kv(set), t, PAGE * w)?;
                    check::upload(host, t.dtype(), &bytes)
                };
                (Some(tiles(&sets[set].0, o.dims)?), Some(tiles(&sets[set].1, 1)?))
            }
            Keys::Slice { data, dims } => {
                let len = o.stride() * o.dims;
                let rows = bytes(b, &data[set].slice(head * len, len))?;
                let chosen = check::part_words(b, dims, head * o.dims, o.dims)?;
                let chosen = check::upload(host, DType::U32, bytemuck::cast_slice(&chosen))?;
                (Some(check::upload(host, o.dtype, &rows)?), Some(chosen))
            }
        };
        let source = match (&self.keys, &one, &two) {
            (Keys::Int8(_), Some(data), Some(scale)) => {
                ScoreSource::Int8 { keys: Int8Keys { data, scale, dims: o.dims }, n: o.dims }
            }
            (Keys::Slice { .. }, Some(data), Some(dims)) => ScoreSource::Slice(CompactSlice {
                data,
                dims,
                n_dims: o.dims,
                capacity: o.stride(),
                slots: 1,
            }),
            _ => ScoreSource::Lead { n: o.dims },
        };
        let scores = host.alloc(DType::F32, o.stride(), "reference check")?;
        let p = ScoreDims {
            q: &small.q,
            seqs: small.seqs(),
            cache: small.pool(),
            source,
            heads: o.heads / o.kv_heads,
            pool: HeadPool::SumLogit,
            scale: LogitScale::InvSqrtDim,
            scores: &scores,
            stride: o.stride(),
        };
        let want = expected(&reference::score_dims(&p, host)?, 0, o.depth);
        let got = part(b, &self.scores, head * o.stride(), o.depth)?;
        Ok(pair.nmse(&got, &want, f32_limit(o.heads / o.kv_heads * o.dims)))
    }
    #[cfg(test)]
    fn output(&self) -> &Tensor {
        &self.scores
    }
}
