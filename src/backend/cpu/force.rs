//! Sets the scores of the first `sinks` and the last `recent` tokens to +infinity.

use super::memory::Io;
use super::seqs::sequences;
use crate::backend::{Force, Result};

pub(super) fn run(io: &Io<'_>, p: &Force<'_>) -> Result<()> {
    let scores = io.write::<f32>(p.scores)?;
    for (s, seq) in sequences(io, &p.seqs)?.iter().enumerate() {
        for r in 0..p.rows_per_seq {
            let row = &mut scores[(s * p.rows_per_seq + r) * p.stride..][..seq.kv_len];
            row[..p.sinks.min(seq.kv_len)].fill(f32::INFINITY);
            row[seq.kv_len.saturating_sub(p.recent)..].fill(f32::INFINITY);
        }
    }
    Ok(())
}
