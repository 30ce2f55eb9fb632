//! One ragged step as the device sees it: tokens, positions, sequence records and page lists.

use crate::backend::{Backend, BackendError, META_WORDS, Meta, Result, Seqs, Tensor};

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy)]
pub struct StepSeq<'a> {
    /// New tokens.
    pub tokens: &'a [u32],
    /// Tokens cached before this step.
    pub cached: usize,
    /// Page list that covers `cached + tokens.len()` tokens.
    pub pages: &'a [u32],
    /// Slot of private state.
    pub slot: usize,
    /// Decode steps since the prefill ended; `None` while prefilling. Only decode steps are sparse, and they
    /// bring exactly one token.
    pub decode: Option<usize>,
}

impl StepSeq<'_> {
    /// Tokens cached after this step.
    pub fn kv_len(&self) -> usize {
        self.cached + self.tokens.len()
    }
}

/// Sequences of a step that an op treats alike: a range of records in the step's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    first_record: usize,
    /// Sequences.
    pub n: usize,
    /// Longest sequence.
    pub max_kv: usize,
    max_q: usize,
    rows: usize,
    /// The records have all rows of their sequences; see [`Seqs::settled`].
    settled: bool,
}

/// The bound of a group's lengths: the next of about eight steps to the next power of two. Bounds that seldom change
/// make the steps between them alike, which is what replaying them takes.
fn bound(tokens: usize, capacity: usize) -> usize {
    let step = (tokens.next_power_of_two() / 16).max(ALIGN);
    tokens.next_multiple_of(step).min(capacity.max(tokens))
}

impl Group {
    /// Of records that lie one after the other from `first_record` on.
    fn of(first_record: usize, records: &[[u32; META_WORDS]], capacity: usize) -> Self {
        let most = |f: fn(&[u32; META_WORDS]) -> u32| records.iter().map(f).max().unwrap_or(0);
        Group {
            first_record,
            n: records.len(),
            max_kv: bound(most(|m| m[Meta::KV_LEN]) as usize, capacity),
            max_q: most(|m| m[Meta::Q_LEN]) as usize,
            rows: most(|m| m[Meta::Q_START] + m[Meta::Q_LEN]) as usize,
            settled: true,
        }
    }

    /// Records `first..first + n` of the group. On devices that bind at 256-byte offsets `first` must be a multiple
    /// of 8.
    pub fn part(self, first: usize, n: usize) -> Self {
        Group { first_record: self.first_record + first, n, ..self }
    }
}

/// When a layer is sparse, and when it chooses tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pace {
    /// Sequences of at most so many tokens are dense.
    pub threshold: usize,
    /// Steps that share a choice.
    pub reuse: usize,
}

/// The sequences of a step as layers of one pace treat them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// The pace.
    pub pace: Pace,
    /// For each sequence in the order given: it chooses in this step, if it is sparse.
    pub fresh: Vec<bool>,
}

/// Decode sequences split by a layer's pace.
#[derive(Debug, Clone, Copy)]
pub struct DecodeSplit {
    /// Sequences of at most `threshold` tokens.
    pub dense: Group,
    /// Longer ones.
    pub sparse: Group,
    /// The first of these: those that choose tokens in this step.
    pub fresh: Group,
}

/// How a layer cuts the rows of prompts: the first `threshold` tokens of a sequence are read densely, what comes
/// after in tiles that end at multiples of `tile` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Most rows of a tile.
    pub tile: usize,
    /// Tokens up to which a sequence is dense.
    pub threshold: usize,
}

impl Tiling {
    /// First token that is not read densely: tiles end at multiples of their size.
    fn first(self) -> usize {
        self.threshold / self.tile * self.tile
    }

    /// How tokens `start..end` of a sequence are read: the first that is not read densely, and the tiles from there on.
    fn cut(self, start: usize, end: usize) -> (usize, impl Iterator<Item = (usize, usize)>) {
        let first = self.first().clamp(start, end);
        let next = move |at: usize| ((at / self.tile + 1) * self.tile).min(end);
        let starts = std::iter::successors(Some(first), move |&at| Some(next(at)));
        (first, starts.take_while(move |&at| at < end).map(move |at| (at, next(at))))
    }

    /// The tile of a step of these prompts, counted over all of them, that holds `token` of sequence `i`.
    pub(super) fn tile_of(self, seqs: &[StepSeq<'_>], i: usize, token: usize) -> Option<usize> {
        let tiles = |s: &StepSeq<'_>| self.cut(s.cached, s.kv_len()).1;
        let within = tiles(seqs.get(i)?).position(|(from, to)| (from..to).contains(&token))?;
        Some(seqs.iter().take(i).map(|s| tiles(s).count()).sum::<usize>() + within)
    }

    /// Tiles that a step of `rows` rows of `seqs` sequences may have: each sequence may begin and end within one.
    pub fn most(self, rows: usize, seqs: usize) -> usize {
        rows.min(rows / self.tile + 2 * seqs)
    }
}

/// Prefilling rows split by a [`Tiling`].
#[derive(Debug, Clone, Copy)]
pub struct PrefillSplit {
    /// Rows that attend to everything, sequence by sequence.
    pub dense: Group,
    /// The other rows, sequence by sequence.
    pub sparse: Group,
    /// The tiles of these; a record each.
    pub tiles: Group,
}

/// Words between sections of the upload, so that every section starts on 256 bytes.
const ALIGN: usize = 64;

/// The step's device buffer and its parts.
#[derive(Debug)]
pub struct Step {
    tokens: Tensor,
    positions: Tensor,
    meta: Tensor,
    pages: Tensor,
    /// Rows of the batch; decoding sequences come first, in the order given.
    pub rows: usize,
    /// All sequences.
    pub all: Group,
    /// Prefilling sequences.
    pub prefill: Group,
    /// Decoding sequences.
    pub decode: Group,
    /// Batch row of each sequence's first token, in the order given.
    pub first_row: Vec<usize>,
    splits: Vec<(Pace, DecodeSplit, Vec<usize>)>,
    tiled: Vec<(Tiling, PrefillSplit)>,
}

struct Words(Vec<u32>);

impl Words {
    fn section(&mut self, words: impl IntoIterator<Item = u32>) -> (usize, usize) {
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
        let start = self.0.len();
        self.0.extend(words);
        (start, self.0.len() - start)
    }
}

impl Step {
    /// Words that a step of `rows` rows, `seqs` sequences and `pages` page entries in all may need.
    pub fn words(
        rows: usize,
        seqs: usize,
        pages: usize,
        paces: usize,
        tilings: &[Tiling],
    ) -> usize {
        let tiles: usize = tilings.iter().map(|t| 2 * seqs + t.most(rows, seqs)).sum();
        let records = seqs * (2 + paces) + tiles;
        let meta = records * META_WORDS + ALIGN * (2 + 2 * paces + 3 * tilings.len());
        2 * (rows + ALIGN) + meta + pages + ALIGN
    }

    /// Uploads a step into `buffer` (u32, at least [`Step::words`]).
    ///
    /// `capacity`: most tokens of a sequence, in whole pages; `cuts`: one for each pace of the plan's sparse layers;
    /// `tilings`: those of layers that read prompts sparsely.
    ///
    /// # Errors
    /// [`BackendError::BadArgument`] for a step that does not fit `buffer` or `capacity`.
    pub fn upload(
        b: &dyn Backend,
        buffer: &Tensor,
        seqs: &[StepSeq<'_>],
        capacity: usize,
        cuts: &[Cut],
        tilings: &[Tiling],
    ) -> Result<Step> {
        let mut order: Vec<usize> = (0..seqs.len()).filter(|&i| seqs[i].decode.is_some()).collect();
        let n_decode = order.len();
        order.extend((0..seqs.len()).filter(|&i| seqs[i].decode.is_none()));
        let mut first_row = vec![0; seqs.len()];
        let mut page_start = vec![0; seqs.len()];
        let (mut rows, mut page_words) = (0, 0);
        for &i in &order {
            first_row[i] = rows;
            page_start[i] = page_words;
            rows += seqs[i].tokens.len();
            page_words += seqs[i].pages.len();
        }
        // The rows of sequence `i` that hold tokens `from..to`.
        let rows_of = |i: usize, from: usize, to: usize| {
            let s = &seqs[i];
            let mut m = [0u32; META_WORDS];
            m[Meta::Q_START] = (first_row[i] + from - s.cached) as u32;
            m[Meta::Q_LEN] = (to - from) as u32;
            m[Meta::KV_LEN] = to as u32;
            m[Meta::PAGES] = page_start[i] as u32;
            m[Meta::SLOT] = s.slot as u32;
            m[Meta::STEP] = s.decode.unwrap_or(0) as u32;
            m
        };
        let record = |&i: &usize| rows_of(i, seqs[i].cached, seqs[i].kv_len());
        let group = |first_record: usize, members: &[usize]| {
            Group::of(first_record, &members.iter().map(record).collect::<Vec<_>>(), capacity)
        };

        let mut words = Words(Vec::with_capacity(Step::words(
            rows,
            seqs.len(),
            page_words,
            cuts.len(),
            tilings,
        )));
        let tokens = words.section(order.iter().flat_map(|&i| seqs[i].tokens.iter().copied()));
        let positions = words
            .section(order.iter().flat_map(|&i| seqs[i].cached as u32..seqs[i].kv_len() as u32));
        let meta_start = words.section(order.iter().flat_map(record)).0;
        // The prefill records follow the decode records; on a device that binds at 256-byte offsets they need
        // their own aligned copy.
        let mut add = |members: &[usize]| {
            let start = words.section(members.iter().flat_map(record)).0;
            group((start - meta_start) / META_WORDS, members)
        };
        let prefill = add(&order[n_decode..]);
        let mut splits = Vec::with_capacity(cuts.len());
        for Cut { pace, fresh } in cuts {
            let (dense, mut sparse): (Vec<usize>, Vec<usize>) =
                order[..n_decode].iter().partition(|&&i| seqs[i].kv_len() <= pace.threshold);
            // Those that choose come first, and are a group as well.
            sparse.sort_by_key(|&i| !fresh[i]);
            let chooses = sparse.iter().take_while(|&&i| fresh[i]).count();
            let (dense, all) = (add(&dense), add(&sparse));
            let fresh = group(all.first_record, &sparse[..chooses]);
            splits.push((*pace, DecodeSplit { dense, sparse: all, fresh }, sparse));
        }
        let tiled = tilings.iter().map(|&t| {
            let (mut dense, mut sparse, mut tiles) = (Vec::new(), Vec::new(), Vec::new());
            for &i in &order[n_decode..] {
                let (start, end) = (seqs[i].cached, seqs[i].kv_len());
                let (first, cut) = t.cut(start, end);
                if first > start {
                    dense.push(rows_of(i, start, first));
                }
                if end > first {
                    sparse.push(rows_of(i, first, end));
                }
                tiles.extend(cut.map(|(from, to)| rows_of(i, from, to)));
            }
            let mut add = |records: &[[u32; META_WORDS]]| {
                let start = words.section(records.iter().flatten().copied()).0;
                let group = Group::of((start - meta_start) / META_WORDS, records, capacity);
                Group { settled: false, ..group }
            };
            (t, PrefillSplit { dense: add(&dense), sparse: add(&sparse), tiles: add(&tiles) })
        });
        let tiled: Vec<_> = tiled.collect();
        let meta_len = words.0.len() - meta_start;
        let pages = words.section(order.iter().flat_map(|&i| seqs[i].pages.iter().copied()));
        let most = seqs.iter().map(StepSeq::kv_len).max().unwrap_or(0);
        if words.0.len() > buffer.len() || most > capacity {
            let reason = format!(
                "{} sequences with {rows} rows and up to {most} tokens are more than the limits allow",
                seqs.len()
            );
            return Err(BackendError::BadArgument { op: "step", reason });
        }
        let part = |(start, len): (usize, usize)| buffer.slice(start, len);
        b.upload(&buffer.slice(0, words.0.len()), bytemuck::cast_slice(&words.0))?;
        Ok(Step {
            tokens: part(tokens),
            positions: part(positions),
            meta: part((meta_start, meta_len)),
            pages: part(pages),
            rows,
            all: group(0, &order),
            prefill,
            decode: group(0, &order[..n_decode]),
            first_row,
            splits,
            tiled,
        })
    }

    /// u32 `[rows]`.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// u32 `[rows]`.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// Rows of the decoding sequences: the first of the batch.
    pub fn decode_rows(&self) -> usize {
        self.decode.rows
    }

    /// The decode groups of a layer with this pace.
    pub fn split(&self, pace: Pace) -> Option<&DecodeSplit> {
        self.splits.iter().find(|s| s.0 == pace).map(|s| &s.1)
    }

    /// The prefilling rows as a layer with this tiling reads them.
    pub fn tiled(&self, tiling: Tiling) -> Option<&PrefillSplit> {
        self.tiled.iter().find(|s| s.0 == tiling).map(|s| &s.1)
    }

    /// The sequences of a pace's sparse group, as positions in the order given.
    pub fn sparse_members(&self, pace: Pace) -> &[usize] {
        self.splits.iter().find(|s| s.0 == pace).map_or(&[], |s| &s.2)
    }
}

/// Owned tensors behind a [`Seqs`].
#[derive(Debug)]
pub struct GroupSeqs {
    meta: Tensor,
    pages: Tensor,
    group: Group,
}

impl GroupSeqs {
    /// The records of `g` in `step`.
    pub fn new(step: &Step, g: Group) -> Self {
        GroupSeqs {
            meta: step.meta.slice(g.first_record * META_WORDS, g.n * META_WORDS),
            pages: step.pages.clone(),
            group: g,
        }
    }

    /// As ops take it.
    pub fn seqs(&self) -> Seqs<'_> {
        let g = self.group;
        Seqs {
            meta: &self.meta,
            pages: &self.pages,
            n: g.n,
            max_kv: g.max_kv,
            max_q: g.max_q,
            rows: g.rows,
            settled: g.settled,
        }
    }
}
