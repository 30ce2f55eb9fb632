//! The cases, one file per op family, and what they run on.

mod attend;
mod batch;
mod block_errors;
mod blocks;
mod content;
mod dense;
mod dims;
mod errors;
mod kv;
mod listed;
mod lists;
mod memory;
mod neighbours;
pub mod oracle;
mod quantised;
#[path = "../common/readme.rs"]
mod readme;
pub mod report;
pub mod rig;
mod rotate;
mod score;
pub mod table;
mod tiles;
mod tolerance;
mod top_k;

use longsight::backend::{Capabilities, DType};
use rig::{Outcome, Rig};

/// Dtypes of a case: `w` of weights and KV, `act` of activations.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    pub w: DType,
    pub act: DType,
}

/// What a case does.
pub type Body = Box<dyn Fn(&mut Rig) -> Outcome + Send>;

/// One named check of one op.
pub struct Case {
    pub op: &'static str,
    pub name: String,
    pub dtype: DType,
    pub body: Body,
}

/// Cases under construction for one combination of dtypes.
pub struct Cases {
    pub types: Types,
    /// Ops wanted; empty for all.
    ops: &'static [&'static str],
    suffix: &'static str,
    all: Vec<Case>,
}

/// Ops that take f32 activations over a narrower KV cache on every backend.
const MIXED: &[&str] = &[
    "score_dims",
    "score_rows",
    "score_tiles",
    "score_summaries",
    "project",
    "attend_dense",
    "attend_rows",
];

impl Cases {
    /// Adds a case; its name gets the dtype.
    pub fn add(
        &mut self,
        op: &'static str,
        name: impl AsRef<str>,
        body: impl Fn(&mut Rig, Types) -> Outcome + Send + 'static,
    ) {
        let types = self.types;
        if !self.ops.is_empty() && !self.ops.contains(&op) {
            return;
        }
        let name = format!("{}_{}{}", name.as_ref(), types.w, self.suffix);
        let body = Box::new(move |rig: &mut Rig| body(rig, types));
        self.all.push(Case { op, name, dtype: types.w, body });
    }
}

/// All cases for a device.
pub fn cases(caps: &Capabilities) -> Vec<Case> {
    let mut all = Vec::new();
    for w in caps.storage.iter().copied().filter(|d| d.is_float()) {
        let act = if caps.activations_follow_weights { w } else { DType::F32 };
        let mut c = Cases { types: Types { w, act }, ops: &[], suffix: "", all: Vec::new() };
        dense::cases(&mut c);
        kv::cases(&mut c);
        rotate::cases(&mut c);
        dims::cases(&mut c);
        score::cases(&mut c);
        listed::cases(&mut c);
        blocks::cases(&mut c);
        content::cases(&mut c);
        attend::cases(&mut c);
        neighbours::cases(&mut c);
        quantised::cases(&mut c);
        tiles::cases(&mut c);
        if w == DType::F32 {
            memory::cases(&mut c);
            top_k::cases(&mut c);
            lists::cases(&mut c);
            errors::cases(&mut c);
            block_errors::cases(&mut c);
        }
        all.append(&mut c.all);
        if act != DType::F32 {
            // Where activations are f32 for every cache, the cases above are these.
            let types = Types { w, act: DType::F32 };
            let mut c = Cases { types, ops: MIXED, suffix: "_f32_act", all: Vec::new() };
            score::cases(&mut c);
            listed::cases(&mut c);
            blocks::cases(&mut c);
            attend::cases(&mut c);
            neighbours::cases(&mut c);
            quantised::cases(&mut c);
            tiles::cases(&mut c);
            all.append(&mut c.all);
        }
    }
    all
}
