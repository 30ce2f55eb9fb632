#!/usr/bin/env python3
"""Times other people's attention on this machine's GPU, for the ratios of docs/performance.md.

    python3 tools/peers.py --decode 1x8192,8x32768,32x131072 --prefill 8192,32768,131072 -o peers.json

Needs PyTorch with CUDA; FlashAttention-3 is timed where `fa3_fwd_interface` (wheel fa3-fwd) can be imported.
Shapes: 32 query heads over 8 KV heads, head dimension 128, bf16. Like `longsight bench kernels`: launches take turns over
inputs that exceed the L2 cache together and run as one CUDA graph; events; medians.
"""
import argparse
import json
import statistics

import torch

HEADS, KV_HEADS, DIM = 32, 8, 128
ROTATE = 256 << 20


def median_ms(launches, repeats=15):
    """Median milliseconds of one launch; `launches` run in turn inside a graph."""
    for f in launches:
        f()
    torch.cuda.synchronize()
    n = max(1, min(256, len(launches)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            launches[i % len(launches)]()
    samples = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            samples.append(start.elapsed_time(end) / n)
    return statistics.median(samples), samples


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def decode(batch, tokens, fa3):
    kv_bytes = 2 * batch * tokens * KV_HEADS * DIM * 2
    sets = max(1, -(-ROTATE // kv_bytes))
    q = random(batch, 1, HEADS, DIM)
    caches = [(random(batch, tokens, KV_HEADS, DIM), random(batch, tokens, KV_HEADS, DIM)) for _ in range(sets)]
    row = {"batch": batch, "tokens": tokens, "kv_bytes": kv_bytes}
    if fa3:
        # No lengths given: whole caches; splits and head packing are its own choice.
        calls = [lambda k=k, v=v: fa3.flash_attn_with_kvcache(q, k, v) for k, v in caches]
        row["fa3_ms"], row["fa3_samples"] = median_ms(calls)
    return row


def prefill(tokens, fa3):
    q, k, v = random(1, tokens, HEADS, DIM), random(1, tokens, KV_HEADS, DIM), random(1, tokens, KV_HEADS, DIM)
    flops = 4 * HEADS * DIM * tokens * tokens / 2
    row = {"tokens": tokens, "flops": flops}
    repeats = 3 if tokens > 65536 else 9
    if fa3:
        row["fa3_ms"], row["fa3_samples"] = median_ms([lambda: fa3.flash_attn_func(q, k, v, causal=True)], repeats)
        row["fa3_tflops"] = flops / row["fa3_ms"] / 1e9
    return row


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--decode", default="", help="batch x tokens, ...")
    ap.add_argument("--prefill", default="", help="tokens, ...")
    ap.add_argument("-o", "--output")
    a = ap.parse_args()
    try:
        import fa3_fwd_interface as fa3
    except ImportError:
        fa3 = None
        print("fa3_fwd_interface is not installed: FlashAttention-3 is left out")
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "decode": [], "prefill": []}
    for shape in filter(None, a.decode.split(",")):
        batch, tokens = map(int, shape.split("x"))
        report["decode"].append(decode(batch, tokens, fa3))
        torch.cuda.empty_cache()
        r = report["decode"][-1]
        if fa3:
            print(f"decode {shape}: FA3 {r['fa3_ms']:.4f} ms, {r['kv_bytes'] / r['fa3_ms'] / 1e6:.0f} GB/s", flush=True)
    for tokens in map(int, filter(None, a.prefill.split(","))):
        report["prefill"].append(prefill(tokens, fa3))
        torch.cuda.empty_cache()
        r = report["prefill"][-1]
        if fa3:
            print(f"prefill {tokens}: FA3 {r['fa3_ms']:.3f} ms, {r['fa3_tflops']:.0f} TFLOP/s", flush=True)
    if a.output:
        with open(a.output, "w") as f:
            json.dump(report, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
