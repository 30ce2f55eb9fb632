//! Where keys and values live: page layout, the device pool and the page tables of sequences.

mod cache;
mod page_table;

pub use cache::{KvCache, KvShape};
pub use page_table::{PageAllocator, PageError, PageTable, pages_for};
