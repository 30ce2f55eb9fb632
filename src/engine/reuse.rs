//! Sequences kept after their answer: a later prompt that starts the same way takes one over.

use super::{Engine, EngineError, SeqId};

impl Engine {
    /// Opens a sequence for a prompt, taking over a kept one that starts the same way.
    /// Returns it with the number of prompt tokens that it already holds (always fewer than all).
    pub(super) fn open_for(&mut self, prompt: &[u32]) -> Result<(SeqId, usize), EngineError> {
        // Statistics cannot forget tokens, so a kept sequence is only taken over without them.
        let reusable = !self.cache.shape().key_stats;
        let common = |kept: &[u32]| {
            let most = prompt.len().saturating_sub(1);
            kept.iter().zip(&prompt[..most]).take_while(|(a, b)| a == b).count()
        };
        let best = (0..self.kept.len()).max_by_key(|&i| common(&self.kept[i].1));
        if let Some(i) = best.filter(|&i| reusable && common(&self.kept[i].1) > 0) {
            let (seq, tokens) = self.kept.remove(i);
            let n = common(&tokens);
            let b = self.decoder.backend().clone();
            self.attention.reset(&*b, seq.0)?;
            let s = self.sequences[seq.0].as_mut().ok_or(EngineError::NoSequence(seq.0))?;
            s.decode_steps = 0;
            self.cache.truncate(&mut s.table, n);
            return Ok((seq, n));
        }
        loop {
            match self.open_sequence() {
                Err(EngineError::NoSlot(_)) if !self.kept.is_empty() => {
                    let (oldest, _) = self.kept.remove(0);
                    self.close(oldest);
                }
                opened => return opened.map(|seq| (seq, 0)),
            }
        }
    }
}
