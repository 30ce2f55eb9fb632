//! What to attend to: plans as data, and the selectors that carry them out.
//!
//! A published method is a [`Plan`]: one [`LayerPlan`] per layer. [`MethodSpec`]s turn names and
//! options into plans; [`build`] turns a layer's plan into a [`Selector`] that records the ops. A selector sees
//! tokens, never where they live: pages and tiers belong to `kv`.

mod all_dense;
mod anchors;
mod blocks;
mod catalog;
mod check;
mod components;
mod dims;
mod doubled;
mod error;
mod infllm;
mod key_profile;
mod labels;
mod mean_value;
mod method;
mod nosa;
mod npy;
mod options;
mod oracle;
mod pick;
mod plan;
mod profile;
mod quest;
mod random;
mod refine;
mod role;
mod selector;
mod slots;
mod sorted;
mod sparda;
mod tiles;
mod union;
mod window;

pub use crate::names::parse_name;
pub use all_dense::AllDense;
pub use anchors::{AnchorScorer, Anchors};
pub use blocks::{BlockSelector, Query};
pub use catalog::{METHODS, MethodInfo, Variant};
pub use components::ComponentsSelector;
pub use dims::DimsSelector;
pub use error::SelectError;
pub use key_profile::KeyProfile;
pub use labels::LabelsSelector;
pub use mean_value::correct;
pub use nosa::TrainedBlocks;
pub use npy::read_head_maps;
pub use options::{MethodSpec, OPTIONS, OptionInfo};
pub use oracle::ExactSelector;
pub(crate) use pick::logits;
pub use pick::{hand_down, pool_and_pick};
pub use plan::{KvReads, LayerPlan, ModelShape, Plan};
pub use random::{RandomSelector, noise};
pub use refine::refine;
pub use role::{Budget, Follow, Keep, Refine, Role, Scorer};
pub use selector::{
    Given, LayerContext, LayerShape, Scratch, Selection, Selector, SelectorFactory, build,
};
pub use sorted::SortedSelector;
pub use tiles::select_tiles;
pub use window::WindowSelector;
