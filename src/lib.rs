//! Longsight runs long-context language models with sparse attention, on CPUs and GPUs.
//!
//! Layers, each importing only those below: `cli`, `eval`, `bench` | `calibrate`, `forecast` | `engine` | `model` |
//! `select`, `kv` | `backend` | `files`, `names`, `tensor_file`. See `DESIGN.md`.

#![warn(missing_debug_implementations)]
#![warn(missing_docs)]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod backend;
pub mod bench;
pub mod calibrate;
pub mod cli;
pub mod engine;
pub mod eval;
mod files;
pub mod forecast;
pub mod kv;
pub mod model;
mod names;
pub mod select;
mod tensor_file;
