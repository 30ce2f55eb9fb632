//! What of a text does not change while matrices are learned.

use super::grid::{Grid, Picker};
use super::lesson::{HeadKeys, input};
use super::loss::restrict;
use super::teacher::{LayerTeacher, Room, Teacher};
use crate::calibrate::TracedText;
use crate::model::lookahead::source;
use rayon::prelude::*;

/// Queries whose teacher is computed at once.
const ROWS: usize = 128;

/// Some queries of one text: what predicts, what is predicted from it, and what the teacher says.
pub(super) struct Prepared {
    /// Positions of the queries, ascending.
    pub rows: Vec<usize>,
    pub grid: Grid,
    /// Compressed keys of the text.
    pub windows: usize,
    pub hidden: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Per layer: its normed inputs `[rows, hidden]`; empty where they predict nothing.
    inputs: Vec<Vec<f32>>,
    /// Per layer whose blocks are predicted; `None` where a sliding window reads no blocks.
    targets: Vec<Option<Target>>,
}

struct Target {
    /// `[windows, kv_heads, head_dim]`.
    compressed: Vec<f32>,
    /// Per KV head.
    truths: Vec<Truth>,
}

/// The teacher of one KV head of one layer.
#[derive(Default)]
pub(super) struct Truth {
    /// Where the picks and the shares of each row end.
    ends: Vec<(usize, usize)>,
    picks: Vec<u32>,
    shares: Vec<f32>,
    entropies: Vec<f64>,
}

/// The teacher at one query.
#[derive(Clone, Copy)]
pub(super) struct RowTruth<'a> {
    /// The blocks that it picks, in no particular order.
    pub picks: &'a [u32],
    /// [`restrict`]ed to the windows of these.
    pub shares: &'a [f32],
    pub entropy: f64,
}

impl Truth {
    fn push(&mut self, grid: Grid, truth: &[f32], row: usize, picker: &mut Picker) {
        let seen = grid.started(row).min(truth.len());
        let picks = grid.pick_in(&truth[..seen], row, picker);
        let selected = grid.of_blocks(picks, seen);
        self.entropies.push(restrict(truth, selected, &mut self.shares));
        self.picks.extend_from_slice(picks);
        self.ends.push((self.picks.len(), self.shares.len()));
    }

    /// The `i`-th query's.
    pub fn row(&self, i: usize) -> RowTruth<'_> {
        let (start, end) = (if i == 0 { (0, 0) } else { self.ends[i - 1] }, self.ends[i]);
        RowTruth {
            picks: &self.picks[start.0..end.0],
            shares: &self.shares[start.1..end.1],
            entropy: self.entropies[i],
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.ends)
            + size_of_val(&*self.picks)
            + size_of_val(&*self.shares)
            + size_of_val(&*self.entropies)
    }
}

impl Prepared {
    /// The queries `rows` of a traced text; `None` when `go_on` says no.
    pub fn new(
        text: &TracedText,
        grid: Grid,
        teacher: Teacher,
        rows: Vec<usize>,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Option<Prepared> {
        let (layers, windows) = (text.layers.len(), grid.windows(text.tokens));
        let reads_blocks = |target: &usize| text.windows[*target].is_none();
        let predicts =
            |layer: usize| (0..layers).filter(reads_blocks).any(|target| source(target) == layer);
        let inputs = (0..layers).into_par_iter().map(|layer| match predicts(layer) {
            true => input(text, layer, &rows),
            false => Vec::new(),
        });
        let inputs = inputs.collect();
        let of_target = |target: usize| {
            if !reads_blocks(&target) {
                return Some(None);
            }
            let compressed = grid.compressed(text, target);
            let teacher = LayerTeacher::new(text, target, grid, teacher, &compressed);
            let heads = (0..text.kv_heads).into_par_iter();
            let of_head = |(room, picker): &mut (Room, Picker), head: usize| {
                let mut truth = Truth::default();
                for rows in rows.chunks(ROWS) {
                    if !go_on() {
                        return None;
                    }
                    let p = teacher.of_in(head, rows, room);
                    for (p, &row) in p.chunks_exact(windows.max(1)).zip(rows) {
                        truth.push(grid, p, row, picker);
                    }
                }
                Some(truth)
            };
            let truths: Option<Vec<Truth>> = heads.map_init(Default::default, of_head).collect();
            truths.map(|truths| Some(Target { compressed, truths }))
        };
        let targets: Option<Vec<Option<Target>>> =
            (0..layers).into_par_iter().with_max_len(1).map(of_target).collect();
        Some(Prepared {
            grid,
            windows,
            hidden: text.hidden,
            kv_heads: text.kv_heads,
            head_dim: text.head_dim,
            inputs,
            targets: targets?,
            rows,
        })
    }

    /// Normed inputs `[rows, hidden]` that predict the blocks of `target`, its keys and its teacher, for a KV head;
    /// `None` where there are no blocks to predict.
    pub fn of(&self, target: usize, head: usize) -> Option<(&[f32], HeadKeys<'_>, &Truth)> {
        let found = self.targets[target].as_ref()?;
        let (kv_heads, head_dim) = (self.kv_heads, self.head_dim);
        let keys = HeadKeys { compressed: &found.compressed, head, kv_heads, head_dim };
        Some((&self.inputs[source(target)], keys, &found.truths[head]))
    }

    /// Memory that it takes.
    pub fn bytes(&self) -> u64 {
        let inputs: usize = self.inputs.iter().map(|x| size_of_val(&**x)).sum();
        let of_target = |t: &Target| {
            size_of_val(&*t.compressed) + t.truths.iter().map(Truth::bytes).sum::<usize>()
        };
        let targets: usize = self.targets.iter().flatten().map(of_target).sum();
        (inputs + targets) as u64
    }
}
