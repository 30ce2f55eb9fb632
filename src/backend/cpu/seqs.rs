//! The sequence records of a step, read and checked on the host before an op uses them.

use super::memory::Io;
use crate::backend::{META_WORDS, Meta, PAGE, Result, Seqs};

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
            return Err(io.bad(format!("{s:?} in a batch of {} rows", seqs.rows)));
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
