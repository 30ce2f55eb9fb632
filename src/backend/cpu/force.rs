//! Sets the scores of the first `sinks` and the last `recent` tokens to +infinity, all tokens' or listed ones'.

use super::memory::Io;
use super::seqs::{Lists, sequences};
use crate::backend::{Force, Result};

pub(super) fn run(io: &Io<'_>, p: &Force<'_>) -> Result<()> {
    let scores = io.write::<f32>(p.scores)?;
    let listed = p.among.map(|a| Lists::read(io, a)).transpose()?;
    for (s, seq) in sequences(io, &p.seqs)?.iter().enumerate() {
        for r in s * p.rows_per_seq..(s + 1) * p.rows_per_seq {
            let row = &mut scores[r * p.stride..][..p.stride];
            if let Some(lists) = listed {
                let first_recent = seq.kv_len.saturating_sub(p.recent);
                for (score, &j) in row.iter_mut().zip(lists.of(r)) {
                    let j = j as usize;
                    if j < p.sinks.min(seq.kv_len) || (first_recent..seq.kv_len).contains(&j) {
                        *score = f32::INFINITY;
                    }
                }
                continue;
            }
            let row = &mut row[..seq.kv_len];
            row[..p.sinks.min(seq.kv_len)].fill(f32::INFINITY);
            row[seq.kv_len.saturating_sub(p.recent)..].fill(f32::INFINITY);
        }
    }
    Ok(())
}
