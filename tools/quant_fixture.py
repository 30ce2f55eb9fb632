#!/usr/bin/env python3
"""Writes tests/data/quant_blocks.json: a few blocks of every weight type with their f32 values.

usage: quant_fixture.py OUT.json
needs: pip install gguf numpy

Types the package can quantise come from quantised normal noise; the K types, which it only reads,
are random bits with sane scales. The expected values are the package's own `dequantize`.
"""
import json
import sys

import numpy as np
from gguf import GGMLQuantizationType as T, dequantize, quantize

rng = np.random.default_rng(20240607)


def half_bytes(low, high, n):
    return np.float16(rng.uniform(low, high, n)).view(np.uint8).reshape(n, 2)


def random_k_blocks(kind, n):
    if kind == T.Q6_K:
        body = rng.integers(0, 256, (n, 208), dtype=np.uint8)
        return np.concatenate([body, half_bytes(1e-4, 1e-2, n)], axis=1)
    size = 144 if kind == T.Q4_K else 176
    body = rng.integers(0, 256, (n, size - 4), dtype=np.uint8)
    return np.concatenate([half_bytes(1e-4, 1e-2, n), half_bytes(1e-4, 1e-2, n), body], axis=1)


out = {}
for kind in (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q4_K, T.Q5_K, T.Q6_K):
    if kind in (T.Q4_K, T.Q5_K, T.Q6_K):
        raw = random_k_blocks(kind, 2)
    else:
        raw = quantize(rng.standard_normal((2, 64)).astype(np.float32), kind)
    values = dequantize(raw, kind).astype(np.float32).reshape(-1)
    out[kind.name] = {
        "bytes": np.ascontiguousarray(raw).view(np.uint8).tobytes().hex(),
        "f32_bits": values.view(np.uint32).tolist(),
    }
with open(sys.argv[1], "w") as f:
    json.dump(out, f, separators=(",", ":"))
    f.write("\n")
