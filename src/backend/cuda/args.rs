//! Structs that kernels take by value; each has the layout of the struct of the same name in `kernels/`.

use super::CudaBackend;
use crate::backend::{KvPool, Result, Seqs};
use bytemuck::{Pod, Zeroable};

/// `Seqs` of `paged.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct SeqsArg {
    meta: u64,
    pages: u64,
}

/// `Pool` of `paged.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct PoolArg {
    pub k: u64,
    pub v: u64,
    kv_heads: u32,
    head_dim: u32,
    lead: u32,
    n_pages: u32,
}

impl CudaBackend {
    pub(super) fn seqs(&self, op: &'static str, s: &Seqs<'_>) -> Result<SeqsArg> {
        Ok(SeqsArg { meta: self.ptr(op, s.meta)?, pages: self.ptr(op, s.pages)? })
    }

    pub(super) fn pool(&self, op: &'static str, p: &KvPool<'_>) -> Result<PoolArg> {
        Ok(PoolArg {
            k: self.ptr(op, p.k)?,
            v: self.ptr(op, p.v)?,
            kv_heads: word(op, "kv_heads", p.kv_heads)?,
            head_dim: word(op, "head_dim", p.head_dim)?,
            lead: word(op, "lead", p.lead)?,
            n_pages: word(op, "n_pages", p.n_pages)?,
        })
    }
}

/// A size as the kernels' 32-bit words.
pub(super) fn word(op: &'static str, name: &str, n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| crate::backend::BackendError::BadArgument {
        op,
        reason: format!("{name} = {n} does not fit 32 bits"),
    })
}

/// A test that structs here are as large as those that the kernels of an op assert.
#[cfg(test)]
macro_rules! same_sizes {
    ($($op:literal $kernel:literal $here:ty,)*) => {
        #[test]
        fn structs_are_as_large_as_the_kernels() {
            $($crate::backend::cuda::launch::holds(
                $op,
                &format!("static_assert(sizeof({}) == {}, ", $kernel, size_of::<$here>()),
            );)*
        }
    };
}
#[cfg(test)]
pub(super) use same_sizes;

#[cfg(test)]
same_sizes! {
    "key_stats" "Seqs" SeqsArg,
    "key_stats" "Pool" PoolArg,
}
