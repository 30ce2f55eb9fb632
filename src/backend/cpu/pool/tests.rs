use super::*;
use std::sync::Barrier;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

/// Runs `n` counting tasks; every one must have run once.
fn count(pool: &Pool, n: usize, width: usize) {
    let runs: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
    pool.run(n, width, &|i| {
        runs[i].fetch_add(1, Ordering::Relaxed);
    });
    assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1), "{n} tasks, width {width}");
}

#[test]
fn every_task_runs_once() {
    for threads in [1, 2, 3, 8, 33] {
        let pool = Pool::new(threads);
        for n in [0, 1, 2, 3, 7, 64, 1000] {
            for width in [0, 1, 2, 5, 100] {
                count(&pool, n, width);
            }
        }
    }
}

#[test]
fn many_short_jobs_on_more_threads_than_cores() {
    let pool = Pool::new(16);
    for i in 0..20_000 {
        count(&pool, 1 + i % 40, 16);
    }
}

#[test]
fn the_workers_take_part() {
    let pool = Pool::new(4);
    // Only ends when four threads are in it at once.
    let barrier = Barrier::new(4);
    for _ in 0..20 {
        pool.run(4, 4, &|_| {
            barrier.wait();
        });
    }
}

#[test]
fn a_late_thread_holds_nobody_up() {
    let pool = Pool::new(4);
    // The first task waits for all others, those of its own range too: the other threads must take them.
    let others = AtomicU32::new(0);
    let start = Instant::now();
    pool.run(64, 4, &|i| {
        if i > 0 {
            others.fetch_add(1, Ordering::SeqCst);
            return;
        }
        while others.load(Ordering::SeqCst) < 63 {
            assert!(start.elapsed() < Duration::from_secs(20), "tasks wait behind a late thread");
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(3);
    for bad in [0, 5, 9] {
        let ran = AtomicU32::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(10, 3, &|i| {
                ran.fetch_add(1, Ordering::Relaxed);
                assert!(i != bad, "task {i}");
            });
        }));
        let message = *result.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, format!("task {bad}"));
        assert_eq!(ran.load(Ordering::Relaxed), 10);
        count(&pool, 100, 3);
    }
}

#[test]
fn nested_and_simultaneous_calls_run_inline() {
    let pool = Pool::new(3);
    let runs = AtomicU32::new(0);
    pool.run(6, 3, &|_| {
        let outer = std::thread::current().id();
        pool.run(5, 3, &|_| {
            assert_eq!(std::thread::current().id(), outer);
            runs.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(runs.load(Ordering::Relaxed), 30);

    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| (0..2_000).for_each(|i| count(&pool, 1 + i % 17, 3)));
        }
    });
}

#[test]
fn sleeping_workers_wake_up_and_idle_ones_sleep() {
    let pool = Pool::new(3);
    let barrier = Barrier::new(3);
    for _ in 0..3 {
        let asleep = || pool.shared.parked.load(Ordering::SeqCst) == 2;
        let start = Instant::now();
        while !asleep() {
            assert!(start.elapsed() < Duration::from_secs(20), "the workers do not go to sleep");
            std::thread::sleep(Duration::from_millis(1));
        }
        pool.run(3, 3, &|_| {
            barrier.wait();
        });
    }
}

#[test]
fn one_thread_is_the_caller() {
    let pool = Pool::new(1);
    let caller = std::thread::current().id();
    pool.run(10, 8, &|_| assert_eq!(std::thread::current().id(), caller));
    assert_eq!(pool.threads(), 1);
    assert_eq!(Pool::new(0).threads(), 1);
}
