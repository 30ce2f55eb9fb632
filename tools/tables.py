#!/usr/bin/env python3
"""Prints the Markdown tables of docs/performance.md from raw runs.

    tools/tables.py bench/runs/2026-11-22-h100-kernels_cuda.json bench/runs/2026-11-22-h100-bench_cuda.json ...

Takes what `longsight bench kernels -o` and `longsight bench -o` write; standard library only.
"""
import json
import sys


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(c) for c in row) + " |")
    print()


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
            r["test"], r["method"], r["budget"] or "-",
            f"{r['tokens_per_second']['mean']:,.1f} +- {r['tokens_per_second']['sd']:.1f}",
            f"{x:.2f}" if x else "-", f"{100 * share:.0f} %" if share else "-",
        ])
    table(["test", "method", "budget", "tokens/s", "x dense", "of read"], rows)
    a = run.get("prefill_arithmetic")
    if a:
        print(f"Prefill, {a['rows']} rows: linear layers {100 * a['linear_share']:.0f} % of the GEMM crate at the same shapes.\n")


for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as f:
        run = json.load(f)
    print(f"<!-- {path.rsplit('/', 1)[-1]}, commit {run['environment']['commit']} -->")
    {"kernels": kernels, "end_to_end": end_to_end}[run["kind"]](run)
