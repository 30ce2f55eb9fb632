//! The options of methods. Each is declared once: its field, its name on the command line, its type and how it is
//! read from text, the name of its value in `--help`, the methods that read it, and (as its doc comment) its help.

use super::anchors::{AnchorScorer, Anchors};
use super::blocks::Query;
use super::catalog::Variant;
use crate::backend::{DimMetric, HeadPool};
use crate::names::parse_name;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::str::FromStr;

/// What the command line says of an option.
#[derive(Clone, Copy, Debug)]
pub struct OptionInfo {
    /// Name without dashes in front.
    pub name: &'static str,
    /// Name of its value.
    pub value: &'static str,
    /// For `--help`.
    pub help: &'static str,
    /// Whether a method reads it.
    pub reads: fn(Variant) -> bool,
}

fn parse<T: FromStr<Err: Display>>(s: &str) -> Result<T, String> {
    s.parse().map_err(|e: T::Err| e.to_string())
}

fn whole<T: FromStr>(s: &str) -> Result<T, String> {
    s.parse().map_err(|_| "give one whole number".into())
}

fn number(s: &str) -> Result<f32, String> {
    s.parse().map_err(|_| "give one number, such as 0.5".into())
}

fn truth(s: &str) -> Result<bool, String> {
    s.parse().map_err(|_| "give true or false".into())
}

macro_rules! options {
    ($($(#[doc = $help:literal])+ $field:ident, $name:literal: $ty:ty = $parse:ident($value:literal), $reads:ident;)+) => {
        /// A method and the options that override its defaults.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        pub struct MethodSpec {
            /// The method whose defaults hold where nothing else is said.
            pub variant: Variant,
            $($(#[doc = $help])+ #[serde(default)] pub $field: Option<$ty>,)+
        }

        impl From<Variant> for MethodSpec {
            fn from(variant: Variant) -> Self {
                MethodSpec { variant, $($field: None,)+ }
            }
        }

        impl MethodSpec {
            /// Sets one option by name; why not, where there is no such option or the value is none.
            pub(crate) fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
                match key {
                    $($name => self.$field = Some($parse(value)?),)+
                    _ => return Err(format!("{key:?} is no option")),
                }
                Ok(())
            }

            /// Without the options that the method does not read.
            pub fn with_read_options_only(mut self) -> Self {
                $(if !self.variant.$reads() { self.$field = None; })+
                self
            }
        }

        /// Every option.
        pub const OPTIONS: &[OptionInfo] = &[$(OptionInfo {
            name: $name,
            value: $value,
            help: concat!($($help),+),
            reads: Variant::$reads,
        }),+];
    };
}

options! {
    /// Tokens attended to per KV head [default: context / 32, 512 to 2048; kascade and omnikv: a share of the text; nosa:
    /// as the model was trained]
    budget, "budget": usize = whole("TOKENS"), sparse;
    /// Key dimensions scored [default: a quarter of the head dimension; 32 for sparcas-paper, sparcas-recommended, sparq
    /// and double-sparsity]
    dims, "dims": usize = whole("DIMS"), prunes;
    /// Steps between two choices of dimensions (query-chosen profiles); 0 = once
    update, "update": u32 = whole("STEPS"), asks_query;
    /// Importance of a dimension: abs-q, pair-norm, abs-qk, pair-qk
    metric, "metric": DimMetric = parse_name("METRIC"), asks_query;
    /// Choose dimensions anew when coverage falls below this share of a fresh choice
    beta, "beta": f32 = number("SHARE"), asks_query;
    /// Dimensions chosen together: 1, 2, 8 or 16; for quest and arkvale tokens of a page: 16, 32 or 64
    unit, "unit": usize = whole("DIMS"), units;
    /// How query heads share a token set: sum-logit, max-logit, max-softmax, mean-softmax, none; one for all heads:
    /// all-softmax, any-softmax, union (the heads' rankings in turn, as LessIsMore published it)
    pool, "pool": HeadPool = parse_name("POOL"), pools;
    /// First tokens that are always attended to
    sinks, "sinks": usize = whole("TOKENS"), sparse;
    /// Last tokens that are always attended to
    recent, "recent": usize = whole("TOKENS"), sparse;
    /// Leading layers that stay dense [default: 2; infllm2, sparda and nosa: 0]
    dense_layers, "dense-layers": usize = whole("LAYERS"), alone;
    /// Stay dense up to this many tokens [default: 2048; in eval, for sparcas-paper, kascade and omnikv 0]
    dense_below, "dense-below": usize = whole("TOKENS"), sparse;
    /// Share of a text's tokens attended to, where the budget follows the length (kascade, omnikv) [default: 10]
    percent, "percent": f32 = number("PERCENT"), takes_a_share;
    /// Least tokens of such a share [default: 128]
    budget_min, "budget-min": usize = whole("TOKENS"), takes_a_share;
    /// Layers whose choice the layers after them reuse: how many, or which (0+2+8) [default: one layer in
    /// seven; omnikv and lessismore: three and two, placed as published]
    anchors, "anchors": Anchors = parse("LAYERS"), anchored;
    /// Tokens that an anchor hands down, to be scored once more [default: refined: 4 times the budget; else none]
    candidates, "candidates": usize = whole("TOKENS"), hands_down;
    /// Let the prompt, too, be read sparsely: so many of its tokens share a choice (kascade, oracle and window: 32 as
    /// published by Kascade; other methods: 1) [default: 0, prompts are read densely]
    tile, "tile": usize = whole("TOKENS"), tiles;
    /// Leading layers that read the prompt densely all the same [default: 0]
    prompt_dense, "prompt-dense": usize = whole("LAYERS"), tiles;
    /// End a list where its tokens hold this share of the estimated softmax mass (top-p), at the budget at the latest
    mass, "mass": f32 = number("SHARE"), scores_tokens;
    /// Let the KV heads of a layer share their budgets by the scores; each is sure of this share of its own
    floor, "floor": f32 = number("SHARE"), scores_tokens;
    /// Let the mean of all values stand for the tokens left out: true or false [default: sparq: true; else false]
    correct, "correct": bool = truth("BOOL"), scores_tokens;
    /// Decode steps that share a choice of tokens; those that are appended meanwhile are attended to as well
    /// [default: 1]
    reuse, "reuse": usize = whole("STEPS"), chooses;
    /// Bits of a number in the slice of double-sparsity: 4, 8, or 16 for those of the cache [default: 16]
    slice_bits, "slice-bits": usize = whole("BITS"), has_labels;
    /// How anchors behind the first score tokens: exact, sorted, int8, dims, blocks [default: exact]
    scorer, "scorer": AnchorScorer = parse_name("SCORER"), hands_down;
    /// Of the budget, tokens of the blocks that the query chooses, forced ones included; the others are chosen by the
    /// content importance of their tokens [default: as the model was trained; NOSA-8B: 41 blocks of 96]
    by_query, "by-query": usize = whole("TOKENS"), two_stages;
    /// Whose query chooses: own, forecast [default: own]
    query, "query": Query = parse_name("QUERY"), two_stages;
}

/// Who reads what.
impl Variant {
    /// Whether the variant reads an option of [`MethodSpec`], by its name on the command line.
    pub fn takes(self, option: &str) -> bool {
        OPTIONS.iter().any(|o| o.name == option && (o.reads)(self))
    }

    /// Names of the options that the variant reads.
    pub fn options(self) -> impl Iterator<Item = &'static str> {
        OPTIONS.iter().filter(move |o| (o.reads)(self)).map(|o| o.name)
    }

    fn sparse(self) -> bool {
        self != Variant::Dense
    }

    /// There is a choice of tokens that steps can share.
    fn chooses(self) -> bool {
        self.sparse() && self != Variant::Window
    }

    /// Some layers reuse the tokens of others.
    pub(super) fn anchored(self) -> bool {
        self.hands_down() || self.filters().is_some()
    }

    /// Every sparse layer chooses for itself.
    fn alone(self) -> bool {
        self.sparse() && !self.anchored()
    }

    /// Anchors may hand down candidates and have scorers to choose from.
    fn hands_down(self) -> bool {
        matches!(self, Variant::Kascade | Variant::KascadePooled | Variant::Refined)
    }

    fn takes_a_share(self) -> bool {
        matches!(self, Variant::Kascade | Variant::KascadePooled | Variant::Omnikv)
    }

    /// Keeps a slice that never changes its dimensions.
    fn has_labels(self) -> bool {
        self == Variant::DoubleSparsity
    }

    /// Dimensions, or units of them, are chosen by the query.
    fn asks_query(self) -> bool {
        use Variant::{SparcasGroups, SparcasPaper, SparcasRecommended};
        matches!(self, SparcasPaper | SparcasRecommended | SparcasGroups)
    }

    /// Scores single tokens on a part of their dimensions.
    fn on_some_dims(self) -> bool {
        use Variant::{DoubleSparsity, Loki, Sparcas, SparcasInt8, Sparq};
        self.asks_query() || matches!(self, Sparcas | SparcasInt8 | Sparq | DoubleSparsity | Loki)
    }

    fn prunes(self) -> bool {
        self.on_some_dims() || self == Variant::Refined
    }

    /// Every sparse layer scores single tokens.
    fn scores_tokens(self) -> bool {
        self.on_some_dims() || self == Variant::Oracle
    }

    /// Some blocks are chosen by the query, the others by content importance.
    fn two_stages(self) -> bool {
        self == Variant::Nosa
    }

    fn pages(self) -> bool {
        matches!(self, Variant::Quest | Variant::Arkvale)
    }

    fn units(self) -> bool {
        self.asks_query() || self.pages()
    }

    fn pools(self) -> bool {
        self.scores_tokens()
            || self.pages()
            || matches!(self, Variant::Kascade | Variant::Refined | Variant::Lessismore)
    }

    /// Can read prompts sparsely.
    fn tiles(self) -> bool {
        use Variant::{
            Infllm2, Kascade, KascadePooled, Nosa, Oracle, Sparcas, SparcasInt8, Sparda, Window,
        };
        self.pages()
            || matches!(self, Window | Oracle | Sparcas | SparcasInt8 | Kascade | KascadePooled)
            || matches!(self, Infllm2 | Sparda | Nosa)
    }
}
