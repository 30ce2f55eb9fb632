//! The sequence records of a step, read and checked on the host before an op uses them.

use super::memory::Io;
use crate::backend::{Among, META_WORDS, Meta, PAGE, Result, Seqs};

/// One sequence of the step; see [`Meta`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    pub q_start: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub slot: usize,
    pub step: u32,
    pages_start: usize,
}

impl Sequence {
    /// Position of the first row.
    pub fn first_pos(&self) -> usize {
        self.kv_len - self.q_len
    }

    /// Pages of tokens `0 .. kv_len`. Entries for tokens in `from .. kv_len` are checked, others may be
    /// anything.
    pub fn pages<'a>(
        &self,
        io: &Io<'_>,
        lists: &'a [u32],
        n_pages: usize,
        from: usize,
    ) -> Result<&'a [u32]> {
        let pages = self.page_list(io, lists)?;
        let used = pages.get(from / PAGE..).unwrap_or_default();
        match used.iter().find(|&&p| p as usize >= n_pages) {
            Some(p) => Err(io.bad(format!("page {p} of a pool of {n_pages}"))),
            None => Ok(pages),
        }
    }

    /// As [`Sequence::pages`], without a look at the entries.
    pub fn page_list<'a>(&self, io: &Io<'_>, lists: &'a [u32]) -> Result<&'a [u32]> {
        let n = self.kv_len.div_ceil(PAGE);
        lists
            .get(self.pages_start..)
            .and_then(|l| l.get(..n))
            .ok_or_else(|| io.bad(format!("the page lists end before token {}", self.kv_len)))
    }

    /// The pages of listed tokens are there; others need not be. `pages`: from [`Sequence::page_list`].
    pub fn check_listed(
        &self,
        io: &Io<'_>,
        pages: &[u32],
        n_pages: usize,
        tokens: &[u32],
    ) -> Result<()> {
        let absent = |&&j: &&u32| {
            let j = j as usize;
            j < self.kv_len && pages[j / PAGE] as usize >= n_pages
        };
        match tokens.iter().find(absent) {
            Some(j) => Err(io.bad(format!("token {j} lies in a page outside the pool"))),
            None => Ok(()),
        }
    }
}

/// Lists of tokens on the host.
#[derive(Clone, Copy)]
pub(super) struct Lists<'a> {
    indices: &'a [u32],
    counts: &'a [u32],
    k: usize,
}

impl<'a> Lists<'a> {
    pub fn read(io: &'a Io<'_>, a: Among<'a>) -> Result<Self> {
        Ok(Lists { indices: io.read(a.indices)?, counts: io.read(a.counts)?, k: a.k })
    }

    /// The entries of a list that count.
    pub fn of(&self, list: usize) -> &'a [u32] {
        &self.indices[list * self.k..][..self.k.min(self.counts[list] as usize)]
    }
}

/// Reads the records; rows stay inside the batch and no two sequences share one.
pub(super) fn sequences(io: &Io<'_>, seqs: &Seqs<'_>) -> Result<Vec<Sequence>> {
    let meta = io.read::<u32>(seqs.meta)?;
    let all: Vec<Sequence> = meta
        .chunks_exact(META_WORDS)
        .take(seqs.n)
        .map(|m| Sequence {
            q_start: m[Meta::Q_START] as usize,
            q_len: m[Meta::Q_LEN] as usize,
            kv_len: m[Meta::KV_LEN] as usize,
            slot: m[Meta::SLOT] as usize,
            step: m[Meta::STEP],
            pages_start: m[Meta::PAGES] as usize,
        })
        .collect();
    for s in &all {
        if s.q_start + s.q_len > seqs.rows || s.q_len > s.kv_len || s.q_len > seqs.max_q {
            let Sequence { q_start, q_len, kv_len, .. } = s;
            return Err(io.bad(format!(
                "{q_len} rows from row {q_start} on, of {kv_len} tokens, in a batch of {} rows of at most {} each",
                seqs.rows, seqs.max_q
            )));
        }
        if s.kv_len > seqs.max_kv {
            return Err(io.bad(format!("{} tokens, max_kv = {}", s.kv_len, seqs.max_kv)));
        }
    }
    let mut rows: Vec<(usize, usize)> =
        all.iter().filter(|s| s.q_len > 0).map(|s| (s.q_start, s.q_start + s.q_len)).collect();
    rows.sort_unstable();
    if rows.windows(2).any(|w| w[0].1 > w[1].0) {
        return Err(io.bad("two sequences share a row"));
    }
    Ok(all)
}

/// As [`sequences`], and every slot is below `slots`.
pub(super) fn slotted(io: &Io<'_>, seqs: &Seqs<'_>, slots: usize) -> Result<Vec<Sequence>> {
    let all = sequences(io, seqs)?;
    match all.iter().find(|s| s.slot >= slots) {
        Some(s) => Err(io.bad(format!("slot {} of {slots}", s.slot))),
        None => Ok(all),
    }
}
