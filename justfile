# Tasks; `just` lists them.

set shell := ["bash", "-euo", "pipefail", "-c"]

# List the tasks
default:
    @just --list

# Ask the demo model about a text (builds and fetches first)
demo *options:
    scripts/demo.sh {{ options }}

# Build the release binary
build:
    cargo build --release --locked

# Run the program: just run -- devices
run *arguments:
    cargo run --release --locked --quiet -- {{ arguments }}

# Set up and run all tests
test *options:
    scripts/test.sh {{ options }}

# Check every op on every backend found: just conformance cpu::top_k
conformance *filter:
    cargo test --locked --test conformance -- {{ filter }}

# Type-check everything
check:
    cargo check --all-targets --locked

# Format
fmt:
    cargo fmt --all

# Lint: warnings are errors
lint:
    cargo clippy --all-targets --locked -- -D warnings

# Licenses, sources and bans of the dependencies (needs cargo-deny)
deny:
    cargo deny --locked check bans licenses sources

# Lint the scripts (needs shellcheck)
shellcheck:
    shellcheck -x scripts/*.sh .ci/run

# The library's documentation
doc:
    cargo doc --locked --no-deps

# Everything that must hold before a merge
ci:
    .ci/run

# Speed by prompt length, depth, method and budget
bench *options:
    cargo run --release --locked --quiet -- bench {{ options }}

# Quality: ppl, copy, passkey, needle, multikey, long-output, ruler or recall
eval task *options:
    cargo run --release --locked --quiet -- eval {{ task }} {{ options }}

# Run an example: just example quickstart
example name *arguments:
    cargo run --release --locked --example {{ name }} -- {{ arguments }}

# Install the software Vulkan driver (root)
install-lavapipe:
    scripts/install_lavapipe.sh

# Unpack NVIDIA's compiler under target/
install-nvcc:
    scripts/install_nvcc.sh
