//! Text to token ids and back.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use super::error::{ModelError, Result};
use super::gguf::Gguf;
use super::mapped::{read_json, read_side_file};
use super::tokenizer_gguf;
use super::weights::Checkpoint;

/// How a text is encoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Put the beginning-of-sequence token first, if the model has one.
    pub add_bos: bool,
    /// Turn the spelling of special tokens (such as `<|im_end|>`) into their ids. For rendered
    /// chat templates; off for a user's text, where such a spelling is just text.
    pub parse_special: bool,
}

/// Marks a spelling of a special token as text. Not a character: no text should hold it.
const MARK: char = '\u{fdd0}';

/// How the vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// Every byte is one printable character (GPT-2's table).
    ByteLevel,
    /// U+2581 is a space and `<0xAB>` a byte (SentencePiece).
    Pieces { strip_first_space: bool },
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    /// The same, reading special tokens as text. Built when first needed.
    literal: OnceLock<tokenizers::Tokenizer>,
    spelling: Spelling,
    added: HashSet<u32>,
    special: HashSet<u32>,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
}

/// What a model's files say about its tokenizer besides the vocabulary.
pub(super) struct Extras {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// `None`: the tokenizer's own post-processor decides.
    pub adds_bos: Option<bool>,
}

impl Tokenizer {
    /// The tokenizer of an opened checkpoint.
    ///
    /// # Errors
    /// `MissingTokenizer`, or `Tokenizer` when it cannot be used with these weights.
    pub fn for_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let mut tokenizer = match checkpoint.gguf() {
            Some(gguf) => Self::from_gguf(gguf)?,
            // Any tokens will do.
            None if checkpoint.is_random() => {
                Self::from_folder(&super::resolve("tiny", &|_, _| ())?)?
            }
            None => Self::from_folder(checkpoint.path())?,
        };
        tokenizer.check_rows(checkpoint.config().vocab)?;
        tokenizer.bos = tokenizer.bos.or(checkpoint.config().bos);
        Ok(tokenizer)
    }

    /// Every id has a row in an embedding of `rows` rows.
    pub(crate) fn check_rows(&self, rows: usize) -> Result<()> {
        let ids = self.vocab_size;
        if ids > rows {
            let what = format!("it has {ids} ids but the model's embedding only {rows} rows");
            return Err(self.fault(what));
        }
        Ok(())
    }

    /// The tokenizer of a Hugging Face folder: `tokenizer.json`, and `tokenizer_config.json`
    /// where there is one.
    ///
    /// # Errors
    /// As [`Tokenizer::for_checkpoint`].
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let Some(bytes) = read_side_file(&path)? else {
            return Err(ModelError::MissingTokenizer { path: folder.to_owned() });
        };
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| ModelError::Tokenizer { path: path.clone(), what: e.to_string() })?;
        let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        // A special token is a string or an object with its content.
        let named = |key: &str| {
            let value = config.get(key)?;
            let content = value.as_str().or_else(|| value.get("content")?.as_str())?;
            inner.token_to_id(content)
        };
        let extras = Extras {
            bos: named("bos_token"),
            eos: named("eos_token"),
            adds_bos: config.get("add_bos_token").and_then(Value::as_bool),
        };
        Self::build(&path, inner, extras)
    }

    /// The tokenizer in a GGUF file's metadata: byte-level BPE (`gpt2`) or SentencePiece BPE
    /// (`llama`).
    ///
    /// # Errors
    /// As [`Tokenizer::for_checkpoint`].
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let (json, extras) = tokenizer_gguf::describe(gguf)?;
        let inner = tokenizers::Tokenizer::from_bytes(json.to_string()).map_err(|e| {
            ModelError::Tokenizer { path: gguf.path().to_owned(), what: e.to_string() }
        })?;
        Self::build(gguf.path(), inner, extras)
    }

    fn build(path: &Path, mut inner: tokenizers::Tokenizer, extras: Extras) -> Result<Self> {
        let fault = |what: String| ModelError::Tokenizer { path: path.to_owned(), what };
        inner.with_truncation(None).map_err(|e| fault(e.to_string()))?;
        inner.with_padding(None);
        let spelling = spelling(&inner).ok_or_else(|| {
            fault("its decoder is neither byte-level nor SentencePiece".to_owned())
        })?;
        let added_tokens = inner.get_added_tokens_decoder();
        let special = added_tokens.iter().filter(|(_, t)| t.special).map(|(&id, _)| id).collect();
        let top = inner.get_vocab(true).into_values().max();
        let Some(top) = top else {
            return Err(fault("its vocabulary is empty".to_owned()));
        };
        let adds_bos = match (extras.adds_bos, extras.bos) {
            (Some(adds), _) => adds,
            (None, None) => false,
            (None, Some(bos)) => {
                let probe = inner.encode("a", true).map_err(|e| fault(e.to_string()))?;
                probe.get_ids().first() == Some(&bos)
            }
        };
        Ok(Self {
            path: path.to_owned(),
            literal: OnceLock::new(),
            spelling,
            added: added_tokens.keys().copied().collect(),
            special,
            vocab_size: top as usize + 1,
            bos: extras.bos,
            eos: extras.eos,
            adds_bos,
            inner,
        })
    }

    /// Token ids of a plain text; spellings of special tokens in it stay text.
    ///
    /// # Errors
    /// `Tokenizer`. Characters that the vocabulary cannot spell are dropped, as the reference
    /// implementation does, not reported.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>> {
        self.encode_with(text, EncodeOptions { add_bos, parse_special: false })
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let tokenizer = if options.parse_special {
            &self.inner
        } else {
            self.literal.get_or_init(|| {
                let mut literal = self.inner.clone();
                literal.set_encode_special_tokens(true);
                literal
            })
        };
        let encoding = tokenizer.encode_fast(text, false).map_err(|e| self.fault(e.to_string()))?;
        let mut ids = Vec::with_capacity(encoding.len() + 1);
        if options.add_bos {
            ids.extend(self.bos);
        }
        ids.extend_from_slice(encoding.get_ids());
        Ok(ids)
    }

    /// `text` with a mark within every spelling of a special token, which [`Tokenizer::encode_marked`] then reads as text.
    pub(super) fn mark(&self, text: &str) -> String {
        let mut marked = text.replace(MARK, "\u{fffd}");
        let mut spellings: Vec<_> = self.special.iter().filter_map(|&id| self.token(id)).collect();
        spellings.retain(|s| s.chars().count() > 1 && text.contains(s));
        // A longer one may hold a shorter one.
        spellings.sort_by_key(|s| std::cmp::Reverse(s.len()));
        for spelling in spellings {
            let first = spelling.chars().next().map_or(0, char::len_utf8);
            let (head, tail) = spelling.split_at(first);
            marked = marked.replace(&spelling, &format!("{head}{MARK}{tail}"));
        }
        marked
    }

    /// Token ids of a rendered template: special tokens are parsed but those that [`Tokenizer::mark`] has marked.
    pub(super) fn encode_marked(&self, text: &str) -> Result<Vec<u32>> {
        // Templates write the beginning-of-sequence token themselves.
        let options = EncodeOptions { add_bos: false, parse_special: true };
        let mut ids = Vec::new();
        for part in text.split(MARK) {
            ids.extend(self.encode_with(part, options)?);
        }
        Ok(ids)
    }

    /// The text of `ids`, special tokens left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).collect();
        let strip = Spelling::Pieces { strip_first_space: true };
        if self.spelling == strip && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A decoder for ids that arrive one by one, after a prompt.
    pub fn decode_stream(&self) -> DecodeStream<&Tokenizer> {
        DecodeStream::new(self)
    }

    /// The bytes a token stands for: none for special tokens and ids outside the vocabulary,
    /// often not a whole character.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        if self.special.contains(&id) {
            return Vec::new();
        }
        let Some(token) = self.inner.id_to_token(id) else {
            return Vec::new();
        };
        if self.added.contains(&id) {
            return token.into_bytes();
        }
        match self.spelling {
            Spelling::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                bytes.unwrap_or_else(|| token.into_bytes())
            }
            Spelling::Pieces { .. } => match byte_piece(&token) {
                Some(byte) => vec![byte],
                None => token.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact spelling in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token the tokenizer's files name; the configuration may list more.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether the model expects `add_bos` for plain prompts.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    fn fault(&self, what: String) -> ModelError {
        ModelError::Tokenizer { path: self.path.clone(), what }
    }
}

/// Turns ids into text as they come, holding back bytes until they make whole characters.
#[derive(Debug)]
pub struct DecodeStream<T> {
    tokenizer: T,
    pending: Vec<u8>,
}

impl<T: Borrow<Tokenizer>> DecodeStream<T> {
    /// A stream at its start; `T` is `&Tokenizer`, or `Arc<Tokenizer>` where the stream must own it.
    pub fn new(tokenizer: T) -> Self {
        DecodeStream { tokenizer, pending: Vec::new() }
    }

    /// Adds a token; returns the characters that are now complete (often all, sometimes none).
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend(self.tokenizer.borrow().token_bytes(id));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(all) => {
                    text.push_str(all);
                    self.pending.clear();
                    return text;
                }
                Err(e) => {
                    let whole = e.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..whole]));
                    match e.error_len() {
                        // The rest may still become a character.
                        None => {
                            self.pending.drain(..whole);
                            return text;
                        }
                        Some(bad) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            self.pending.drain(..whole + bad);
                        }
                    }
                }
            }
        }
    }

    /// What is left at the end: U+FFFD for a character that was never completed.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Reads off the decoder how tokens spell bytes; `None` for kinds not known here.
fn spelling(tokenizer: &tokenizers::Tokenizer) -> Option<Spelling> {
    let json = serde_json::to_value(tokenizer.get_decoder()?).ok()?;
    let steps = match json.get("decoders").and_then(Value::as_array) {
        Some(steps) => steps.clone(),
        None => vec![json],
    };
    let find = |kind: &str| steps.iter().find(|s| s["type"] == kind);
    if find("ByteLevel").is_some() {
        return Some(Spelling::ByteLevel);
    }
    let metaspace = find("Metaspace");
    if find("ByteFallback").is_none() && metaspace.is_none() {
        return None;
    }
    let stripped = find("Strip").is_some_and(|s| s["start"].as_u64().unwrap_or(0) > 0)
        || metaspace.is_some_and(|s| s["prepend_scheme"] != "never");
    Some(Spelling::Pieces { strip_first_space: stripped })
}

/// GPT-2's table: printable Latin-1 characters stand for themselves, the other 68 bytes for the
/// characters from U+0100 on, in order.
fn byte_of_char(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    match u32::from(c) {
        code @ 0..=255 => Some(code as u8).filter(|&b| printable(b)),
        code @ 256..=323 => (0..=255u8).filter(|&b| !printable(b)).nth((code - 256) as usize),
        _ => None,
    }
}

/// The byte of a piece spelled `<0xAB>`.
fn byte_piece(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}
