//! When sequences choose tokens anew: every `reuse`-th token after the last choice, counted for each sequence by
//! itself, so that no choice depends on what else is in a step.

use super::StepSeq;
use super::step::{Cut, Pace};
use crate::select::{LayerPlan, Plan, Role};

/// The paces of a plan's layers, and where each slot's sequence last chose at each of them.
#[derive(Debug)]
pub(super) struct Paces {
    all: Vec<Pace>,
    /// `[paces][slots]`: tokens of the sequence at its last choice.
    chosen_at: Vec<Vec<Option<usize>>>,
}

/// When a layer is sparse and chooses.
pub(super) fn pace(p: &LayerPlan) -> Pace {
    Pace { threshold: p.budget.dense_until(), reuse: p.reuse }
}

impl Paces {
    pub fn new(plan: &Plan, slots: usize) -> Paces {
        let layers = plan.layers.iter().filter(|p| p.role != Role::Dense);
        let mut all: Vec<Pace> = layers.map(pace).collect();
        all.sort_unstable();
        all.dedup();
        Paces { chosen_at: vec![vec![None; slots]; all.len()], all }
    }

    /// Who chooses in a step of these sequences; [`Paces::ran`] once it has run.
    pub fn cut(&self, seqs: &[StepSeq<'_>]) -> Vec<Cut> {
        let each = self.all.iter().zip(&self.chosen_at);
        let cut = each.map(|(&pace, chosen_at)| {
            let chooses = |s: &StepSeq<'_>| {
                let tokens = s.kv_len();
                if s.decode.is_none() || tokens <= pace.threshold {
                    return false;
                }
                let last = chosen_at.get(s.slot).copied().flatten();
                let since = last.and_then(|at| tokens.checked_sub(at)).filter(|&n| n > 0);
                since.is_none_or(|n| n >= pace.reuse)
            };
            Cut { pace, fresh: seqs.iter().map(chooses).collect() }
        });
        cut.collect()
    }

    /// The step of these cuts has run. A step that failed is not told of: its sequences choose again.
    pub fn ran(&mut self, seqs: &[StepSeq<'_>], cuts: &[Cut]) {
        for (chosen_at, cut) in self.chosen_at.iter_mut().zip(cuts) {
            for (s, _) in seqs.iter().zip(&cut.fresh).filter(|(_, fresh)| **fresh) {
                if let Some(at) = chosen_at.get_mut(s.slot) {
                    *at = Some(s.kv_len());
                }
            }
        }
    }

    /// The sequence in `slot` is another one.
    pub fn reset(&mut self, slot: usize) {
        self.chosen_at.iter_mut().filter_map(|p| p.get_mut(slot)).for_each(|at| *at = None);
    }

    /// The sequence in slot `to` is a fork of that in slot `from`.
    pub fn fork(&mut self, from: usize, to: usize) {
        for chosen_at in &mut self.chosen_at {
            let at = chosen_at.get(from).copied().flatten();
            chosen_at.iter_mut().skip(to).take(1).for_each(|to| *to = at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::Budget;

    fn paces(reuse: usize) -> Paces {
        let (role, budget) = (Role::Select, Budget::fixed(10, 0));
        let layer = LayerPlan { role, budget, reuse, ..LayerPlan::dense() };
        let layers = vec![LayerPlan::dense(), layer.clone(), layer];
        Paces::new(&Plan { layers, ..Plan::dense(0) }, 2)
    }

    /// Whether the sequences (slot, tokens after the step) choose.
    fn step(p: &mut Paces, seqs: &[(usize, usize)]) -> Vec<bool> {
        let seq = |&(slot, tokens): &(usize, usize)| StepSeq {
            tokens: &[0],
            cached: tokens - 1,
            pages: &[],
            slot,
            decode: Some(0),
        };
        let seqs: Vec<_> = seqs.iter().map(seq).collect();
        let cut = p.cut(&seqs);
        assert_eq!(
            (&cut, cut.len()),
            (&p.cut(&seqs), 1),
            "a step that did not run changes nothing"
        );
        p.ran(&seqs, &cut);
        cut[0].fresh.clone()
    }

    #[test]
    fn every_sequence_counts_for_itself() {
        let mut p = paces(3);
        // Dense up to its budget of 10; then at 11, 14, 17, whoever else there is.
        let alone: Vec<bool> = (9..18).map(|n| step(&mut p, &[(0, n)])[0]).collect();
        assert_eq!(alone, [9, 10, 11, 12, 13, 14, 15, 16, 17].map(|n| matches!(n, 11 | 14 | 17)));
        let mut p = paces(3);
        assert_eq!(step(&mut p, &[(0, 11)]), [true]);
        assert_eq!(step(&mut p, &[(1, 40), (0, 12)]), [true, false]);
        assert_eq!(step(&mut p, &[(0, 13), (1, 41)]), [false, false]);
        assert_eq!(step(&mut p, &[(0, 14), (1, 42)]), [true, false]);
        assert_eq!(step(&mut p, &[(0, 15), (1, 43)]), [false, true]);
        // A prompt of several tokens in between counts as what it is.
        assert_eq!(step(&mut p, &[(0, 30)]), [true]);
        p.fork(0, 1);
        assert_eq!(step(&mut p, &[(0, 31), (1, 31)]), [false, false]);
        p.reset(0);
        assert_eq!(step(&mut p, &[(0, 32), (1, 32)]), [true, false]);
        // Fewer tokens than at the last choice are another text.
        assert_eq!(step(&mut p, &[(0, 20)]), [true]);
    }

    #[test]
    fn without_reuse_every_step_chooses() {
        let mut p = paces(1);
        assert!((11..20).all(|n| step(&mut p, &[(0, n)])[0]));
    }
}
