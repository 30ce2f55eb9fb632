//! Token lists that steps share.

use super::{Cell, Output, Seq, words};
use crate::backend::{Backend, HELD_WORDS, HoldLists, Result};

/// See [`HoldLists`].
pub fn hold_lists<'a>(p: &HoldLists<'a>, dev: &dyn Backend) -> Result<Vec<Output<'a>>> {
    let (chosen, chosen_counts) = (words(dev, p.chosen)?, words(dev, p.chosen_counts)?);
    let (held, marks) = (words(dev, p.held)?, words(dev, p.marks)?);
    let out = |name, t| Output::exact("hold_lists", name, t);
    let [mut new_held, mut new_marks] = [out("held", p.held), out("marks", p.marks)];
    let [mut indices, mut counts] = [out("indices", p.indices), out("counts", p.counts)];
    let (rows, k, room) = (p.rows_per_seq, p.k, p.room);
    for (i, s) in Seq::read(dev, &p.seqs)?.iter().enumerate() {
        for r in 0..rows {
            let (row, own) = (i * rows + r, s.slot * rows + r);
            let mut list: Vec<f64>;
            if i < p.fresh {
                let n = k.min(chosen_counts[row] as usize);
                list = chosen[row * k..][..n].iter().map(|j| f64::from(*j)).collect();
                new_held.put(own * k, &list);
                new_marks.put(own * HELD_WORDS, &[n as f64, s.kv_len as f64]);
            } else {
                let mark = &marks[own * HELD_WORDS..];
                let n = k.min(mark[0] as usize);
                list = held[own * k..][..n].iter().map(|j| f64::from(*j)).collect();
                list.extend((mark[1] as usize..s.kv_len).map(|j| j as f64));
                list.truncate(room);
            }
            indices.cells[row * room..(row + 1) * room].fill(Cell::Any);
            indices.put(row * room, &list);
            counts.cells[row] = Cell::Is(list.len() as f64);
        }
    }
    Ok(vec![new_held, new_marks, indices, counts])
}
