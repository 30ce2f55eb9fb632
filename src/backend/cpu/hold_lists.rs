//! Token lists that steps share.

use super::memory::Io;
use super::seqs::slotted;
use crate::backend::{HELD_WORDS, HoldLists, Result};

pub(super) fn run(io: &Io<'_>, p: &HoldLists<'_>) -> Result<()> {
    let chosen = io.read::<u32>(p.chosen)?;
    let chosen_counts = io.read::<u32>(p.chosen_counts)?;
    let held = io.write::<u32>(p.held)?;
    let marks = io.write::<u32>(p.marks)?;
    let indices = io.write::<u32>(p.indices)?;
    let counts = io.write::<u32>(p.counts)?;
    for (s, seq) in slotted(io, &p.seqs, p.slots)?.iter().enumerate() {
        for r in 0..p.rows_per_seq {
            let (row, own) = (s * p.rows_per_seq + r, seq.slot * p.rows_per_seq + r);
            let list = &mut held[own * p.k..][..p.k];
            let mark = &mut marks[own * HELD_WORDS..][..HELD_WORDS];
            if s < p.fresh {
                let n = p.k.min(chosen_counts[row] as usize);
                list[..n].copy_from_slice(&chosen[row * p.k..][..n]);
                mark.copy_from_slice(&[n as u32, seq.kv_len as u32]);
            }
            let list = &list[..p.k.min(mark[0] as usize)];
            let since = mark[1]..seq.kv_len as u32;
            let mut n = 0;
            let out = indices[row * p.room..][..p.room].iter_mut();
            for (to, j) in out.zip(list.iter().copied().chain(since)) {
                *to = j;
                n += 1;
            }
            counts[row] = n;
        }
    }
    Ok(())
}
