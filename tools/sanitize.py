#!/usr/bin/env python3
"""compute-sanitizer over the conformance cases of the CUDA backend.

    python3 tools/sanitize.py TOOL BINARY [--jobs N] [--seconds S] [--of-each N] [--out FILE]

TOOL is memcheck, initcheck, synccheck or racecheck; BINARY is the conformance test's executable, which
`cargo test --release --no-run --test conformance` names. Cases run in groups of up to 60, N groups at a time, each group in a
process of its own. racecheck does not follow kernels that begin before the one before has ended, nor graphs: it runs without both.
It is slow, so --of-each N takes only N cases of every op and variant, one process each, in the order op by op.
The exit status is 0 where every group has ended and is clean.
"""
import argparse
import collections
import concurrent.futures
import os
import re
import subprocess
import sys
import time

GROUP = 60


def names_of(binary):
    listed = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True).stdout
    names = [line.split(": test")[0].strip() for line in listed.splitlines() if ": test" in line]
    return [n for n in names if n.startswith("cuda::")]


def groups(names):
    """Prefixes of names that at most GROUP names share, where words part them."""
    found = []

    def split(prefix, members):
        parts = collections.defaultdict(list)
        for name in members:
            parts[prefix + re.match(r"[_:]*[^_:]*", name[len(prefix):]).group()].append(name)
        if len(members) <= GROUP or set(parts) == {prefix}:
            found.append(prefix)
            return
        for part in sorted(parts):
            split(part, parts[part])

    split("cuda::", names)
    return found


def sample(names, n):
    """n cases of each op and variant, spread over them, first one case of each."""
    kinds = collections.defaultdict(list)
    for name in names:
        words = name.split("::")[1:]
        kinds[(words[0], *words[-1].split("_")[:2])].append(name)
    picked = []
    for kind in kinds.values():
        take = min(n, len(kind))
        picked += [(i, kind[(2 * i + 1) * len(kind) // (2 * take)]) for i in range(take)]
    return [name for _, name in sorted(picked, key=lambda p: p[0])]


def run(tool, binary, cases, exact, until):
    left = until - time.monotonic()
    if left <= 0:
        return None
    env = dict(os.environ, LONGSIGHT_REQUIRE="cuda")
    if tool == "racecheck":
        env.update(LONGSIGHT_CUDA_OVERLAP="off", LONGSIGHT_CUDA_GRAPHS="off")
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9",
               "--print-limit", "5", binary, cases] + ["--exact"] * exact
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=left)
    except subprocess.TimeoutExpired:
        return None
    text = done.stdout + done.stderr
    passed = re.search(r"(\d+) passed; (\d+) failed", text)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    passed_n = int(passed.group(1)) if passed else 0
    line = f"{done.returncode} {cases} {passed.group() if passed else 'did not end'} {summary.group() if summary else ''}"
    return done.returncode == 0 and passed_n > 0, passed_n, line, text


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tool", choices=["memcheck", "initcheck", "synccheck", "racecheck"])
    p.add_argument("binary")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--seconds", type=float, default=3600.0)
    p.add_argument("--of-each", type=int, default=0)
    p.add_argument("--out")
    a = p.parse_args()
    names = names_of(a.binary)
    cases = sample(names, a.of_each) if a.of_each else groups(names)
    until = time.monotonic() + a.seconds
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        results = list(pool.map(lambda c: run(a.tool, a.binary, c, a.of_each > 0, until), cases))
    ended = [r for r in results if r]
    bad = [r for r in ended if not r[0]]
    head = (f"{a.tool}: {len(ended)} of {len(cases)} groups of {len(names)} cases ended, {len(ended) - len(bad)} clean, "
            f"{sum(r[1] for r in ended)} cases passed")
    print(head)
    for r in bad:
        print(r[2])
    for r in bad[:3]:
        print("\n".join(line for line in r[3].splitlines() if "=====" in line)[:3000])
    if a.out:
        with open(a.out, "w", encoding="ascii") as f:
            f.write("\n".join([head] + [r[2] for r in ended]) + "\n")
    return 0 if cases and len(ended) == len(cases) and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
