//! Token embedding: `out[r, :] = scale * table[tokens[r], :]`, zeros for a token outside the vocabulary.

use super::memory::{Io, with_float};
use super::{par, simd};
use crate::backend::{Embed, Result};

pub(super) fn run(io: &Io<'_>, p: &Embed<'_>) -> Result<()> {
    let tokens = io.read::<u32>(p.tokens)?;
    let out = &mut io.write::<f32>(p.out)?[..p.rows * p.cols];
    with_float!(io, p.table.dtype(), T => {
        let table = &io.read::<T>(p.table)?[..p.vocab * p.cols];
        par::chunks(out, p.cols, p.rows * p.cols, |r, row| {
            let token = tokens[r] as usize;
            if token < p.vocab {
                simd::widen(&table[token * p.cols..][..p.cols], row);
                if p.scale != 1.0 {
                    simd::scale(row, p.scale);
                }
            } else {
                row.fill(0.0);
            }
        });
        Ok(())
    })
}
