//! A thread pool for jobs of a few microseconds.
//!
//! A decode step is a few hundred short loops in a row. The threads of a general pool fall asleep between them and
//! cost tens of microseconds to wake; these ones keep looking for the next job for a while first.
//!
//! The caller publishes a job by one store to `word`. Every thread of the job owns a range of its tasks, takes them
//! one by one, then helps with the ranges of the others: threads that are late, or that the system does not run,
//! hold nobody up. A worker marks itself `inside` before it looks at a job; the caller takes all tasks that are left,
//! closes the job and waits until nobody is inside, so a job never outlives its call.
//!
//! Where other programs want the cores, waiting threads sleep: a thread that burns its share of a core while it waits
//! is not run when there is work.

#[cfg(test)]
mod tests;
mod wait;

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use wait::{Patience, SPIN, Wait};

/// Bits of `Shared::word` that hold the width of the open job; above them, the number of the job.
const WIDTH_BITS: u32 = 16;
const WIDTH: u64 = (1 << WIDTH_BITS) - 1;

/// Threads that run jobs together with their callers.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// A task loop; the lifetime of `task` is that of the call to [`Pool::run`].
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    n: usize,
    width: usize,
}

impl Job {
    /// First task of thread `i`'s range; the end of the last one for `i == width`.
    fn cut(&self, i: usize) -> usize {
        self.n / self.width * i + (self.n % self.width).min(i)
    }
}

/// What one thread writes often, on cache lines of its own.
#[repr(align(128))]
#[derive(Default)]
struct Slot {
    /// Next task of the thread's range.
    next: AtomicUsize,
    /// Whether the worker may look at the job.
    inside: AtomicBool,
}

#[repr(align(128))]
struct Padded<T>(T);

struct Shared {
    /// Number of the job and, while it is open, how many threads it is for.
    word: Padded<AtomicU64>,
    /// Written between jobs only, by the thread that set `busy`.
    job: Padded<UnsafeCell<Job>>,
    slots: Box<[Slot]>,
    /// A job is on.
    busy: AtomicBool,
    /// Workers asleep, or about to be.
    parked: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// The caller of the job sleeps until somebody leaves.
    waiting: AtomicBool,
    left: Condvar,
    stop: AtomicBool,
    /// The first panic of the running job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// No more threads than cores.
    fits: bool,
}

// SAFETY: `job` is the only part that is not Sync by itself. It is written while no job is open and no worker is
// inside, and read by workers inside an open job.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is followed during the call that set it only, see `Pool::run`.
unsafe impl Send for Shared {}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool that runs jobs on `threads` threads, the caller among them; fewer when the system refuses one.
    pub(super) fn new(threads: usize) -> Pool {
        let threads = threads.clamp(1, WIDTH as usize);
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            word: Padded(AtomicU64::new(0)),
            job: Padded(UnsafeCell::new(Job { task: &|_| (), n: 0, width: 1 })),
            slots: (0..threads).map(|_| Slot::default()).collect(),
            busy: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            waiting: AtomicBool::new(false),
            left: Condvar::new(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            fits: threads <= cores,
        });
        let worker = |me: usize| {
            let shared = shared.clone();
            let named = std::thread::Builder::new().name(format!("longsight-cpu-{me}"));
            named.spawn(move || shared.work(me)).ok()
        };
        let workers = (1..threads).map_while(worker).collect();
        Pool { shared, workers }
    }

    /// Threads of a job at most.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0) .. task(n - 1)` on up to `width` threads and returns when all have ended. Inside a task, or
    /// while another thread's job is on, the tasks run on the calling thread alone.
    ///
    /// Panics with the first panic of a task; the other tasks still run when there is more than one thread.
    pub(super) fn run(&self, n: usize, width: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let width = width.min(n).min(self.threads());
        if width <= 1 || shared.busy.swap(true, Ordering::Acquire) {
            return (0..n).for_each(task);
        }
        // SAFETY: only the lifetime changes. Nobody follows the pointer after this call: workers do so inside an
        // open job, and below the job is closed and left by all before the call returns; nothing in between unwinds.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, n, width };
        for (i, slot) in shared.slots[..width].iter().enumerate() {
            slot.next.store(job.cut(i), Ordering::Relaxed);
        }
        // SAFETY: `busy` keeps other callers away, and no worker is inside (the last job saw to it).
        unsafe { *shared.job.0.get() = job };
        let closed = ((shared.word.0.load(Ordering::Relaxed) >> WIDTH_BITS) + 1) << WIDTH_BITS;
        // Sequentially consistent with the loads of `parked` and, in workers, the stores before they look again:
        // of this store and theirs, at least one side sees the other's.
        shared.word.0.store(closed | width as u64, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            // Whoever counted itself holds the lock until it waits.
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        shared.take_tasks(&job, 0);
        shared.word.0.store(closed, Ordering::SeqCst);
        for slot in &shared.slots[1..width] {
            shared.wait_for(slot);
        }
        let panic = lock(&shared.panic).take();
        shared.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker's tasks catch their panics.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, me: usize) {
        let mut seen = 0;
        let mut patience = Patience::new(self.fits);
        while let Some(word) = self.next_job(me, seen, &mut patience) {
            seen = word;
            let inside = &self.slots[me].inside;
            inside.store(true, Ordering::SeqCst);
            if self.word.0.load(Ordering::SeqCst) == word {
                // SAFETY: the job is open and this worker is inside, so its caller waits before it writes another.
                let job = unsafe { *self.job.0.get() };
                self.take_tasks(&job, me);
            }
            inside.store(false, Ordering::SeqCst);
            if self.waiting.load(Ordering::SeqCst) {
                drop(lock(&self.sleep));
                self.left.notify_all();
            }
        }
    }

    /// Returns when the worker of `slot` is not inside.
    fn wait_for(&self, slot: &Slot) {
        let mut wait = Wait::default();
        while self.fits && wait.idle() < SPIN {
            if !slot.inside.load(Ordering::SeqCst) {
                return;
            }
            wait.look();
        }
        let mut guard = lock(&self.sleep);
        self.waiting.store(true, Ordering::SeqCst);
        while slot.inside.load(Ordering::SeqCst) {
            guard = self.left.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.waiting.store(false, Ordering::SeqCst);
    }

    /// Waits for a job of more than `me` threads other than `seen`; None when the pool ends.
    fn next_job(&self, me: usize, seen: u64, patience: &mut Patience) -> Option<u64> {
        let mut last = seen;
        let mut wait = Wait::default();
        loop {
            let word = self.word.0.load(Ordering::SeqCst);
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if word != seen && (word & WIDTH) as usize > me {
                patience.found();
                return Some(word);
            }
            if word != last {
                // Jobs go on, if without this thread.
                last = word;
                wait = Wait::default();
            }
            wait.look();
            if wait.disturbed() {
                patience.disturbed();
            }
            if wait.idle() >= patience.limit() {
                self.park(word);
                wait = Wait::default();
            }
        }
    }

    /// Sleeps until `word` changes.
    fn park(&self, word: u64) {
        let mut guard = lock(&self.sleep);
        self.parked.fetch_add(1, Ordering::SeqCst);
        while self.word.0.load(Ordering::SeqCst) == word && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }

    /// Runs tasks until all are taken, those of `me`'s range first.
    fn take_tasks(&self, job: &Job, me: usize) {
        // SAFETY: the job is open, see `Pool::run`.
        let task = unsafe { &*job.task };
        for i in (me..job.width).chain(0..me) {
            let (next, end) = (&self.slots[i].next, job.cut(i + 1));
            // The first look spares a range that is used up a write to its cache line.
            while next.load(Ordering::Relaxed) < end {
                let t = next.fetch_add(1, Ordering::Relaxed);
                if t >= end {
                    break;
                }
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(t))) {
                    lock(&self.panic).get_or_insert(panic);
                }
            }
        }
    }
}
