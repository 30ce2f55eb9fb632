//! Tokens of listed blocks.

use super::memory::Io;
use super::seqs::sequences;
use crate::backend::{ExpandBlocks, Result};

pub(super) fn run(io: &Io<'_>, p: &ExpandBlocks<'_>) -> Result<()> {
    let blocks = io.read::<u32>(p.blocks)?;
    let block_counts = io.read::<u32>(p.block_counts)?;
    let indices = io.write::<u32>(p.indices)?;
    let counts = io.write::<u32>(p.counts)?;
    let room = p.k * p.unit;
    for (s, seq) in sequences(io, &p.seqs)?.iter().enumerate() {
        for row in s * p.rows_per_seq..(s + 1) * p.rows_per_seq {
            let list = blocks[row * p.k..].get(..block_counts[row] as usize);
            let list = list.ok_or_else(|| io.bad("a list longer than its room"))?;
            let tokens = list.iter().flat_map(|&b| {
                let first = b as usize * p.unit;
                first..(first + p.unit).min(seq.kv_len)
            });
            let mut n = 0;
            for (to, j) in indices[row * room..][..room].iter_mut().zip(tokens) {
                *to = j as u32;
                n += 1;
            }
            counts[row] = n;
        }
    }
    Ok(())
}
