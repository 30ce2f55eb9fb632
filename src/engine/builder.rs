//! Building an engine: model, device, dtypes, method, sizes.

use super::calibrate::{calibrated_order, order_limits, order_source};
use super::key_profile::Profiling;
use super::sizes::check_memory;
use super::{AuditConfig, Doubling, Engine, EngineError};
use crate::backend::{Backend, DType, open};
use crate::kv::{KvCache, KvShape};
use crate::model::{
    Attention, ChatTemplate, Checkpoint, Decoder, Forecast, KeyOrder, ModelError, Tokenizer,
    cache_dir,
};
use crate::select::{Given, KeyProfile, MethodSpec, Plan, SelectError, SelectorFactory};
use std::path::PathBuf;
use std::sync::Arc;

/// What a long-running part of a build reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Bytes fetched, and all of them when known.
    Fetch(u64, Option<u64>),
    /// Parameters on the device, and all of them.
    Load(u64, u64),
    /// Tokens of the built-in text read to order the keys, and all of them.
    Calibrate(u64, u64),
}

enum MethodChoice {
    Spec(Box<MethodSpec>),
    Plan(Plan),
}

type OnProgress<'a> = Box<dyn FnMut(Progress) + 'a>;

/// Settings of an [`Engine`]; see the setters for defaults.
pub struct EngineBuilder<'a> {
    model: String,
    checkpoint: Option<Checkpoint>,
    tokenizer: Option<Tokenizer>,
    device: String,
    backend: Option<Arc<dyn Backend>>,
    pub(super) dtype: Option<DType>,
    pub(super) kv_dtype: Option<DType>,
    method: MethodChoice,
    custom: Option<SelectorFactory>,
    pub(super) context: Option<usize>,
    pub(super) sequences: usize,
    pub(super) chunk: Option<usize>,
    pub(super) kv_tokens: Option<usize>,
    summaries_for: Vec<MethodSpec>,
    summary_plans: Vec<Plan>,
    forecast: Option<PathBuf>,
    lookahead: bool,
    calibrate: bool,
    profile: Option<KeyProfile>,
    key_order_dir: Option<PathBuf>,
    audit: Option<AuditConfig>,
    progress: OnProgress<'a>,
}

impl std::fmt::Debug for EngineBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineBuilder").field("model", &self.model).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts a build.
    pub fn builder<'a>() -> EngineBuilder<'a> {
        EngineBuilder {
            model: "smollm2".into(),
            checkpoint: None,
            tokenizer: None,
            device: "auto".into(),
            backend: None,
            dtype: None,
            kv_dtype: None,
            method: MethodChoice::Spec(Box::default()),
            custom: None,
            context: None,
            sequences: 1,
            chunk: None,
            kv_tokens: None,
            summaries_for: Vec::new(),
            summary_plans: Vec::new(),
            forecast: None,
            lookahead: false,
            calibrate: true,
            profile: None,
            key_order_dir: None,
            audit: None,
            progress: Box::new(|_| ()),
        }
    }
}

impl<'a> EngineBuilder<'a> {
    /// A folder, a `.gguf` file, a hub id, `smollm2` (the default), `tiny`, or `random:<shape>` for random weights of
    /// a known shape ([`Checkpoint::random`]).
    pub fn model(mut self, name_or_path: impl Into<String>) -> Self {
        self.model = name_or_path.into();
        self
    }
    /// Model files that are already open, instead of [`EngineBuilder::model`].
    pub fn checkpoint(mut self, checkpoint: Checkpoint) -> Self {
        self.checkpoint = Some(checkpoint);
        self
    }
    /// The model's tokenizer where it is already there; [`ModelError::Tokenizer`] where it has more ids than the model's
    /// embedding has rows. Default: the one that comes with the model's files.
    pub fn tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }
    /// `auto` (default), `cpu`, `wgpu[:name]` or `cuda[:n]`; see [`open`].
    pub fn device(mut self, selector: impl Into<String>) -> Self {
        self.device = selector.into();
        self
    }
    /// A backend that is already open, instead of [`EngineBuilder::device`].
    pub fn backend(mut self, backend: Arc<dyn Backend>) -> Self {
        self.backend = Some(backend);
        self
    }
    /// Dtype of the weights. Default: bf16 for checkpoints stored so and on CUDA, else f16.
    pub fn dtype(mut self, dtype: impl Into<Option<DType>>) -> Self {
        self.dtype = dtype.into();
        self
    }
    /// Dtype of the KV cache. Default: that of the weights.
    pub fn kv_dtype(mut self, dtype: impl Into<Option<DType>>) -> Self {
        self.kv_dtype = dtype.into();
        self
    }
    /// Method by name and options. Default: SparCas on sorted keys.
    pub fn method(mut self, spec: MethodSpec) -> Self {
        self.method = MethodChoice::Spec(Box::new(spec));
        self
    }
    /// Method as a finished plan.
    pub fn plan(mut self, plan: Plan) -> Self {
        self.method = MethodChoice::Plan(plan);
        self
    }
    /// Makes the selectors of layers whose plan says [`Scorer::Custom`](crate::select::Scorer::Custom).
    pub fn selector(mut self, factory: SelectorFactory) -> Self {
        self.custom = Some(factory);
        self
    }
    /// Most tokens of a sequence. Default: the model's own limit, at most 32,768.
    pub fn context(mut self, tokens: impl Into<Option<usize>>) -> Self {
        self.context = tokens.into();
        self
    }
    /// Sequences open at once. Default 1.
    pub fn sequences(mut self, n: usize) -> Self {
        self.sequences = n;
        self
    }
    /// Prompt tokens per step. Default: 4096 on CUDA, whose products are at their best from there on, else 512.
    pub fn chunk(mut self, tokens: impl Into<Option<usize>>) -> Self {
        self.chunk = tokens.into();
        self
    }
    /// Tokens that the KV cache holds over all sequences; no sequence gets more. Default: context x sequences.
    pub fn kv_tokens(mut self, tokens: usize) -> Self {
        self.kv_tokens = Some(tokens);
        self
    }
    /// Keeps what these methods read in the cache as well, so that [`Engine::set_plan`] can switch to them.
    pub fn summaries_for(mut self, methods: &[MethodSpec]) -> Self {
        self.summaries_for = methods.to_vec();
        self
    }
    /// As [`EngineBuilder::summaries_for`], for finished plans.
    pub fn summaries_for_plans(mut self, plans: &[Plan]) -> Self {
        self.summary_plans = plans.to_vec();
        self
    }
    /// File of Forecast projections trained for this model, which `sparda` needs; see [`Forecast`].
    pub fn forecast(mut self, file: impl Into<Option<PathBuf>>) -> Self {
        self.forecast = file.into();
        self
    }
    /// In place of such a file: the next layer's own queries, untrained; see [`Forecast::lookahead`].
    pub fn lookahead(mut self, yes: bool) -> Self {
        self.lookahead = yes;
        self
    }
    /// Whether to measure the model for methods that want it (default): the energy of its keys, to order them, and its
    /// [`KeyProfile`]. Otherwise keys keep the checkpoint's order, and the profile is neutral.
    pub fn calibrate(mut self, yes: bool) -> Self {
        self.calibrate = yes;
        self
    }
    /// The model's profile where it is already there, in the checkpoint's order of dimensions.
    pub fn key_profile(mut self, profile: impl Into<Option<KeyProfile>>) -> Self {
        self.profile = profile.into();
        self
    }
    /// Folder that keeps what was measured of the model's keys. Default: [`cache_dir`].
    pub fn key_order_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.key_order_dir = Some(dir.into());
        self
    }
    /// Audits the selection while decoding.
    pub fn audit(mut self, audit: impl Into<Option<AuditConfig>>) -> Self {
        self.audit = audit.into();
        self
    }
    /// Hears of progress.
    pub fn on_progress(mut self, f: impl FnMut(Progress) + 'a) -> Self {
        self.progress = Box::new(f);
        self
    }

    /// Opens the model and the device, loads the weights, orders the keys, allocates the cache.
    ///
    /// # Errors
    /// Any [`EngineError`]; nothing is left behind.
    pub fn build(mut self) -> Result<Engine, EngineError> {
        let checkpoint = match self.checkpoint.take() {
            Some(open) => open,
            None => self.open_checkpoint()?,
        };
        // Random keys have no order to find.
        self.calibrate &= !checkpoint.is_random();
        let tokenizer = match self.tokenizer.take() {
            Some(there) => {
                there.check_rows(checkpoint.config().vocab)?;
                there
            }
            None => Tokenizer::for_checkpoint(&checkpoint)?,
        };
        let template = match ChatTemplate::for_checkpoint(&checkpoint, &tokenizer) {
            Ok(t) => Some(t),
            Err(ModelError::NoTemplate) => None,
            Err(e) => return Err(e.into()),
        };
        let backend = match self.backend.take() {
            Some(b) => b,
            None => open(&self.device)?,
        };
        let fingerprint = checkpoint.fingerprint();
        let (limits, n_pages) = self.limits(checkpoint.config(), &*backend)?;
        let mut checkpoint = checkpoint;
        checkpoint.settle(limits.context);
        let config = checkpoint.config().clone();
        let model = config.plan_shape(&fingerprint);
        let plan_of = |spec: &MethodSpec| spec.plan(&model, limits.context);
        let plan = match &self.method {
            MethodChoice::Spec(spec) => plan_of(spec)?,
            MethodChoice::Plan(plan) => plan.clone(),
        };
        plan.check(&model)?;
        let given = match &self.method {
            MethodChoice::Plan(plan) => Some(plan),
            MethodChoice::Spec(_) => None,
        };
        let mut given = given.into_iter().chain(&self.summary_plans);
        let short = given.find_map(|plan| plan.too_short_for(limits.context));
        let mut plans = vec![plan.clone()];
        for spec in &self.summaries_for {
            plans.push(plan_of(spec)?);
        }
        for plan in self.summary_plans.drain(..) {
            plan.check(&model)?;
            plans.push(plan);
        }

        let forecast = match self.forecast.take() {
            Some(path) => Some(Forecast::open(&path, &config, &fingerprint)?),
            None if self.lookahead => Some(Forecast::lookahead(&checkpoint)?),
            None => None,
        };
        if let (Some(p), None) = (plans.iter().find(|p| p.wants_forecast()), &forecast) {
            return Err(SelectError::NoForecast { method: p.method.clone() }.into());
        }

        let dtype = self.weight_dtype(&*backend, &checkpoint)?;
        let kv_dtype = self.kv_dtype.unwrap_or(dtype);
        let act = backend.caps().activations(dtype);
        if !backend.attends(act, kv_dtype) {
            return Err(EngineError::BadOption(format!(
                "{dtype} weights beside a {kv_dtype} KV cache: {} attends to caches of {act} with them; leave the \
                 cache's dtype out, or take f32 weights",
                backend.name()
            )));
        }
        let kv = KvShape {
            n_layers: config.n_layers,
            kv_heads: config.n_kv_heads,
            head_dim: config.kv_dim(),
            lead: plans.iter().filter_map(Plan::lead).max().unwrap_or(config.kv_dim()),
            dtype: kv_dtype,
            n_pages,
            slots: limits.seqs,
            int8_dims: plans.iter().map(Plan::int8_dims).max().unwrap_or(0),
            key_stats: plans.iter().any(Plan::key_stats),
            value_stats: plans.iter().any(Plan::value_stats),
        };
        // Before the weights are read, which may take minutes.
        kv.check(&*backend)?;
        check_memory(&*backend, &config, dtype, &kv)?;
        let mut notes: Vec<_> = short.into_iter().collect();
        let calibrate = self.calibrate;
        let order_wanted = calibrate && plans.iter().any(Plan::wants_key_order);
        let source = order_source(&config, &fingerprint);
        let dir = self.key_order_dir.take().or_else(cache_dir);
        let saved = dir.as_ref().map(|d| KeyOrder::cache_file(d, &fingerprint));
        let known = saved.as_ref().and_then(|p| KeyOrder::load(p, &source, &config));
        let measure = order_wanted && known.is_none();
        let order = known.filter(|_| order_wanted).unwrap_or_else(|| KeyOrder::identity(&config));
        let mut progress = self.progress;
        let mut on_load = |done, all| progress(Progress::Load(done, all));
        let wanted = plans.iter().any(Plan::wants_profile);
        let given = self.profile.take();
        let profiling = match wanted {
            true => Profiling::new(given, calibrate, dir.as_deref(), (&config, &fingerprint))?,
            false => Profiling::None,
        };
        let text = measure || profiling.measures();
        let first = if text { order_limits(&source) } else { limits };
        let mut decoder = Decoder::load(backend, &checkpoint, dtype, order, first, &mut on_load)?;
        if measure {
            let mut on = |done, all| progress(Progress::Calibrate(done, all));
            let order = calibrated_order(&mut decoder, &tokenizer, kv_dtype, source, &mut on)?;
            if let Some(path) = &saved
                && let Err(e) = order.save(path)
            {
                notes.push(format!("the key order could not be saved to {}: {e}", path.display()));
            }
            decoder.set_key_order(&checkpoint, order)?;
        }
        let mut on = |done, all| progress(Progress::Calibrate(done, all));
        let profile = profiling.finish(&mut decoder, &tokenizer, kv_dtype, &mut notes, &mut on)?;
        if text {
            decoder.set_limits(limits)?;
        }

        if let Some(file) = forecast {
            decoder.set_forecast(file)?;
        }
        let cache = KvCache::new(&**decoder.backend(), kv)?;
        let summaries: Vec<_> = plans.iter().flat_map(Plan::summaries).collect();
        let cache = cache.with_summaries(&**decoder.backend(), &summaries)?;
        let shape = decoder.layer_shape(0, kv_dtype);
        let given = Given { custom: self.custom.as_ref(), profile: profile.as_ref() };
        let attention = Attention::new(&**decoder.backend(), plan, shape, given)?;
        Ok(Engine {
            checkpoint,
            tokenizer: Arc::new(tokenizer),
            template,
            decoder,
            cache,
            attention,
            custom: self.custom,
            profile,
            audit: self.audit,
            fingerprint,
            notes,
            key_order_settled: order_wanted || !calibrate,
            sequences: (0..limits.seqs).map(|_| None).collect(),
            kept: Vec::new(),
            audit_steps: 0,
            doubling: Doubling::default(),
        })
    }

    fn open_checkpoint(&mut self) -> Result<Checkpoint, EngineError> {
        let progress = std::cell::RefCell::new(&mut self.progress);
        let on = |done, all| (progress.borrow_mut())(Progress::Fetch(done, all));
        Ok(Checkpoint::named(&self.model, &on)?)
    }
}
