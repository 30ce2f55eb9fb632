//! One ragged step as the device sees it: tokens, positions, sequence records and page lists.

use crate::backend::{Backend, META_WORDS, Meta, Result, Seqs, Tensor};

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
}

/// Decode sequences split by a layer's dense threshold.
#[derive(Debug, Clone, Copy)]
pub struct DecodeSplit {
    /// Sequences of at most `threshold` tokens.
    pub dense: Group,
    /// Longer ones.
    pub sparse: Group,
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
    splits: Vec<(usize, DecodeSplit, Vec<usize>)>,
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
    pub fn words(rows: usize, seqs: usize, pages: usize, thresholds: usize) -> usize {
        let meta = seqs * META_WORDS * (1 + thresholds) + ALIGN * (2 + 2 * thresholds);
        2 * (rows + ALIGN) + meta + pages + ALIGN
    }

    /// Uploads a step into `buffer` (u32, at least [`Step::words`]).
    ///
    /// `thresholds`: the distinct dense thresholds of the plan's sparse layers.
    pub fn upload(
        b: &dyn Backend,
        buffer: &Tensor,
        seqs: &[StepSeq<'_>],
        thresholds: &[usize],
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
        let record = |&i: &usize| {
            let s = &seqs[i];
            let mut m = [0u32; META_WORDS];
            m[Meta::Q_START] = first_row[i] as u32;
            m[Meta::Q_LEN] = s.tokens.len() as u32;
            m[Meta::KV_LEN] = s.kv_len() as u32;
            m[Meta::PAGES] = page_start[i] as u32;
            m[Meta::SLOT] = s.slot as u32;
            m[Meta::STEP] = s.decode.unwrap_or(0) as u32;
            m
        };
        let group = |first_record: usize, members: &[usize]| Group {
            first_record,
            n: members.len(),
            max_kv: members.iter().map(|&i| seqs[i].kv_len()).max().unwrap_or(0),
            max_q: members.iter().map(|&i| seqs[i].tokens.len()).max().unwrap_or(0),
            rows: members.iter().map(|&i| first_row[i] + seqs[i].tokens.len()).max().unwrap_or(0),
        };

        let mut words =
            Words(Vec::with_capacity(Step::words(rows, seqs.len(), page_words, thresholds.len())));
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
        let mut splits = Vec::with_capacity(thresholds.len());
        for &t in thresholds {
            let (dense, sparse): (Vec<_>, Vec<_>) =
                order[..n_decode].iter().partition(|&&i| seqs[i].kv_len() <= t);
            splits.push((t, DecodeSplit { dense: add(&dense), sparse: add(&sparse) }, sparse));
        }
        let meta_len = words.0.len() - meta_start;
        let pages = words.section(order.iter().flat_map(|&i| seqs[i].pages.iter().copied()));
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

    /// The decode groups of a layer with this dense threshold.
    pub fn split(&self, threshold: usize) -> Option<&DecodeSplit> {
        self.splits.iter().find(|s| s.0 == threshold).map(|s| &s.1)
    }

    /// The sequences of a threshold's sparse group, as positions in the order given.
    pub fn sparse_members(&self, threshold: usize) -> &[usize] {
        self.splits.iter().find(|s| s.0 == threshold).map_or(&[], |s| &s.2)
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
        }
    }
}
