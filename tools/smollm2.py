"""SmolLM2-135M-Instruct from its GGUF file in transformers: shared by the record_*.py tools.

Everything runs in float32 on the CPU. The weights are read by transformers' own GGUF loader
and compared here with those that the `gguf` package dequantises; the tokenizer is built with
the `tokenizers` package from the GGUF metadata, because transformers' GGUF tokenizer import
does not look at `tokenizer.ggml.pre` and so does not split digits as SmolLM2 does.
"""
import hashlib
import platform
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

CONTROL = 3  # tokenizer.ggml.token_type of control tokens
ROWS_PER_CHUNK = 512  # positions whose logits are held at a time: 512 x 49152 f32 = 96 MiB


def versions(threads):
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "gguf": gguf_version(),
        "numpy": np.__version__,
        "dtype": "float32",
        "device": "cpu",
        "threads": threads,
    }


def gguf_version():
    from importlib.metadata import version

    return version("gguf")


def fnv1a(ids):
    """64-bit FNV-1a over the ids as little-endian u32, in hex: to compare prompts cheaply."""
    state = 0xCBF29CE484222325
    for byte in np.asarray(ids, dtype="<u4").tobytes():
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{state:016x}"


class SmolLM2:
    def __init__(self, path, threads=2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        self.path, self.threads = Path(path), threads
        self.reader = gguf.GGUFReader(str(path))
        self.meta = {
            key: field.contents()
            for key, field in self.reader.fields.items()
            if not key.startswith("GGUF.")
        }
        self.tokenizer = self._tokenizer()
        self.model = AutoModelForCausalLM.from_pretrained(
            str(self.path.parent),
            gguf_file=self.path.name,
            dtype=torch.float32,
            attn_implementation="sdpa",
        ).eval()
        self._check_weights()
        self._check_config()

    # ------------------------------------------------------------------ loading

    def _tokenizer(self):
        meta = self.meta
        if meta["tokenizer.ggml.model"] != "gpt2" or meta["tokenizer.ggml.pre"] != "smollm":
            raise SystemExit("this GGUF does not hold the SmolLM2 tokenizer")
        tokens = meta["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
        tok = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tok.decoder = decoders.ByteLevel()
        tok.add_special_tokens(
            [
                AddedToken(token, normalized=False, special=True)
                for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"])
                if kind == CONTROL
            ]
        )
        return tok

    def _check_weights(self):
        """The state dict equals the gguf package's dequantised tensors, to the last bit."""
        names = {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
        top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        heads = {"attn_q": self.model.config.num_attention_heads, "attn_k": self.model.config.num_key_value_heads}
        state = self.model.state_dict()
        for tensor in self.reader.tensors:
            want = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            want = want.reshape([int(n) for n in tensor.shape][::-1])
            if tensor.name in top:
                name = top[tensor.name]
            else:
                _, layer, key, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{names[key]}.weight"
                if key in heads:
                    # GGUF keeps rotary pairs side by side (2i, 2i+1); transformers i with i + d/2
                    rows, width = want.shape
                    split = want.reshape(heads[key], rows // heads[key] // 2, 2, width)
                    want = split.swapaxes(1, 2).reshape(rows, width)
            if not np.array_equal(state[name].numpy(), want):
                raise SystemExit(f"{name} differs from the dequantised {tensor.name}")
        print(f"{len(self.reader.tensors)} tensors equal the gguf package's dequantised values")

    def _check_config(self):
        config, meta = self.model.config, self.meta
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
        checks = [
            (rope["rope_theta"], meta["llama.rope.freq_base"]),
            (rope.get("rope_type", "default"), "default"),
            (config.num_hidden_layers, meta["llama.block_count"]),
            (config.num_key_value_heads, meta["llama.attention.head_count_kv"]),
            (np.float32(config.rms_norm_eps), np.float32(meta["llama.attention.layer_norm_rms_epsilon"])),
            (config.max_position_embeddings, meta["llama.context_length"]),
            (self.model.lm_head.weight.data_ptr(), self.model.model.embed_tokens.weight.data_ptr()),
        ]
        for have, want in checks:
            if have != want:
                raise SystemExit(f"transformers read {have} from the GGUF, which says {want}")
        first = self.decode(self.greedy(self.encode("The capital of France is"), 1)["ids"])
        if first != " Paris":
            raise SystemExit(f"'The capital of France is' goes on with {first!r}, not ' Paris'")

    def describe(self):
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"file": self.path.name, "sha256": digest, "name": "SmolLM2-135M-Instruct"}

    # ------------------------------------------------------------------ running

    def encode(self, text):
        """Token ids of raw text: no BOS; `<|im_start|>` and its like become control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def chat(self, user):
        """The GGUF's chat template with its default system message, up to the answer."""
        return (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            f"Hugging Face<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        )

    def hidden(self, ids, cache=None):
        """Final-norm output [tokens, 576] of one prefill, and the KV cache after it."""
        out = self.model.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return out.last_hidden_state[0], out.past_key_values

    def logits(self, hidden):
        """Logits [tokens, vocabulary] of the given rows of `hidden`."""
        return self.model.lm_head(hidden)

    def nll(self, hidden, targets):
        """Negative log likelihood (nats) and top-1 hit of each target; row i predicts targets[i]."""
        nll, hit = [], []
        for start in range(0, len(targets), ROWS_PER_CHUNK):
            want = torch.tensor(targets[start : start + ROWS_PER_CHUNK])
            logits = self.logits(hidden[start : start + len(want)])
            picked = logits.gather(1, want[:, None])[:, 0]
            nll.append(torch.logsumexp(logits, 1) - picked)
            hit.append(logits.argmax(1) == want)
        return torch.cat(nll).numpy(), torch.cat(hit).numpy()

    def greedy(self, ids, steps, cache=None):
        """`steps` greedy tokens after `ids` (the end token is not a stop), with margins.

        `cache` holds what comes before `ids`, and grows.
        """
        hidden, cache = self.hidden(ids, cache)
        out, margins = [], []
        for step in range(steps):
            top = self.logits(hidden[-1:])[0].topk(2)
            out.append(int(top.indices[0]))
            margins.append(float(top.values[0] - top.values[1]))
            if step + 1 < steps:
                hidden, cache = self.hidden(out[-1:], cache)
        return {"ids": out, "margins": margins}
