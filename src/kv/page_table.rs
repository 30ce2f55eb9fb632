//! Page ownership: a reference-counted free list and one page list per sequence.

use crate::backend::PAGE;
use thiserror::Error;

/// The pool has no page left.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "the KV cache is full: {need} more pages of 64 tokens are needed, {free} of {total} are free; \
     use a cache for more tokens, or run fewer sequences"
)]
pub struct PageError {
    /// Pages asked for.
    pub need: usize,
    /// Pages free.
    pub free: usize,
    /// Pages in the pool.
    pub total: usize,
}

/// Pages of 64 tokens that `tokens` tokens occupy.
pub const fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

/// Reference-counted page numbers of one pool. A page number is valid in every layer's pool.
#[derive(Debug)]
pub struct PageAllocator {
    counts: Vec<u32>,
    free: Vec<u32>,
}

impl PageAllocator {
    /// All `n` pages free.
    pub fn new(n: usize) -> Self {
        // Popped from the end: hand out low page numbers first.
        PageAllocator { counts: vec![0; n], free: (0..n as u32).rev().collect() }
    }

    /// Pages not owned by any sequence.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    fn take(&mut self, n: usize) -> Result<Vec<u32>, PageError> {
        if n > self.free.len() {
            return Err(PageError { need: n, free: self.free.len(), total: self.counts.len() });
        }
        let at = self.free.len() - n;
        let mut pages = self.free.split_off(at);
        pages.reverse();
        for &p in &pages {
            self.counts[p as usize] = 1;
        }
        Ok(pages)
    }

    fn release(&mut self, page: u32) {
        let c = &mut self.counts[page as usize];
        *c -= 1;
        if *c == 0 {
            self.free.push(page);
        }
    }
}

/// The pages of one sequence, in token order.
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<u32>,
    tokens: usize,
}

impl PageTable {
    /// Tokens cached.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Page numbers; token `j` lives in `pages()[j / 64]`.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Makes room for `n` more tokens and counts them as cached.
    ///
    /// Returns the copies `(from, to)` that the caller must do on the device before it writes: a last page
    /// that is shared with another sequence is replaced by a private one (copy on write).
    ///
    /// # Errors
    /// [`PageError`] where the allocator has too few pages; nothing has changed then.
    pub fn extend(
        &mut self,
        n: usize,
        a: &mut PageAllocator,
    ) -> Result<Vec<(u32, u32)>, PageError> {
        let partial = !self.tokens.is_multiple_of(PAGE);
        let shared =
            n > 0 && partial && self.pages.last().is_some_and(|&p| a.counts[p as usize] > 1);
        let grow = pages_for(self.tokens + n) - self.pages.len();
        let mut fresh = a.take(grow + usize::from(shared))?.into_iter();
        let mut copies = Vec::new();
        if shared && let (Some(last), Some(new)) = (self.pages.last_mut(), fresh.next()) {
            copies.push((*last, new));
            a.release(*last);
            *last = new;
        }
        self.pages.extend(fresh);
        self.tokens += n;
        Ok(copies)
    }

    /// A second sequence with the same cached tokens; all pages are shared.
    pub fn fork(&self, a: &mut PageAllocator) -> PageTable {
        for &p in &self.pages {
            a.counts[p as usize] += 1;
        }
        PageTable { pages: self.pages.clone(), tokens: self.tokens }
    }

    /// Drops all tokens from `tokens` on.
    pub fn truncate(&mut self, tokens: usize, a: &mut PageAllocator) {
        self.tokens = self.tokens.min(tokens);
        for p in self.pages.drain(pages_for(self.tokens)..) {
            a.release(p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extend_fork_and_copy_on_write() {
        let mut a = PageAllocator::new(4);
        let mut t = PageTable::default();
        assert!(t.extend(65, &mut a).unwrap().is_empty());
        assert_eq!(t.pages(), [0, 1]);
        let mut f = t.fork(&mut a);
        assert_eq!(a.free_pages(), 2);
        // The shared second page is partial: the writer gets a copy, the other keeps the original.
        assert_eq!(f.extend(1, &mut a).unwrap(), [(1, 2)]);
        assert_eq!((f.pages(), t.pages()), (&[0, 2][..], &[0, 1][..]));
        assert!(t.extend(1, &mut a).unwrap().is_empty());
        t.truncate(0, &mut a);
        f.truncate(0, &mut a);
        assert_eq!(a.free_pages(), 4);
    }

    #[test]
    fn a_full_pool_is_an_error_that_changes_nothing() {
        let mut a = PageAllocator::new(2);
        let mut t = PageTable::default();
        t.extend(64, &mut a).unwrap();
        assert_eq!(t.extend(65, &mut a), Err(PageError { need: 2, free: 1, total: 2 }));
        assert_eq!((t.tokens(), a.free_pages()), (64, 1));
    }

    #[test]
    fn truncating_inside_a_page_keeps_it() {
        let mut a = PageAllocator::new(3);
        let mut t = PageTable::default();
        t.extend(130, &mut a).unwrap();
        t.truncate(70, &mut a);
        assert_eq!((t.pages().len(), a.free_pages()), (2, 1));
    }
}
