#!/usr/bin/env python3
"""Train the tiny model of this repository (models/tiny): Llama layout, bytes as tokens.

    apt-get download r-cran-janeaustenr bible-kjv-text bible-kjv
    for package in *.deb; do dpkg -x $package texts; done
    texts/usr/bin/bible -p texts/usr/lib -f gen1:1-rev22:21 >bible.txt
    python3 tools/train_tiny.py --rdata texts/usr/lib/R/site-library/janeaustenr/data/Rdata \
        --bible bible.txt --out models/tiny

The novel --held-out is only measured on. What came out stands in models/tiny/README.md.

Needs torch, numpy and safetensors, and a GPU (one H100: 6 minutes). --until and --seconds stop
early and keep everything in --state, from which the same command goes on.
"""
import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import tiny_tasks as tasks
from tiny_tokenizer import CHAT_TEMPLATE, tokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 256, 6, 8, 2, 32, 704
THETA, CONTEXT, EPS = 500_000.0, 8192, 1e-5
ROWS = 264  # of the embedding in training: a multiple of 8
TOKENS = 65_536  # per step, whatever the length of the sequences

# Lengths of sequences and how often a step has them, by the share of training that is over.
LENGTHS = [
    (0.08, {512: 1.0}),
    (0.20, {512: 0.3, 1024: 0.7}),
    (0.40, {512: 0.15, 1024: 0.25, 2048: 0.6}),
    (0.65, {512: 0.1, 1024: 0.2, 2048: 0.3, 4096: 0.4}),
    (1.00, {512: 0.05, 1024: 0.1, 2048: 0.2, 4096: 0.25, 8192: 0.4}),
]


def length_of(step, steps):
    done = step / steps
    shares = next((shares for end, shares in LENGTHS if done < end), LENGTHS[-1][1])
    return random.Random(step).choices(list(shares), list(shares.values()))[0]


class Batches(torch.utils.data.IterableDataset):
    """Step by step; worker w of n makes the steps w, w + n, ..., which the loader hands out in order."""

    def __init__(self, texts, seed, first, until, steps):
        self.texts, self.seed = texts, seed
        self.first, self.until, self.steps = first, until, steps

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for step in range(self.first + worker, self.until, workers):
            length = length_of(step, self.steps)
            ids, weights = tasks.batch(f"{self.seed} {step}", self.texts, length, TOKENS // length)
            yield step, torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(weights)


def rms(x, gain):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * gain


def linear(x, weight):
    return F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16))


def rotate(x, cos, sin):
    """x [rows, heads, HEAD_DIM]; pair i is the dimensions i and i + HEAD_DIM / 2."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(torch.bfloat16)


# Compiled once each: rows are TOKENS, whatever the length, and weights are arguments.
def before_attention(x, gain, qkv, cos, sin):
    rows = linear(rms(x, gain), qkv).view(x.shape[0], -1, HEAD_DIM)
    q, k, v = rows.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(x, attended, out, gain, gate_up, down):
    x = x + linear(attended, out).float()
    gate, up = linear(rms(x, gain), gate_up).chunk(2, dim=-1)
    return x + linear(F.silu(gate) * up, down).float()


def losses(x, gain, embedding, targets):
    logits = linear(rms(x, gain), embedding).float()
    return F.cross_entropy(logits, targets, reduction="none")


def right(x, gain, embedding, targets):
    return linear(rms(x, gain), embedding).argmax(-1) == targets


class Tiny(torch.nn.Module):
    def __init__(self, compiled):
        super().__init__()

        def matrix(rows, columns, scale=1.0):
            return torch.nn.Parameter(torch.randn(rows, columns) * 0.02 * scale)

        def gain():
            return torch.nn.Parameter(torch.ones(HIDDEN))

        small = 1 / math.sqrt(2 * LAYERS)
        self.embedding = matrix(ROWS, HIDDEN)
        self.norm = gain()
        width = HEADS * HEAD_DIM
        self.layers = torch.nn.ModuleList(
            torch.nn.ParameterDict(
                {
                    "norm1": gain(),
                    "qkv": matrix(width + 2 * KV_HEADS * HEAD_DIM, HIDDEN, 2.0),
                    "out": matrix(HIDDEN, width, small),
                    "norm2": gain(),
                    "gate_up": matrix(2 * FFN, HIDDEN, 2.0),
                    "down": matrix(HIDDEN, FFN, small),
                }
            )
            for _ in range(LAYERS)
        )
        inverse = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.arange(CONTEXT)[:, None] * inverse
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        wrap = torch.compile if compiled else (lambda f: f)
        parts = (before_attention, after_attention, losses, right)
        self.before, self.after, self.losses, self.right = map(wrap, parts)

    def hidden(self, ids):
        """The residual stream [n * length, HIDDEN] of ids [n, length]."""
        n, length = ids.shape
        cos, sin = self.cos[:length].repeat(n, 1), self.sin[:length].repeat(n, 1)
        x = F.embedding(ids.reshape(-1), self.embedding)
        for p in self.layers:
            q, k, v = self.before(x, p["norm1"], p["qkv"], cos, sin)
            q, k, v = (t.view(n, length, -1, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2).reshape(n * length, -1)
            x = self.after(x, out, p["out"], p["norm2"], p["gate_up"], p["down"])
        return x

    def nll(self, ids, targets):
        return self.losses(self.hidden(ids), self.norm, self.embedding, targets)

    def export(self):
        """Tensors by their Hugging Face names, bf16."""
        width, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        named = {"embed_tokens": self.embedding[: tasks.VOCAB], "norm": self.norm}
        for i, p in enumerate(self.layers):
            q, k, v = p["qkv"].split((width, kv, kv))
            gate, up = p["gate_up"].chunk(2)
            parts = {
                "input_layernorm": p["norm1"],
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": p["out"],
                "post_attention_layernorm": p["norm2"],
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": p["down"],
            }
            named |= {f"layers.{i}.{name}": t for name, t in parts.items()}
        return {
            f"model.{name}.weight": t.detach().to(torch.bfloat16).cpu().contiguous()
            for name, t in named.items()
        }


def as_pairs(ids, weights, device):
    ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
    return ids[:, :-1].long(), ids[:, 1:].reshape(-1).long(), weights[:, 1:].reshape(-1)


@torch.no_grad()
def accuracy(model, texts, task, length, n, device, **options):
    """Share of `n` sequences, or of their questions, whose digits are all the likeliest: what greedy
    decoding answers."""
    rows = max(TOKENS // length, 1)
    good = asked = 0
    for i in range(math.ceil(n / rows)):
        made = tasks.batch(f"held out {i}", texts, length, rows, task, **options)
        ids, weights = (torch.from_numpy(a.astype(np.int32)) for a in made)
        inputs, targets, weights = as_pairs(ids, weights, device)
        hit = model.right(model.hidden(inputs), model.norm, model.embedding, targets)
        hit, answer = hit.view(rows, -1).cpu(), (weights >= tasks.IS_ANSWER).view(rows, -1).cpu()
        for h, a in zip(hit, answer):
            # Digits of one answer stand side by side.
            where = a.nonzero()[:, 0]
            runs = np.split(where.numpy(), np.flatnonzero(np.diff(where.numpy()) > 1) + 1)
            good += sum(bool(h[run].all()) for run in runs)
            asked += len(runs)
    return good / asked, asked


@torch.no_grad()
def bits_per_byte(model, texts, length, device):
    rows = max(TOKENS // length, 1)
    ids, weights = tasks.batch("held out", texts, length, rows, tasks.prose)
    inputs, targets, _ = as_pairs(
        torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(weights), device
    )
    return float(model.nll(inputs, targets).mean()) / math.log(2)


def measure(model, held_out, lengths, n, device):
    rows = []
    for length in lengths:
        row = {"length": length, "bits per byte": round(bits_per_byte(model, held_out, length, device), 3)}
        for name, task, options in [
            ("pass key", tasks.passkey, {}),
            ("8 codes", tasks.codes, {"keys": 8, "questions": 8}),
            ("32 codes", tasks.codes, {"keys": 32, "questions": 16}),
            ("64 codes", tasks.codes, {"keys": 64, "questions": 16}),
            ("4 magic numbers", tasks.magic, {"keys": 4}),
            ("pass key, chat", tasks.passkey, {"chat": True}),
            ("16 codes, chat", tasks.codes, {"keys": 16, "chat": True}),
        ]:
            share, asked = accuracy(model, held_out, task, length, n, device, **options)
            row[name] = f"{100 * share:.1f} % of {asked}"
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def config():
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "vocab_size": tasks.VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": tasks.END_OF_TEXT,
        "eos_token_id": [tasks.END_OF_TEXT, tasks.END],
        "torch_dtype": "bfloat16",
    }


def write(model, out):
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.export(), out / "model.safetensors", metadata={"format": "pt"})
    for name, content in [
        ("config.json", config()),
        ("tokenizer.json", tokenizer()),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tasks.SPECIALS[0],
                "eos_token": tasks.SPECIALS[3],
                "add_bos_token": True,
                "model_max_length": CONTEXT,
                "chat_template": CHAT_TEMPLATE,
            },
        ),
    ]:
        (out / name).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")


def train(model, optimizer, batches, first, a, device):
    model.train()
    begin = at = time.time()
    total = torch.zeros((), device=device)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=a.workers, prefetch_factor=16 if a.workers else None,
        pin_memory=device.type == "cuda",
    )
    lengths, step = {}, first
    for step, ids, weights in loader:
        done = step / a.steps
        rate = a.lr * min((step + 1) / a.warmup, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets, weights = as_pairs(ids, weights, device)
        weights = (weights & (tasks.IS_ANSWER - 1)).float()
        loss = (model.nll(inputs, targets) * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        lengths[inputs.shape[1]] = lengths.get(inputs.shape[1], 0) + 1
        if (step + 1) % a.every == 0:
            mean, now = float(total) / a.every, time.time()
            speed = a.every * TOKENS / (now - at)
            print(f"step {step + 1} loss {mean:.4f} rate {rate:.2e} {speed / 1e6:.2f} M tokens/s "
                  f"{now - begin:.0f} s {lengths}", flush=True)
            total.zero_()
            at, lengths = now, {}
        if time.time() - begin > a.seconds:
            break
    return step + 1


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rdata", required=True, help="the novels: .../janeaustenr/data/Rdata")
    p.add_argument("--bible", required=True, help="verses, a line each")
    p.add_argument("--held-out", default="northangerabbey")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--state", type=Path, help="optimizer and weights, to go on from")
    p.add_argument("--steps", type=int, default=13_000)
    p.add_argument("--until", type=int, help="stop at this step")
    p.add_argument("--seconds", type=float, default=1e9, help="stop after as many")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=300)
    p.add_argument("--workers", type=int, default=12)
    p.add_argument("--every", type=int, default=250, help="steps between two reports")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--measure", type=int, default=512, help="sequences of each kind")
    p.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    p.add_argument("--eager", action="store_true", help="without torch.compile")
    a = p.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(a.seed)
    named = tasks.read_texts(a.rdata, a.bible)
    held_out = tasks.Texts([text for name, text in named if name == a.held_out])
    texts = tasks.Texts([text for name, text in named if name != a.held_out])
    print(f"{len(texts.data)} bytes to train on, {len(held_out.data)} held out, {device}", flush=True)
    model = Tiny(not a.eager).to(device)
    print(f"{sum(t.numel() for t in model.parameters())} parameters", flush=True)
    matrices = [t for t in model.parameters() if t.dim() > 1]
    gains = [t for t in model.parameters() if t.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=a.lr, betas=(0.9, 0.95), fused=device.type == "cuda",
    )
    first = 0
    if a.state and a.state.exists():
        state = torch.load(a.state, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"going on at step {first}", flush=True)
    batches = Batches(texts, a.seed, first, min(a.until or a.steps, a.steps), a.steps)
    step = train(model, optimizer, batches, first, a, device)
    if a.state:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, a.state)
    write(model, a.out)
    model.eval()
    print(f"stopped before step {step} of {a.steps}", flush=True)
    measure(model, held_out, a.lengths, a.measure, device)


if __name__ == "__main__":
    main()
