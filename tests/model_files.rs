//! Good model files: the same model read from every format is the same model.

mod common;

use common::gguf_file::{self, Meta, Tensor};
use common::tiny::{Tiny, VOCAB};
use longsight::backend::DType;
use longsight::engine::{Engine, EngineError};
use longsight::model::quant::Quant;
use longsight::model::{
    Arch, ChatTemplate, Checkpoint, EncodeOptions, LayerWeight, Message, ModelError, RopeScaling,
    Tokenizer, Weight,
};
use longsight::select::Variant;
use serde_json::Value;

const ARCHS: [Arch; 4] = [Arch::Llama, Arch::Mistral, Arch::Qwen2, Arch::Qwen3];

/// Largest difference over all weights between the file and the model it was written from.
fn worst_difference(checkpoint: &Checkpoint, tiny: &Tiny) -> f32 {
    let mut worst = 0f32;
    for (weight, want) in &tiny.weights {
        let got = checkpoint.read(*weight).unwrap();
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            worst = worst.max((g - w).abs());
        }
    }
    worst
}

/// The configuration without what the formats cannot tell apart.
fn comparable(checkpoint: &Checkpoint) -> String {
    let mut config = checkpoint.config().clone();
    config.name.clear();
    if config.arch == Arch::Mistral {
        config.arch = Arch::Llama;
    }
    format!("{config:?}")
}

#[test]
fn every_format_gives_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    for (i, arch) in ARCHS.into_iter().enumerate() {
        for tied in [false, true] {
            let tiny = Tiny::new(arch, tied, 7 + i as u64);
            let at = |name: &str| dir.path().join(format!("{i}-{tied}-{name}"));
            tiny.write_hf(&at("one"), Quant::F32, 1);
            tiny.write_hf(&at("three"), Quant::F32, 3);
            tiny.write_hf(&at("bf16"), Quant::BF16, 1);
            tiny.write_hf(&at("f16"), Quant::F16, 1);
            tiny.write_gguf(&at("f32.gguf"), Quant::F32);
            tiny.write_gguf(&at("q8.gguf"), Quant::Q8_0);

            let one = Checkpoint::open(&at("one")).unwrap();
            let mut config = one.config().clone();
            config.name = tiny.config.name.clone();
            assert_eq!(config, tiny.config);
            // Half of the last kept bit, of values below 2: 2^-8, 2^-11; of a Q8_0 block's
            // largest value (below 1.5 / 8): one part in 254, and its rounded scale.
            for (name, tolerance) in [
                ("one", 0.0),
                ("three", 0.0),
                ("f32.gguf", 0.0),
                ("bf16", 1.0 / 256.0),
                ("f16", 1.0 / 2048.0),
                ("q8.gguf", 1e-3),
            ] {
                let checkpoint = Checkpoint::open(&at(name)).unwrap();
                assert_eq!(comparable(&checkpoint), comparable(&one), "{name}");
                let worst = worst_difference(&checkpoint, &tiny);
                assert!(worst <= tolerance, "{arch:?} {name}: {worst}");
                assert!(checkpoint.has(Weight::Output));
                assert_eq!(checkpoint.shape(Weight::Output).unwrap(), [VOCAB, 64]);
            }
        }
    }
}

#[test]
fn rows_can_be_read_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new(Arch::Llama, true, 3);
    let path = dir.path().join("m.gguf");
    tiny.write_gguf(&path, Quant::Q8_0);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let weight = Weight::Layer(1, LayerWeight::K);
    let whole = checkpoint.read(weight).unwrap();
    let mut piece = vec![0.0; 5 * 64];
    checkpoint.read_rows(weight, 13..18, &mut piece).unwrap();
    assert_eq!(piece, whole[13 * 64..18 * 64]);
    for (rows, len) in [(30..33, 3 * 64), (0..1, 63), (0..1, 65)] {
        let mut out = vec![0.0; len];
        let error = checkpoint.read_rows(weight, rows, &mut out).unwrap_err();
        assert!(matches!(error, ModelError::Request { .. }), "{error}");
    }
    let error = checkpoint.read(Weight::Layer(0, LayerWeight::QBias));
    assert!(matches!(error, Err(ModelError::MissingTensor { .. })));
}

/// llama files with q and k biases store those in interleaved order as well.
#[test]
fn biases_of_llama_files_are_put_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let tiny = Tiny::new(Arch::Llama, true, 3);
    let mut tensors = tiny.gguf_tensors(Quant::F32);
    for layer in 0..2 {
        for (name, n) in [("q", 64), ("k", 32), ("v", 32)] {
            tensors.push(Tensor {
                name: format!("blk.{layer}.attn_{name}.bias"),
                dims: vec![n],
                quant: Quant::F32,
                bytes: (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect(),
            });
        }
    }
    gguf_file::write(&path, &tiny.gguf_metadata(), &tensors);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let bias = |w| checkpoint.read(Weight::Layer(1, w)).unwrap();
    // Second head of 16: its first half are the even places, its second half the odd ones.
    let k = bias(LayerWeight::KBias);
    assert_eq!(k[16..20], [16.0, 18.0, 20.0, 22.0]);
    assert_eq!(k[24..28], [17.0, 19.0, 21.0, 23.0]);
    assert_eq!(bias(LayerWeight::VBias)[16..20], [16.0, 17.0, 18.0, 19.0]);
}

/// A divisor for each rotary pair.
fn rope_freqs(factors: &[f32]) -> Tensor {
    Tensor {
        name: "rope_freqs.weight".into(),
        dims: vec![factors.len()],
        quant: Quant::F32,
        bytes: factors.iter().flat_map(|f| f.to_le_bytes()).collect(),
    }
}

#[test]
fn rotary_factors_of_gguf_files_divide_the_frequencies() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let tiny = Tiny::new(Arch::Llama, true, 3);
    let factors: Vec<f32> = (0..8).map(|i| 1.0 + i as f32).collect();
    let mut tensors = tiny.gguf_tensors(Quant::F32);
    tensors.push(rope_freqs(&factors));
    gguf_file::write(&path, &tiny.gguf_metadata(), &tensors);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.config().rope_scaling, RopeScaling::Factors(factors.clone()));
    let plain = tiny.config.inv_freq();
    for (i, f) in checkpoint.config().inv_freq().into_iter().enumerate() {
        assert_eq!(f, plain[i] / factors[i]);
    }
}

#[test]
fn linear_scaling_of_gguf_files_needs_no_type_and_takes_no_factors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let tiny = Tiny::new(Arch::Llama, true, 3);
    let keyed = |key, factor, typed: bool| {
        let mut metadata = tiny.gguf_metadata();
        metadata.push((key, Meta::F32(factor)));
        if typed {
            metadata.push(("llama.rope.scaling.type", Meta::Str("linear".into())));
        }
        metadata
    };
    let scaled = |typed| keyed("llama.rope.scaling.factor", 4.0, typed);
    let read = |metadata: &[_]| {
        gguf_file::write(&path, metadata, &tiny.gguf_tensors(Quant::F32));
        Checkpoint::open(&path).unwrap().config().rope_scaling.clone()
    };
    let older = keyed("llama.rope.scale_linear", 2.0, false);
    assert_eq!(read(&older), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(read(&keyed("llama.rope.scaling.factor", 0.0, false)), RopeScaling::None);
    for typed in [true, false] {
        assert_eq!(read(&scaled(typed)), RopeScaling::Linear { factor: 4.0 });
        let mut tensors = tiny.gguf_tensors(Quant::F32);
        tensors.push(rope_freqs(&[1.0; 8]));
        gguf_file::write(&path, &scaled(typed), &tensors);
        let e = Checkpoint::open(&path).unwrap_err();
        assert!(e.to_string().contains("linear beside rope_freqs.weight"), "{e}");
    }
}

#[test]
fn fingerprints_follow_the_model_not_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let print = |name: &str, tiny: &Tiny| {
        let path = dir.path().join(name);
        tiny.write_hf(&path, Quant::F32, 1);
        Checkpoint::open(&path).unwrap().fingerprint()
    };
    let tiny = Tiny::new(Arch::Qwen3, true, 1);
    let a = print("a", &tiny);
    assert_eq!(a.len(), 16);
    assert_eq!(a, print("b", &tiny));
    assert_ne!(a, print("c", &Tiny::new(Arch::Qwen3, true, 2)));
    let mut other = Tiny::new(Arch::Qwen3, true, 1);
    other.config.rope_theta = 20_000.0;
    assert_ne!(a, print("d", &other));
}

#[test]
fn tokenizer_and_template_come_from_either_format() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new(Arch::Llama, true, 3);
    let (folder, file) = (dir.path().join("hf"), dir.path().join("m.gguf"));
    tiny.write_hf(&folder, Quant::F32, 1);
    tiny.write_gguf(&file, Quant::F32);
    for path in [folder, file] {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let tokenizer = Tokenizer::for_checkpoint(&checkpoint).unwrap();
        assert_eq!(tokenizer.vocab_size(), VOCAB);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(256), Some(258)));
        assert!(!tokenizer.adds_bos());
        let text = "a \u{e9}\u{1f600}\n<|im_end|>";
        let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
        assert_eq!(tokenizer.encode(text, false).unwrap(), bytes);
        assert_eq!(tokenizer.decode(&bytes), text);
        let parsed = tokenizer
            .encode_with(text, EncodeOptions { add_bos: true, parse_special: true })
            .unwrap();
        assert_eq!(parsed[0], 256);
        assert_eq!(parsed[parsed.len() - 1], 258);
        assert_eq!(parsed[1..parsed.len() - 1], bytes[..bytes.len() - 10]);

        let template = ChatTemplate::for_checkpoint(&checkpoint, &tokenizer).unwrap();
        let prompt = template.render(&[Message::new("user", "hi")], true);
        assert_eq!(prompt.unwrap(), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    }
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, other) = (dir.path().join("model"), dir.path().join("other"));
    for at in [&folder, &other] {
        Tiny::new(Arch::Llama, true, 3).write_hf(at, Quant::F32, 1);
    }
    let build = || {
        let tokenizer = Tokenizer::from_folder(&other).unwrap();
        let model = Engine::builder().model(folder.display().to_string()).device("cpu");
        let engine = model.dtype(DType::F32).method(Variant::Dense.into()).tokenizer(tokenizer);
        engine.build()
    };
    assert!(build().is_ok());
    let path = other.join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    let mut one_more = added[0].clone();
    (one_more["id"], one_more["content"]) = (VOCAB.into(), "<|one more|>".into());
    added.push(one_more);
    std::fs::write(&path, json.to_string()).unwrap();
    let e = build().unwrap_err();
    assert!(matches!(e, EngineError::Model(ModelError::Tokenizer { .. })), "{e}");
    let both = format!("it has {} ids but the model's embedding only {VOCAB} rows", VOCAB + 1);
    assert!(e.to_string().contains(&both), "{e}");
}

#[test]
fn streams_hold_back_incomplete_characters() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("hf");
    Tiny::new(Arch::Llama, true, 3).write_hf(&folder, Quant::F32, 1);
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let mut stream = tokenizer.decode_stream();
    let pieces: Vec<String> = "x\u{20ac}!".bytes().map(|b| stream.push(b.into())).collect();
    assert_eq!(pieces, ["x", "", "", "\u{20ac}", "!"]);
    assert_eq!(stream.finish(), "");
    // A broken character becomes U+FFFD as soon as it is known to be broken, or at the end.
    let mut stream = tokenizer.decode_stream();
    assert_eq!(stream.push(0xe2), "");
    assert_eq!(stream.push(u32::from(b'a')), "\u{fffd}a");
    assert_eq!(stream.push(258), "");
    assert_eq!(stream.push(0xe2), "");
    assert_eq!(stream.finish(), "\u{fffd}");
}

/// A SentencePiece vocabulary without merges: those follow from the scores.
#[test]
fn sentence_piece_vocabularies_are_read_from_gguf() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    let first = tokens.len() as u32;
    // In order of preference, as SentencePiece sorts them: score = -rank.
    let pieces =
        ["ll", "he", "\u{2581}he", "llo", "hell", "\u{2581}hello", "\u{2581}", "h", "e", "l", "o"];
    tokens.extend(pieces.map(String::from));
    types.extend([1; 11]);
    let scores: Vec<f32> = (0..tokens.len()).map(|i| -(i as f32)).collect();
    let metadata = [
        ("tokenizer.ggml.model", Meta::Str("llama".into())),
        ("tokenizer.ggml.tokens", Meta::Strs(tokens)),
        ("tokenizer.ggml.token_type", Meta::I32s(types)),
        ("tokenizer.ggml.scores", Meta::F32s(scores)),
        ("tokenizer.ggml.bos_token_id", Meta::U32(1)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Meta::U32(0)),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("spm.gguf");
    gguf_file::write(&path, &metadata, &[]);
    let gguf = longsight::model::gguf::Gguf::open(&path).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let id = |piece: &str| first + pieces.iter().position(|p| *p == piece).unwrap() as u32;
    let space = "\u{2581}";
    assert!(tokenizer.adds_bos());
    // ll, he, <space>he, llo, then <space>he + llo.
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [1, id("\u{2581}hello")]);
    // "ell": ll merges first, so "he" + "ll" joins to "hell" only without a space before it.
    assert_eq!(
        tokenizer.encode("o hell", false).unwrap(),
        [id(space), id("o"), id("\u{2581}he"), id("ll")]
    );
    // Unknown characters fall back to their bytes (ids 3 + byte).
    assert_eq!(
        tokenizer.encode("h\u{e9}\n", false).unwrap(),
        [id(space), id("h"), 3 + 0xc3, 3 + 0xa9, 3 + 0x0a]
    );
    for text in ["hello", "o hell  h\u{e9}\n", "\u{1f600} hello"] {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        let mut stream = tokenizer.decode_stream();
        let streamed: String = ids.iter().map(|&i| stream.push(i)).collect();
        // A stream goes on after a prompt: it keeps the first space.
        assert_eq!(streamed, format!(" {text}"));
    }
}
