//! Sequences kept after their answer: a later prompt that starts the same way continues one.

use super::{Engine, EngineError, SeqId};

impl Engine {
    /// Closes the sequences that requests left open with [`Request::keep`](super::Request::keep).
    pub fn forget_kept(&mut self) {
        while self.evict_oldest_kept() {}
    }

    /// Closes the oldest kept sequence; false when none is kept.
    pub(super) fn evict_oldest_kept(&mut self) -> bool {
        if self.kept.is_empty() {
            return false;
        }
        let (oldest, _) = self.kept.remove(0);
        self.close(oldest);
        true
    }

    /// Opens a sequence for a prompt, with the cached tokens of the kept one that starts most like it.
    /// Returns it with the number of prompt tokens that it already holds (always fewer than all).
    pub(super) fn open_for(&mut self, prompt: &[u32]) -> Result<(SeqId, usize), EngineError> {
        let most = prompt.len().saturating_sub(1);
        let common =
            |kept: &[u32]| kept.iter().zip(&prompt[..most]).take_while(|(a, b)| a == b).count();
        let best = self.kept.iter().enumerate().map(|(i, k)| (common(&k.1), i)).max();
        // Statistics cannot forget tokens, so nothing is reused with them.
        let s = self.cache.shape();
        let reusable = !(s.key_stats || s.value_stats);
        let Some((n, i)) = best.filter(|&(n, _)| reusable && n > 0) else {
            return Ok((self.open_sequence()?, 0));
        };
        // Another conversation that only starts alike stays, unless it is the next to make way.
        let next_to_go = i == 0 && self.free_slot().is_none();
        let seq = if 2 * n >= self.kept[i].1.len() || next_to_go {
            self.kept.remove(i).0
        } else {
            self.fork(self.kept[i].0)?
        };
        if let Err(e) = self.rewind(seq, n) {
            self.close(seq);
            return Err(e);
        }
        Ok((seq, n))
    }

    /// Back to the first `n` tokens, before the first decode step.
    fn rewind(&mut self, seq: SeqId, n: usize) -> Result<(), EngineError> {
        let b = self.decoder.backend().clone();
        self.attention.reset(&*b, seq.0)?;
        let s = self.sequences[seq.0].as_mut().ok_or(EngineError::NoSequence(seq.0))?;
        s.decode_steps = 0;
        self.cache.truncate(&mut s.table, n);
        Ok(())
    }
}
