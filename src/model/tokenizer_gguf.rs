//! The tokenizer in a GGUF file's metadata, described as a `tokenizer.json`.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::error::{ModelError, Result};
use super::gguf::Gguf;
use super::tokenizer::Extras;

/// `tokenizer.ggml.token_type` values.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

const TOKENS: &str = "tokenizer.ggml.tokens";

/// SentencePiece's spelling of a space.
const SPACE: &str = "\u{2581}";

/// Split patterns of the reference tokenizers; they differ in how many digits make a word.
fn split_pattern(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

/// The vocabulary as the file has it.
struct Vocabulary<'a> {
    gguf: &'a Gguf,
    tokens: Vec<&'a str>,
    types: Vec<i64>,
}

impl Vocabulary<'_> {
    fn fault(&self, what: impl Into<String>) -> ModelError {
        fault(self.gguf, what)
    }

    fn special_id(&self, key: &str) -> Option<u32> {
        let id = self.gguf.uint(&format!("tokenizer.ggml.{key}_token_id"))?;
        u32::try_from(id).ok().filter(|&id| (id as usize) < self.tokens.len())
    }

    /// Token to id; the first of equal spellings wins.
    fn vocab(&self) -> Map<String, Value> {
        let mut vocab = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            vocab.entry(*token).or_insert_with(|| id.into());
        }
        vocab
    }

    fn added_tokens(&self) -> Vec<Value> {
        let added = |t: i64| matches!(t, UNKNOWN | CONTROL | USER_DEFINED);
        (self.tokens.iter().zip(&self.types).enumerate())
            .filter(|(_, (token, t))| added(**t) && !token.is_empty())
            .map(|(id, (token, t))| {
                json!({
                    "id": id, "content": token, "special": *t != USER_DEFINED,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
            .collect()
    }

    /// The file's merge list, as pairs.
    fn merges(&self) -> Result<Option<Vec<Value>>> {
        let Some(merges) = self.gguf.strings("tokenizer.ggml.merges") else {
            return Ok(None);
        };
        let pair = |m: &str| {
            // A token may itself begin with a space, never be empty.
            let at = m.char_indices().skip(1).find(|(_, c)| *c == ' ')?.0;
            Some(json!([m[..at], m[at + 1..]]))
        };
        merges
            .iter()
            .map(|m| pair(m).ok_or_else(|| self.fault(format!("the merge {m:?} is not a pair"))))
            .collect::<Result<Vec<_>>>()
            .map(Some)
    }
}

fn fault(gguf: &Gguf, what: impl Into<String>) -> ModelError {
    ModelError::Tokenizer { path: gguf.path().to_owned(), what: what.into() }
}

/// A `tokenizer.json` that encodes as the file's tokenizer does, and the special tokens.
pub(super) fn describe(gguf: &Gguf) -> Result<(Value, Extras)> {
    let missing = || ModelError::MissingTokenizer { path: gguf.path().to_owned() };
    let model = gguf.string("tokenizer.ggml.model").ok_or_else(missing)?;
    let tokens = gguf.strings(TOKENS).ok_or_else(missing)?;
    let types = match gguf.ints("tokenizer.ggml.token_type") {
        Some(types) if types.len() == tokens.len() => types,
        Some(_) => {
            return Err(fault(gguf, "it has not as many token types as tokens"));
        }
        None => vec![1; tokens.len()],
    };
    let v = Vocabulary { gguf, tokens, types };
    let (mut json, adds_bos) = match model {
        "gpt2" => byte_level(&v)?,
        "llama" => sentence_piece(&v)?,
        other => {
            return Err(
                v.fault(format!("its kind {other:?} is not read here (gpt2 and llama are)"))
            );
        }
    };
    json["version"] = "1.0".into();
    json["truncation"] = Value::Null;
    json["padding"] = Value::Null;
    json["post_processor"] = Value::Null;
    json["added_tokens"] = v.added_tokens().into();
    let extras = Extras {
        bos: v.special_id("bos"),
        eos: v.special_id("eos"),
        adds_bos: Some(gguf.flag("tokenizer.ggml.add_bos_token").unwrap_or(adds_bos)),
    };
    Ok((json, extras))
}

/// Byte-level BPE with one of the known ways to split a text into words.
fn byte_level(v: &Vocabulary<'_>) -> Result<(Value, bool)> {
    let pre = v.gguf.string("tokenizer.ggml.pre").unwrap_or("unnamed");
    let bytes = |use_regex: bool| {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
               "use_regex": use_regex})
    };
    let sequence =
        |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
    let split = |digits: &str| {
        let pattern = json!({"Regex": split_pattern(digits)});
        json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false})
    };
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let qwen = matches!(pre, "qwen2" | "deepseek-r1-qwen");
    let pre_tokenizer = match pre {
        "gpt-2" => bytes(true),
        "smollm" => sequence(json!({"type": "Digits", "individual_digits": true}), bytes(true)),
        _ if qwen => sequence(split(""), bytes(false)),
        _ if llama3 => sequence(split("{1,3}"), bytes(false)),
        other => {
            return Err(v.fault(format!(
                "its way to split words, {other:?}, is not known here; \
                 use the model's Hugging Face folder"
            )));
        }
    };
    let merges = v.merges()?.ok_or_else(|| v.fault("it has no merges"))?;
    let json = json!({
        "normalizer": qwen.then(|| json!({"type": "NFC"})),
        "pre_tokenizer": pre_tokenizer,
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": llama3, "vocab": v.vocab(), "merges": merges,
        },
    });
    Ok((json, llama3))
}

/// SentencePiece BPE: spaces become U+2581, unknown characters fall back to bytes.
fn sentence_piece(v: &Vocabulary<'_>) -> Result<(Value, bool)> {
    let prefix = v.gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizer = if prefix {
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        json!({"type": "Sequence", "normalizers": [prepend, replace]})
    } else {
        replace
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let merges = match v.merges()? {
        Some(merges) => merges,
        None => merges_from_scores(v)?,
    };
    let unknown = v.special_id("unknown").map(|id| v.tokens[id as usize]);
    let json = json!({
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": v.vocab(), "merges": merges,
        },
    });
    Ok((json, true))
}

/// Every way to cut a piece into two known pieces is a merge; pieces of higher score merge first,
/// equal ones in the order of their parts' ids. This is how SentencePiece vocabularies become
/// merge lists in the reference converter.
fn merges_from_scores(v: &Vocabulary<'_>) -> Result<Vec<Value>> {
    /// Longer pieces are not words of any tokenizer; cutting them up would take quadratic time.
    const LONGEST: usize = 1024;
    let scores = v
        .gguf
        .floats("tokenizer.ggml.scores")
        .filter(|s| s.len() == v.tokens.len())
        .ok_or_else(|| v.fault("it has neither merges nor a score for every token"))?;
    let ids: HashMap<&str, usize> = v.tokens.iter().enumerate().map(|(i, t)| (*t, i)).collect();
    let mut merges = Vec::new();
    let mut seen = HashSet::new();
    for (token, &score) in v.tokens.iter().zip(&scores) {
        if token.len() > LONGEST || !seen.insert(token) {
            continue;
        }
        let first = merges.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((score, l, r, left, right));
            }
        }
        merges[first..].sort_by_key(|m| (m.1, m.2));
    }
    // Stable: pieces of equal score stay in vocabulary order.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(merges.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect())
}
