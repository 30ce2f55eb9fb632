//! What weights are called in messages and in fingerprints.

use super::weights::Weight;
use std::fmt;

impl fmt::Display for Weight {
    /// In words: `attn norm of layer 3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        let (name, place) = key.split_once(' ').map_or((key.as_str(), ""), |(n, p)| (n, p));
        for (i, c) in name.chars().enumerate() {
            if i > 0 && c.is_uppercase() {
                write!(f, " ")?;
            }
            write!(f, "{}", c.to_lowercase())?;
        }
        if place.is_empty() { Ok(()) } else { write!(f, " {place}") }
    }
}

impl Weight {
    /// Its name in a model's fingerprint: another one would make plans and caches strangers to their models.
    pub(super) fn key(self) -> String {
        match self {
            Weight::Layer(layer, weight) => format!("{weight:?} of layer {layer}"),
            other => format!("{other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::model::{LayerWeight, Weight};

    #[test]
    fn weights_are_named_in_words_and_hashed_as_ever() {
        let norm = Weight::Layer(3, LayerWeight::AttnNorm);
        assert_eq!(
            (norm.to_string(), norm.key()),
            ("attn norm of layer 3".into(), "AttnNorm of layer 3".into())
        );
        assert_eq!(
            (Weight::OutputNorm.to_string(), Weight::OutputNorm.key()),
            ("output norm".into(), "OutputNorm".into())
        );
        assert_eq!(Weight::Layer(0, LayerWeight::QBias).to_string(), "q bias of layer 0");
    }
}
