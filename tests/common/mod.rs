//! Helpers that several test binaries share; each uses only some of them.
#![allow(dead_code)]

pub mod cache;
pub mod dims;
pub mod forecast;
pub mod gguf_file;
pub mod model;
pub mod nosa;
pub mod pick;
pub mod profile;
pub mod program;
pub mod readme;
pub mod select;
pub mod tiny;
