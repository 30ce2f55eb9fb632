#!/usr/bin/env python3
"""Prints the Markdown tables of docs/performance.md and docs/frontier.md from raw runs.

    tools/tables.py bench/runs/2026-11-22-h100-kernels_cuda.json bench/runs/2026-11-22-h100-bench_cuda.json ...

Takes what `longsight bench kernels -o`, `longsight bench attention -o` (with -p or without), `longsight bench -o`, `longsight eval -o` and
tools/peers.py write; several evaluations of the same samples make one table. Standard library only.
"""
import json
import sys


def plus_minus(mean, error, digits, sign=""):
    """A single sample has no error."""
    text = f"{mean:{sign},.{digits}f}"
    return text if error is None else f"{text} +- {error:,.{digits}f}"


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(c) for c in row) + " |")
    print()


def label(row):
    """The method, with the pool that its plan has where that is not the default."""
    layers = (row.get("plan") or {}).get("layers", [])
    logits = any(layer.get("pool") == "max_logit" for layer in layers if layer.get("role") != "dense")
    logits = logits and "pool=" not in row["method"]
    return f"`{row['method']}:pool=max-logit`" if logits else f"`{row['method']}`"


def kernels(run):
    read = run["bandwidth_gb_s"]["device_read"]
    print(f"Device read {read:.0f} GB/s.\n")
    rows = []
    for r in run["rows"]:
        assert r["check"]["passed"], f"wrong result in {r['op']} {r['variant']}"
        rows.append([
            f"`{r['op']}`", r["variant"], r["batch"], f"{r['bytes'] / 1e6:,.1f} MB", f"{r['ms']['median']:.4f}",
            f"{r['gb_s']:,.0f}", f"{100 * r['share']:.0f} %",
        ])
    table(["op", "variant", "batch", "bytes", "ms", "GB/s", "share of device read"], rows)


def end_to_end(run):
    model, device = run["model"], run["environment"]["device"]
    read = run["bandwidth_gb_s"]["device_read"]
    print(f"{model['dtype']} on {device['backend']}, device read {read:.0f} GB/s.\n")
    rows = []
    for r in run["rows"]:
        x, share = r.get("x_dense"), (r.get("traffic") or {}).get("share")
        rows.append([
            r["test"], label(r), r["budget"] or "-",
            plus_minus(r["tokens_per_second"]["mean"], r["tokens_per_second"]["sd"], 1),
            f"{x:.2f}" if x else "-", f"{100 * share:.0f} %" if share else "-",
        ])
    table(["test", "method", "budget", "tokens/s", "x dense", "of read"], rows)
    a = run.get("prefill_arithmetic")
    if a:
        print(f"Prefill, {a['rows']} rows: linear layers {100 * a['linear_share']:.0f} % of the GEMM crate at the same shapes.\n")


def same_shape(settings):
    """The one shape that tools/peers.py times."""
    shape = [settings[key] for key in ["heads", "kv_heads", "head_dim", "dtype"]]
    return shape[:3] == [32, 8, 128] and shape[3].lower() == "bf16"


def attention(run, peers):
    """The mean layer; with the peers' times (tools/peers.py, same machine and run) as ratios to FlashAttention-3."""
    read, depth = run["bandwidth_gb_s"]["device_read"], run["settings"]["depth"]
    alike = same_shape(run["settings"])
    fa3 = {r["batch"]: r["fa3_ms"] for p in peers for r in p["decode"] if r["tokens"] == depth and "fa3_ms" in r and alike}
    print(f"{depth:,} tokens, device read {read:.0f} GB/s.\n")
    rows = []
    for r in run["rows"]:
        assert r["check"]["passed"], f"wrong result of {r['method']}"
        peer = fa3.get(r["batch"])
        rows.append([
            label(r), r["batch"], f"{r['bytes'] / 1e6:,.1f} MB", f"{r['ms']['mean']:.4f}", f"{100 * r['share']:.0f} %",
            f"{r['x_dense']:.2f}", f"{peer / r['ms']['mean']:.2f}" if peer else "-",
        ])
    table(["method", "batch", "bytes a layer", "ms a layer", "of read", "x our dense", "x FA3"], rows)


def prompts(run, peers):
    """The mean layer of whole prompts, likewise, and what the layers of each role spend their time on."""
    # A peer reads the prompt at once; ours is read in chunks, and appended to the cache.
    alike = same_shape(run["settings"])
    fa3 = {r["tokens"]: r["fa3_ms"] for p in peers for r in p["prefill"] if "fa3_ms" in r and alike}
    rows, parts = [], []
    for r in run["rows"]:
        assert r["check"]["passed"], f"wrong result of {r['method']}"
        of = [label(r), f"{r['prompt']:,}", r["batch"]]
        peer = fa3.get(r["prompt"]) if r["batch"] == 1 else None
        rows.append(of + [
            f"{r['ms']['mean']:.3f}", f"{r['x_dense']:.2f}" if r["x_dense"] else "-",
            f"{peer / r['ms']['mean']:.2f}" if peer else "-", f"{r['tflop_s']:.0f}" if r["tflop_s"] else "-",
            f"{r['taken_bytes'] / 1e6:,.1f} MB" if r["taken_bytes"] is not None else "-",
        ])
        for role in r["roles"]:
            ms = role["ms"]
            both = ms["dense"] + ms["select"] + ms["listed"]
            parts.append(of + [role["role"], len(role["layers"])] + [
                f"{part:.3f}" for part in [ms["append"], ms["forecast"], ms["dense"], ms["select"], ms["listed"], both]
            ])
    head = ["method", "tokens", "batch"]
    table(head + ["ms a layer", "x our dense", "x FA3", "TFLOP/s", "buffers"], rows)
    table(head + ["role", "layers", "append", "forecast", "dense", "select", "listed", "select + attend"], parts)


def evaluation(runs):
    """Means over samples; their errors add as variances."""
    methods = {}
    for run in runs:
        for r in run["rows"]:
            methods.setdefault(r["method"], {})[r.get("sample", r.get("problem"))] = r
    dense = methods["dense"]
    dense_bytes = sum(r["kv_bytes"] for r in dense.values()) / len(dense)
    rows = []
    for name, samples in methods.items():
        n, of = len(samples), samples.values()
        size = sum(r["kv_bytes"] for r in of) / n
        row = [f"`{name.removesuffix('.plan.json')}`", f"{size / 1e6:.1f} MB", f"{100 * size / dense_bytes:.1f} %"]
        if "score" in next(iter(of)):
            score = 100 * sum(r["score"] for r in of) / n
            row.append(f"{score:.1f}")
        else:
            mean = sum(r["nll_difference"]["mean"] for r in of) / n
            errors = [r["nll_difference"]["error"] for r in of]
            error = None if None in errors else sum(e**2 for e in errors) ** 0.5 / n
            top1 = [100 * (r["top1"] - dense[s]["top1"]) for s, r in samples.items()]
            points = sum(top1) / n
            spread = (sum((t - points) ** 2 for t in top1) / max(n - 1, 1) / n) ** 0.5
            row += [plus_minus(mean, error, 4, "+"), f"{100 * sum(r['top1'] for r in of) / n:.2f} %",
                    f"{points:+.2f} +- {spread:.2f}", f"{sum(r['exact'] for r in of)}/{n}"]
        rows.append((size, row))
    head = ["method", "KV read per token", "of dense"]
    head += ["score"] if len(rows[0][1]) == 4 else ["NLL to dense", "top-1", "points to dense", "exact"]
    table(head, [row for _, row in sorted(rows, key=lambda r: r[0])])


evaluations, runs = [], []
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as f:
        runs.append((path, json.load(f)))
peers = [run for _, run in runs if "torch" in run]
for path, run in runs:
    if run in peers:
        continue
    if "task" in run:
        evaluations.append(run)
        continue
    print(f"<!-- {path.rsplit('/', 1)[-1]}, commit {run['environment']['commit']} -->")
    with_peers = {"attention": attention, "prompt_attention": prompts}.get(run["kind"])
    if with_peers:
        with_peers(run, peers)
    else:
        {"kernels": kernels, "end_to_end": end_to_end}[run["kind"]](run)
if evaluations:
    evaluation(evaluations)
