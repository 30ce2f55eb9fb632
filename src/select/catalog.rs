//! The built-in methods: names, and one line each. `options.rs` says which options each reads.

use serde::{Deserialize, Serialize};

/// What the command line and the docs say of a method.
#[derive(Clone, Copy, Debug)]
pub struct MethodInfo {
    /// Name on the command line.
    pub name: &'static str,
    /// One line for `--help` and the README table.
    pub about: &'static str,
    /// The variant it makes.
    pub variant: Variant,
}

/// Base of a [`MethodSpec`](super::MethodSpec).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// Every token.
    Dense,
    /// First and most recent tokens.
    Window,
    /// Random tokens.
    Random,
    /// Top-k of the exact logits.
    Oracle,
    /// Scores on the leading dimensions of energy-sorted keys.
    Sparcas,
    /// The same from an int8 copy.
    SparcasInt8,
    /// SparCas as published.
    SparcasPaper,
    /// Query-chosen rotary pairs, weighted by key deviation.
    SparcasRecommended,
    /// Query-chosen groups of 8 sorted dimensions.
    SparcasGroups,
    /// SparQ: fresh dimensions in every step, and the mean value for the tokens left out.
    Sparq,
    /// Double Sparsity: dimensions chosen offline.
    DoubleSparsity,
    /// Loki: principal components of the keys.
    Loki,
    /// Kascade: layers reuse the tokens of anchor layers.
    Kascade,
    /// The same with one list for all heads.
    KascadePooled,
    /// Anchors hand down candidates, every layer scores them once more.
    Refined,
    /// A few filter layers choose for all heads of the layers after them.
    Omnikv,
    /// The same with sinks and a recent quarter.
    Lessismore,
    /// Pages by the bounds of their keys.
    Quest,
    /// Pages by the cuboid of means of their keys.
    Arkvale,
    /// Blocks by the probabilities of means of windows.
    Infllm2,
    /// The same blocks, scored by the Forecast of the layer before.
    Sparda,
    /// Some blocks by the query, the rest by the content importance of their tokens.
    Nosa,
}

impl Variant {
    /// Layers that filter for those after them as published, of 32 (Llama 3.1 8B).
    pub(super) fn filters(self) -> Option<&'static [usize]> {
        match self {
            Variant::Omnikv => Some(&[2, 8, 18]),
            Variant::Lessismore => Some(&[2, 13]),
            _ => None,
        }
    }
}

/// Every built-in method.
pub const METHODS: &[MethodInfo] = &[
    MethodInfo {
        name: "dense",
        about: "attend to every token (exact; the baseline)",
        variant: Variant::Dense,
    },
    MethodInfo {
        name: "window",
        about: "first and most recent tokens only (StreamingLLM at original positions)",
        variant: Variant::Window,
    },
    MethodInfo {
        name: "random",
        about: "tokens that a hash of layer, KV head and position picks (what every scorer must beat)",
        variant: Variant::Random,
    },
    MethodInfo {
        name: "oracle",
        about: "top-k of the exact logits (reads every key; the bound for cheaper scorers)",
        variant: Variant::Oracle,
    },
    MethodInfo {
        name: "sparcas",
        about: "SparCas on energy-sorted keys: score the leading dimensions, attend to the top tokens (default)",
        variant: Variant::Sparcas,
    },
    MethodInfo {
        name: "sparcas-int8",
        about: "the same, scored on an int8 copy of the leading dimensions",
        variant: Variant::SparcasInt8,
    },
    MethodInfo {
        name: "sparcas-paper",
        about: "SparCas as published: |q| picks dimensions every 64 steps, compact slice",
        variant: Variant::SparcasPaper,
    },
    MethodInfo {
        name: "sparcas-recommended",
        about: "query-chosen rotary pairs weighted by key deviation, adaptive refresh, compact slice",
        variant: Variant::SparcasRecommended,
    },
    MethodInfo {
        name: "sparcas-groups",
        about: "query-chosen groups of 8 sorted dimensions, read from the keys, fresh every step",
        variant: Variant::SparcasGroups,
    },
    MethodInfo {
        name: "sparq",
        about: "SparQ: |q| picks dimensions every step, read from the keys; the mean value stands for the tokens left \
                out",
        variant: Variant::Sparq,
    },
    MethodInfo {
        name: "double-sparsity",
        about: "Double Sparsity: dimensions of the largest mean |q k|, measured once, in a compact slice of 16, 8 or 4 bits",
        variant: Variant::DoubleSparsity,
    },
    MethodInfo {
        name: "loki",
        about: "Loki: leading principal components of the keys, measured once, in a slice of their own",
        variant: Variant::Loki,
    },
    MethodInfo {
        name: "kascade",
        about: "Kascade: anchor layers choose 10 % of the tokens by exact scores, the layers after them reuse the choice \
                (a plan of `longsight calibrate` brings anchors and head maps; without one: even spacing, no map)",
        variant: Variant::Kascade,
    },
    MethodInfo {
        name: "kascade-pooled",
        about: "the same with one choice for all heads",
        variant: Variant::KascadePooled,
    },
    MethodInfo {
        name: "refined",
        about: "anchors hand down four times the budget, every layer scores that again on its leading dimensions",
        variant: Variant::Refined,
    },
    MethodInfo {
        name: "omnikv",
        about: "OmniKV: three filter layers attend to everything and choose 10 % of the tokens, by the largest \
                probability of any head, for the layers after them",
        variant: Variant::Omnikv,
    },
    MethodInfo {
        name: "lessismore",
        about: "LessIsMore: two filter layers, sinks and a quarter of recent tokens, the rest by the largest \
                probability of any head (as published by the heads' ranks in turn: pool=union)",
        variant: Variant::Lessismore,
    },
    MethodInfo {
        name: "quest",
        about: "Quest: pages of 16 tokens by the smallest and largest key of each dimension",
        variant: Variant::Quest,
    },
    MethodInfo {
        name: "arkvale",
        about: "ArkVale's digest: the same pages by the middle and mean distance of their keys",
        variant: Variant::Arkvale,
    },
    MethodInfo {
        name: "infllm2",
        about: "InfLLM-V2: blocks of 64 tokens by the probabilities of means of 32 keys",
        variant: Variant::Infllm2,
    },
    MethodInfo {
        name: "sparda",
        about: "SparDA: the same blocks, chosen by the Forecast of the layer before (needs --forecast)",
        variant: Variant::Sparda,
    },
    MethodInfo {
        name: "nosa",
        about: "NOSA: a part of the same blocks by the query (or the Forecast), the rest by the content importance of \
                their tokens, which stays from step to step (NOSA models only)",
        variant: Variant::Nosa,
    },
];
