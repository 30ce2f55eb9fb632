//! A batch of sequences in KV pools that layers take in turn, and the attention of all layers of a step over them.

use super::subject::{Case, Subject};
use crate::backend::{Backend, DType, PAGE, Result, Tensor};
use crate::bench::random::{Random, Values};
use crate::engine::EngineError;
use crate::kv::{KvCache, KvShape, PageTable, pages_for};
use crate::model::{
    Attention, Checkpoint, Forecast, Forecaster, KeyOrder, ModelConfig, Step, Workspace,
};
use crate::select::{Given, KeyProfile, LayerShape, Plan, SelectError};

/// What can go wrong in a step.
pub(super) type Outcome<T> = std::result::Result<T, SelectError>;

/// Says whether to go on; asked before every step, of which a processor may take seconds each.
pub(super) type GoOn<'g> = dyn FnMut() -> bool + 'g;

/// Ends a measurement that is not to go on.
pub(super) fn unless_ended(go_on: &mut GoOn<'_>) -> crate::bench::Result<()> {
    if go_on() { Ok(()) } else { Err(EngineError::Interrupted.into()) }
}

/// Pools together exceed this, where memory allows: several times the largest L2 cache of today.
const ROTATE: u64 = 256 << 20;
/// Share of the free memory that pools may take.
const MEMORY_SHARE: f64 = 0.8;

pub(super) struct Rig<'a> {
    pub b: &'a dyn Backend,
    pub of: &'a Subject,
    /// Tokens of every sequence at the end.
    pub tokens: usize,
    pub batch: usize,
    /// Rows of the largest step.
    pub rows: usize,
    pub cache: KvCache,
    pub tables: Vec<PageTable>,
    pub ws: Workspace,
    pub random: Random,
    /// Pools that layers take in turn.
    pub pools: usize,
    /// Free device memory before the first pool, where the device tells.
    pub free_before: Option<u64>,
    config: ModelConfig,
    forecaster: Option<Forecaster>,
}

impl<'a> Rig<'a> {
    /// Empty pools for the plans of `case`, and random activations.
    pub fn new(
        b: &'a dyn Backend,
        of: &'a Subject,
        case: &Case,
        go_on: &mut GoOn<'_>,
    ) -> crate::bench::Result<Rig<'a>> {
        let free_before = b.free_memory();
        let &Case { tokens, batch, rows, .. } = case;
        let mut random = Random::new(of.seed);
        let all = || case.plans.iter().map(|p| &p.1);
        let shape = KvShape {
            n_layers: 1,
            kv_heads: of.kv_heads,
            head_dim: of.head_dim,
            lead: all().filter_map(Plan::lead).max().unwrap_or(of.head_dim),
            dtype: of.dtype,
            n_pages: batch * pages_for(tokens),
            slots: batch,
            int8_dims: all().map(Plan::int8_dims).max().unwrap_or(0),
            key_stats: all().any(Plan::key_stats),
            value_stats: all().any(Plan::value_stats),
        };
        let bytes =
            2 * (shape.n_pages * PAGE * of.kv_heads * of.head_dim * of.dtype.bytes()) as u64;
        let fit =
            free_before.map_or(usize::MAX, |f| (f as f64 * MEMORY_SHARE) as usize / bytes as usize);
        let pools = (ROTATE.div_ceil(bytes) as usize).min(fit).clamp(1, of.layers);
        let summaries: Vec<_> = all().flat_map(Plan::summaries).collect();
        let mut cache =
            KvCache::new(b, KvShape { n_layers: pools, ..shape })?.with_summaries(b, &summaries)?;
        let mut tables: Vec<PageTable> = (0..batch).map(|_| PageTable::default()).collect();
        // Page by page in random order of the sequences, so that their pages are mixed.
        for _ in 0..pages_for(tokens) {
            for s in random.shuffled(batch) {
                let table = &mut tables[s as usize];
                let n = PAGE.min(tokens - table.tokens());
                let room = cache.extend(b, table, n);
                room.map_err(|e| crate::bench::BenchError::BadOption(e.to_string()))??;
            }
        }
        let forecasts = all().any(Plan::wants_forecast);
        let config = config(of, forecasts)?;
        let act = b.caps().activations(of.dtype);
        let ws = Workspace::new(b, &config, act, rows)?;
        let forecaster =
            forecasts.then(|| forecaster(b, &config, [of.dtype, act], rows, &mut random));
        let forecaster = forecaster.transpose()?;
        let cache = cache.in_turn(of.layers);
        let mut rig = Rig {
            b,
            of,
            tokens,
            batch,
            rows,
            cache,
            tables,
            ws,
            random,
            pools,
            free_before,
            config,
            forecaster,
        };
        rig.draw()?;
        if case.filled {
            rig.fill(go_on)?;
        }
        Ok(rig)
    }

    /// Other queries, keys, values and, for Forecasts, layer inputs.
    pub fn draw(&mut self) -> Result<()> {
        let (ws, random) = (&self.ws, &mut self.random);
        let inputs = self.forecaster.is_some().then_some(&ws.normed);
        let all = [&ws.q, &ws.k, &ws.qkv].into_iter().chain(inputs);
        all.into_iter().try_for_each(|t| random.fill(self.b, t, Values::Normal))
    }

    /// Sizes of a layer.
    fn shape(&self, layer: usize) -> LayerShape {
        let of = self.of;
        LayerShape {
            layer,
            heads: of.heads,
            kv_heads: of.kv_heads,
            head_dim: of.head_dim,
            plain_dim: of.head_dim,
            kv_dtype: of.dtype,
            slots: self.batch,
            at_once: self.batch,
            rows: self.rows,
            capacity: self.capacity(),
        }
    }

    /// Most tokens of a sequence, in whole pages.
    pub fn capacity(&self) -> usize {
        self.tokens.next_multiple_of(PAGE)
    }

    /// Makes `plan` runnable.
    pub fn attention(&self, plan: &Plan) -> Outcome<Attention> {
        if plan.layers.iter().any(|p| p.correct) {
            return Err(SelectError::BadPlan {
                method: plan.method.clone(),
                reason: "the result is compared with attention alone; give --correct false".into(),
            });
        }
        let profile = KeyProfile::neutral(self.of.layers, self.of.kv_heads, self.of.head_dim);
        let given = Given { custom: None, profile: Some(&profile) };
        Attention::new(self.b, plan.clone(), self.shape(0), given)
    }

    /// A buffer for every step of `attention`.
    pub fn step_buffer(&self, attention: &Attention, paces: usize) -> Result<Tensor> {
        let pages = self.batch * pages_for(self.tokens);
        let words = Step::words(self.rows, self.batch, pages, paces, attention.tilings());
        self.b.alloc(DType::U32, words, "step")
    }

    /// The attention of all layers of a step, and the Forecasts that it asks for, as the decoder runs them.
    pub fn layers(&self, attention: &mut Attention, step: &Step) -> Outcome<()> {
        let (b, ws) = (self.b, &self.ws);
        // The rig's other plans may want one.
        let forecaster = self.forecaster.as_ref().filter(|_| attention.plan().wants_forecast());
        for l in 0..self.of.layers {
            let mut forecast = None;
            if let Some(f) = forecaster {
                let mut clock = std::mem::take(&mut attention.clock);
                let made = clock.time(
                    b,
                    l,
                    |t| &mut t.forecast,
                    || -> Result<()> {
                        forecast = f.at(b, &self.config, l, &ws.normed, step, attention)?;
                        Ok(())
                    },
                );
                attention.clock = clock;
                made?;
            }
            attention.append(b, step, &self.cache, self.shape(l), ws, None)?;
            attention.layer(b, step, &self.cache, self.shape(l), None, ws, forecast)?;
            b.advance()?;
        }
        Ok(())
    }

    /// Keys and values of a layer.
    pub fn kv(&self, layer: usize) -> (&Tensor, &Tensor) {
        let pool = self.cache.pool(layer);
        (pool.k, pool.v)
    }
}

/// A decoder block with these heads. Its other widths do not matter here, but that a Forecast is made of `hidden`
/// numbers: as many as the query heads have, which is usual.
fn config(of: &Subject, forecasts: bool) -> crate::bench::Result<ModelConfig> {
    let some = Checkpoint::random("llama-3.1-8b").map_err(EngineError::from)?.config().clone();
    Ok(ModelConfig {
        n_layers: of.layers,
        hidden: if forecasts { of.heads * of.head_dim } else { 8 },
        n_heads: of.heads,
        n_kv_heads: of.kv_heads,
        head_dim: of.head_dim,
        ffn: 8,
        vocab: 8,
        ..some
    })
}

/// Random Forecast projections.
fn forecaster(
    b: &dyn Backend,
    c: &ModelConfig,
    types: [DType; 2],
    rows: usize,
    random: &mut Random,
) -> crate::bench::Result<Forecaster> {
    let width = c.n_kv_heads * c.head_dim;
    let scale = (c.hidden as f32).sqrt().recip();
    let mut matrix = || random.normal(width * c.hidden).into_iter().map(|v| v * scale).collect();
    let file = Forecast::of((0..c.n_layers).map(|_| matrix()).collect());
    let frequencies = b.alloc(DType::F32, width / 2, "rotary frequencies")?;
    random.fill(b, &frequencies, Values::Scale)?;
    let inv_freq = vec![frequencies; c.n_layers];
    let made = Forecaster::new(b, file, c, (&KeyOrder::identity(c), inv_freq), types, rows);
    Ok(made.map_err(EngineError::from)?)
}
