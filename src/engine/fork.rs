//! Forks: a second sequence over the same cached tokens.

use super::sequences::Sequence;
use super::{Engine, EngineError, SeqId};

impl Engine {
    /// A second sequence with the same cached tokens, which continues as the first one would: what the method
    /// knew about the first is copied. Pages are shared until one of them is written.
    ///
    /// # Errors
    /// [`EngineError::NoSlot`], [`EngineError::NoSequence`]; [`EngineError::Backend`] and [`EngineError::Select`]
    /// when the device fails.
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId, EngineError> {
        self.sequence(seq)?;
        let new = self.open_sequence()?;
        let copied = self.copy_state(seq, new);
        if copied.is_err() {
            self.close(new);
        }
        copied.map(|()| new)
    }

    fn copy_state(&mut self, seq: SeqId, new: SeqId) -> Result<(), EngineError> {
        let b = self.decoder.backend().clone();
        let from = self.sequences[seq.0].as_ref().ok_or(EngineError::NoSequence(seq.0))?;
        let decode_steps = from.decode_steps;
        self.attention.fork(&*b, seq.0, new.0, from.table.tokens())?;
        let table = self.cache.fork(&*b, &from.table, seq.0, new.0)?;
        self.sequences[new.0] = Some(Sequence { id: new, table, decode_steps });
        Ok(())
    }
}
