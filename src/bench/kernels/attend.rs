//! `attend_dense` and `attend_rows` in a decode step, with the merge of their splits.

use super::check::{self, Check, Pair, Small, attention_limit, expected, part, part_words};
use super::inputs::{KvSet, Rig, sets_for, words};
use super::run::Case;
use crate::backend::{
    AttendDense, AttendRows, Backend, DType, Merge, Result, Seqs, Tensor, reference,
};

/// Queries and results of a decode attention.
struct Attention {
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    part: Option<(Tensor, Tensor)>,
    splits: usize,
}

impl Attention {
    /// For `tokens` keys per (sequence, KV head).
    fn new(rig: &mut Rig<'_>, kv: &[KvSet], tokens: usize) -> Result<Attention> {
        let (b, o) = (rig.b, rig.o);
        let heads = rig.batch * o.heads;
        let pairs = rig.batch * o.kv_heads;
        let splits =
            kv.first().map_or(1, |s| b.splits(rig.act, &rig.pool(s), pairs, tokens)).max(1);
        let part = (splits > 1)
            .then(|| -> Result<_> {
                let out = b.alloc(DType::F32, splits * heads * o.head_dim, "attention splits")?;
                Ok((out, b.alloc(DType::F32, splits * heads, "attention splits")?))
            })
            .transpose()?;
        Ok(Attention {
            q: rig.query()?,
            out: b.alloc(rig.act, heads * o.head_dim, "attention output")?,
            lse: b.alloc(DType::F32, heads, "log-sum-exp")?,
            part,
            splits,
        })
    }

    /// Runs `attend(out, lse, splits)`, and the merge where there are splits.
    fn launch(
        &self,
        rig: &Rig<'_>,
        seqs: Seqs<'_>,
        attend: impl Fn(&Tensor, &Tensor, usize) -> Result<()>,
    ) -> Result<()> {
        let Some((part, part_lse)) = &self.part else {
            return attend(&self.out, &self.lse, 1);
        };
        attend(part, part_lse, self.splits)?;
        rig.b.merge(&Merge {
            part,
            part_lse,
            seqs,
            splits: self.splits,
            heads: rig.o.heads,
            head_dim: rig.o.head_dim,
            out: &self.out,
            lse: Some(&self.lse),
        })
    }

    /// K and V rows, queries in, results out.
    fn bytes(&self, rig: &Rig<'_>, rows: usize) -> u64 {
        let row = rig.o.head_dim * rig.o.dtype.bytes();
        (2 * rig.batch * rig.o.kv_heads * rows * row + self.q.bytes() + self.out.bytes()) as u64
    }

    /// The pair's results against `want`.
    fn compare(&self, rig: &Rig<'_>, pair: &Pair, want: &[f64], tokens: usize) -> Result<Check> {
        let o = rig.o;
        let group = o.heads / o.kv_heads;
        let at = (pair.sequence * o.heads + pair.kv_head * group) * o.head_dim;
        let got = part(rig.b, &self.out, at, group * o.head_dim)?;
        Ok(pair.nmse(&got, want, attention_limit(rig.act, tokens)))
    }
}

/// Attention to every cached token.
pub(super) struct Dense<'k> {
    kv: &'k [KvSet],
    a: Attention,
    bytes: u64,
}

impl<'k> Dense<'k> {
    pub fn new(rig: &mut Rig<'_>, kv: &'k [KvSet]) -> Result<Self> {
        let a = Attention::new(rig, kv, rig.o.depth)?;
        let bytes = a.bytes(rig, rig.o.depth);
        Ok(Dense { kv: &kv[..sets_for(bytes).min(kv.len())], a, bytes })
    }
}

impl Case for Dense<'_> {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn sets(&self) -> usize {
        self.kv.len()
    }
    fn splits(&self) -> Option<usize> {
        Some(self.a.splits)
    }
    fn launch(&self, rig: &Rig<'_>, set: usize) -> Result<()> {
        let kv = &self.kv[set];
        let seqs = rig.seqs(kv);
        self.a.launch(rig, seqs, |out, lse, splits| {
            rig.b.attend_dense(&AttendDense {
                q: &self.a.q,
                seqs,
                cache: rig.pool(kv),
                heads: rig.o.heads,
                scale: rig.o.scale(),
                window: None,
                splits,
                out,
                lse: Some(lse),
                values: true,
                logits: None,
            })
        })
    }
    fn check(&self, rig: &Rig<'_>, set: usize) -> Result<Check> {
        let pair = Pair::last(rig);
        let small = Small::cut(rig, &pair, &self.kv[set], &self.a.q, true)?;
        let group = rig.o.heads / rig.o.kv_heads;
        let n = group * rig.o.head_dim;
        let out = small.host.alloc(DType::F32, n, "reference check")?;
        let p = AttendDense {
            q: &small.q,
            seqs: small.seqs(),
            cache: small.pool(),
            heads: group,
            scale: rig.o.scale(),
            window: None,
            splits: 1,
            out: &out,
            lse: None,
            values: true,
            logits: None,
        };
        let want = expected(&reference::attend_dense(&p, &small.host)?, 0, n);
        self.a.compare(rig, &pair, &want, rig.o.depth)
    }
    #[cfg(test)]
    fn output(&self) -> &Tensor {
        &self.a.out
    }
}

/// Token lists of every (sequence, KV head), `[batch, kv_heads, k]`, for one pool.
struct Lists {
    kv: usize,
    indices: Tensor,
}

/// Attention to random tokens, other ones in each set.
pub(super) struct Rows<'k> {
    kv: &'k [KvSet],
    lists: Vec<Lists>,
    counts: Tensor,
    a: Attention,
    k: usize,
    bytes: u64,
}

impl<'k> Rows<'k> {
    pub fn new(rig: &mut Rig<'_>, kv: &'k [KvSet], share: f64) -> Result<Self> {
        let k = rig.o.k(share);
        let a = Attention::new(rig, kv, k)?;
        let pairs = rig.batch * rig.o.kv_heads;
        let bytes = a.bytes(rig, k) + (pairs * (k + 1) * 4) as u64;
        let wanted = sets_for(bytes);
        let mut lists = Vec::new();
        for at in 0..kv.len() {
            // Lists of one pool share no token, so that no set finds the rows of another one in a cache.
            let disjoint = (rig.o.depth / k).min(wanted.div_ceil(kv.len()));
            let mut indices = vec![Vec::with_capacity(pairs * k); disjoint];
            for _ in 0..pairs {
                let tokens = rig.random.shuffled(rig.o.depth);
                for (list, mine) in indices.iter_mut().zip(tokens.chunks_exact(k)) {
                    let start = list.len();
                    list.extend_from_slice(mine);
                    list[start..].sort_unstable();
                }
            }
            for list in &indices {
                lists.push(Lists { kv: at, indices: words(rig.b, list, "token lists")? });
            }
        }
        let counts = words(rig.b, &vec![k as u32; pairs], "token counts")?;
        Ok(Rows { kv, lists, counts, a, k, bytes })
    }
}

impl Case for Rows<'_> {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn sets(&self) -> usize {
        self.lists.len()
    }
    fn splits(&self) -> Option<usize> {
        Some(self.a.splits)
    }
    fn launch(&self, rig: &Rig<'_>, set: usize) -> Result<()> {
        let lists = &self.lists[set];
        let kv = &self.kv[lists.kv];
        let seqs = rig.seqs(kv);
        self.a.launch(rig, seqs, |out, lse, splits| {
            rig.b.attend_rows(&AttendRows {
                q: &self.a.q,
                seqs,
                cache: rig.pool(kv),
                heads: rig.o.heads,
                scale: rig.o.scale(),
                indices: &lists.indices,
                counts: &self.counts,
                k: self.k,
                rows_per_seq: rig.o.kv_heads,
                head_map: None,
                settled: true,
                splits,
                out,
                lse: Some(lse),
            })
        })
    }
    fn check(&self, rig: &Rig<'_>, set: usize) -> Result<Check> {
        let (pair, lists) = (Pair::last(rig), &self.lists[set]);
        let small = Small::cut(rig, &pair, &self.kv[lists.kv], &self.a.q, true)?;
        let at = (pair.sequence * rig.o.kv_heads + pair.kv_head) * self.k;
        let list = part_words(rig.b, &lists.indices, at, self.k)?;
        let host = &small.host;
        let indices = check::upload(host, DType::U32, bytemuck::cast_slice(&list))?;
        let counts = check::upload(host, DType::U32, &(self.k as u32).to_le_bytes())?;
        let group = rig.o.heads / rig.o.kv_heads;
        let n = group * rig.o.head_dim;
        let out = host.alloc(DType::F32, n, "reference check")?;
        let p = AttendRows {
            q: &small.q,
            seqs: small.seqs(),
            cache: small.pool(),
            heads: group,
            scale: rig.o.scale(),
            indices: &indices,
            counts: &counts,
            k: self.k,
            rows_per_seq: 1,
            head_map: None,
            settled: true,
            splits: 1,
            out: &out,
            lse: None,
        };
        let want = expected(&reference::attend_rows(&p, host)?, 0, n);
        self.a.compare(rig, &pair, &want, self.k)
    }
    #[cfg(test)]
    fn output(&self) -> &Tensor {
        &self.a.out
    }
}
