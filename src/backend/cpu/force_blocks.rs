//! Sets the scores of listed blocks to +infinity.

use super::memory::Io;
use super::seqs::{Lists, sequences};
use crate::backend::{ForceBlocks, Result};

pub(super) fn run(io: &Io<'_>, p: &ForceBlocks<'_>) -> Result<()> {
    let scores = io.write::<f32>(p.scores)?;
    let lists = Lists::read(io, p.listed)?;
    for (s, seq) in sequences(io, &p.seqs)?.iter().enumerate() {
        for r in s * p.rows_per_seq..(s + 1) * p.rows_per_seq {
            let row = &mut scores[r * p.stride..][..seq.kv_len.div_ceil(p.unit)];
            for &b in lists.of(r) {
                if let Some(score) = row.get_mut(b as usize) {
                    *score = f32::INFINITY;
                }
            }
        }
    }
    Ok(())
}
