//! What to generate, and what is said about it.

use super::{Engine, EngineError, Sampling};
use crate::model::{Message, Tokenizer};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What to continue.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Text as it is.
    Text(String),
    /// A conversation, put through the model's chat template.
    Chat(Vec<Message>),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// One thing to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Longest answer in tokens.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Text that ends the answer; it is not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer besides the model's own.
    pub stop_tokens: Vec<u32>,
    /// Keep the cached tokens after the answer: a later prompt that starts the same way reuses them.
    pub keep: bool,
    /// Set by the caller to stop after the current step.
    pub cancel: Arc<AtomicBool>,
}

impl Request {
    fn new(prompt: Prompt) -> Self {
        Request {
            prompt,
            max_tokens: 256,
            sampling: Sampling::default(),
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            keep: false,
            cancel: Arc::default(),
        }
    }
    /// Continues a text.
    pub fn text(text: impl Into<String>) -> Self {
        Request::new(Prompt::Text(text.into()))
    }
    /// Asks one question through the chat template.
    pub fn chat(question: impl Into<String>) -> Self {
        Request::new(Prompt::Chat(vec![Message::new("user", question)]))
    }
    /// Continues tokens.
    pub fn tokens(tokens: Vec<u32>) -> Self {
        Request::new(Prompt::Tokens(tokens))
    }
    /// Longest answer in tokens (256 by default).
    pub fn max_tokens(mut self, n: usize) -> Self {
        self.max_tokens = n;
        self
    }
    /// How tokens are drawn (greedy by default).
    pub fn sampling(mut self, s: Sampling) -> Self {
        self.sampling = s;
        self
    }

    /// The prompt's tokens.
    ///
    /// # Errors
    /// [`EngineError::Model`] from the tokenizer or the template, [`EngineError::EmptyPrompt`].
    pub fn encode(&self, engine: &Engine) -> Result<Vec<u32>, EngineError> {
        let t: &Tokenizer = engine.tokenizer();
        let tokens = match &self.prompt {
            Prompt::Text(text) => t.encode(text, t.adds_bos())?,
            Prompt::Tokens(tokens) => tokens.clone(),
            Prompt::Chat(messages) => {
                let template = engine.template().ok_or(crate::model::ModelError::NoTemplate)?;
                template.encode(t, messages)?
            }
        };
        if tokens.is_empty() { Err(EngineError::EmptyPrompt) } else { Ok(tokens) }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it.
    Eos,
    /// A stop string or stop token.
    Stop,
    /// `max_tokens`.
    Length,
    /// The context is full, or older requests need this one's pages of the KV cache.
    Context,
    /// The caller cancelled.
    Cancelled,
    /// None of the logits was finite: a model or method gone wrong.
    NoFiniteLogit,
}

/// A piece of an answer.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The token behind it; `None` for text that was held back until the end.
    pub token: Option<u32>,
    /// Text that became complete with it; may be empty.
    pub text: String,
}

/// Measurements of one request.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Stats {
    /// Tokens of the prompt, reused ones included.
    pub prompt_tokens: usize,
    /// Prompt tokens that were still cached from an earlier request.
    pub reused_tokens: usize,
    /// Prompt tokens that were read.
    pub prefill_tokens: usize,
    /// Tokens of the answer, without one that ended it.
    pub generated_tokens: usize,
    /// Answer tokens that were fed back; the first token comes with the prompt.
    pub decode_steps: usize,
    /// Seconds of the steps that read the prompt.
    pub prefill_seconds: f64,
    /// Seconds of the decode steps.
    pub decode_seconds: f64,
    /// KV bytes that the last decode step read under the plan, and what dense attention would have read.
    pub kv_bytes: u64,
    /// KV bytes that dense attention would have read in that step.
    pub kv_bytes_dense: u64,
    /// Why the answer ended; `None` while it grows.
    pub finish: Option<Finish>,
}

/// What happened to a request in a step.
#[derive(Clone, Debug)]
pub enum Event {
    /// Prompt tokens cached so far.
    Prefilled {
        /// Number that [`Scheduler::submit`](super::Scheduler::submit) gave.
        request: usize,
        /// Tokens so far.
        done: usize,
        /// Tokens of the prompt.
        of: usize,
    },
    /// A token was drawn.
    Piece {
        /// Number that [`Scheduler::submit`](super::Scheduler::submit) gave.
        request: usize,
        /// The token and its text.
        piece: Piece,
    },
    /// The request ended; text that was still held back.
    Finished {
        /// Number that [`Scheduler::submit`](super::Scheduler::submit) gave.
        request: usize,
        /// The held back text; may be empty.
        text: String,
        /// Measurements of the request.
        stats: Stats,
    },
}
