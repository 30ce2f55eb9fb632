//! Measuring: ceilings first, then every op at every batch size.

use super::attend::{Dense, Rows};
use super::inputs::{KvSet, Rig, sets_for};
use super::score::Score;
use super::top_k::Picks;
use super::{Check, KernelBench, KernelReport, KernelRow, Op, Skipped};
use crate::backend::{Backend, BackendError};
use crate::bench::{Environment, INTERRUPTED, Result, Summary, bad};

/// Shortest sample in milliseconds: many launches of a short op, so that timer steps do not matter.
const SAMPLE_MS: f64 = 2.0;
const MAX_LAUNCHES: usize = 256;
/// Warm-up in milliseconds (at least three samples): kernels compile, a graph is made, clocks rise.
const WARM_UP_MS: f64 = 30.0;
/// Share of the free memory that inputs may take.
const MEMORY_SHARE: f64 = 0.6;

/// An op on inputs that launches take in turn.
pub(super) trait Case {
    /// Bytes that a launch must move.
    fn bytes(&self) -> u64;
    /// Input sets.
    fn sets(&self) -> usize;
    /// Key ranges, where the op has them.
    fn splits(&self) -> Option<usize> {
        None
    }
    /// Records one launch on an input set.
    fn launch(&self, rig: &Rig<'_>, set: usize) -> crate::backend::Result<()>;
    /// Compares what the last launch, on `set`, has left with the reference.
    fn check(&self, rig: &Rig<'_>, set: usize) -> crate::backend::Result<Check>;
    /// What a launch writes, for the test that a wrong result is noticed.
    #[cfg(test)]
    fn output(&self) -> &crate::backend::Tensor;
}

impl KernelBench {
    /// Measures on `b`. `progress` hears of (what is measured, measurements done, all) and answers whether to go on.
    ///
    /// Shapes that do not fit the device, and what is left when `progress` says no, are listed as skipped; wrong results in [`KernelReport::failures`].
    ///
    /// # Errors
    /// Any [`BenchError`](crate::bench::BenchError).
    pub fn run(
        &self,
        b: &dyn Backend,
        progress: &mut dyn FnMut(&str, usize, usize) -> bool,
    ) -> Result<KernelReport> {
        self.validate()?;
        if !b.caps().storage.contains(&self.dtype) {
            let known: Vec<_> = b.caps().storage.iter().map(|d| d.name()).collect();
            return bad(format!(
                "{} does not store {}; use --dtype {}",
                b.caps().device,
                self.dtype,
                known.join(" or ")
            ));
        }
        let (ops, all) = (self.ops(), self.ops().len() * self.batches.len());
        let mut go_on = progress("device read", 0, all);
        let bandwidth = b.bandwidth()?;
        let mut report = KernelReport {
            kind: "kernels",
            environment: Environment::of(b),
            settings: self.clone(),
            bandwidth_gb_s: bandwidth,
            rows: Vec::new(),
            skipped: Vec::new(),
        };
        let mut done = 0;
        for &batch in &self.batches {
            let mut rig = Rig::new(b, self, batch)?;
            let kv = if go_on { rig.kv_sets()? } else { Ok(Vec::new()) };
            for &op in &ops {
                go_on = go_on && progress(&format!("{} batch {batch}", op.name()), done, all);
                done += 1;
                let row = match &kv {
                    _ if !go_on => Err(INTERRUPTED.into()),
                    Err(why) if op.reads_pool() => Err(why.clone()),
                    kv => {
                        let sets = kv.as_deref().unwrap_or_default();
                        match rig.row(op, sets, bandwidth.device_read) {
                            Ok(row) => Ok(row),
                            Err(e) => Err(no_room(e)?),
                        }
                    }
                };
                match row {
                    Ok(row) => report.rows.push(row),
                    Err(why) => report.skipped.push(Skipped {
                        op: op.name(),
                        variant: op.variant(self),
                        batch,
                        why,
                    }),
                }
            }
        }
        progress("done", all, all);
        Ok(report)
    }
}

/// The sentence of an error that means "too large for this device"; other errors stay errors.
fn no_room(e: BackendError) -> std::result::Result<String, BackendError> {
    match e {
        e if e.is_full() => Ok(e.to_string()),
        e => Err(e),
    }
}

impl Rig<'_> {
    /// The KV pools that ops take in turn: enough for the op that reads least of a pool, as far as memory goes.
    /// The inner error says why not even one fits.
    fn kv_sets(&mut self) -> Result<std::result::Result<Vec<KvSet>, String>> {
        let limit = self.b.caps().max_binding;
        if self.set_bytes() / 2 > limit {
            return Ok(Err(format!(
                "one layer's keys take {} bytes, this device binds at most {limit} at once; \
                 give a smaller --batch or --depth",
                self.set_bytes() / 2
            )));
        }
        let free = self.b.free_memory().unwrap_or(u64::MAX) as f64 * MEMORY_SHARE;
        let fit = (free / self.set_bytes() as f64) as usize;
        if fit == 0 {
            return Ok(Err(format!(
                "one layer's keys and values take {} bytes, {:.0} of the free memory may be used; \
                 give a smaller --batch or --depth",
                self.set_bytes(),
                free
            )));
        }
        let wanted = sets_for(Score::lead_bytes(self));
        let mut sets = Vec::new();
        while sets.len() < wanted.min(fit) {
            match self.kv_set() {
                Ok(set) => sets.push(set),
                Err(e) if sets.is_empty() => return Ok(Err(no_room(e)?)),
                Err(e) => {
                    no_room(e)?;
                    break;
                }
            }
        }
        Ok(Ok(sets))
    }

    /// Measures one op and checks its result.
    fn row(
        &mut self,
        op: Op,
        kv: &[KvSet],
        device_read: f64,
    ) -> std::result::Result<KernelRow, BackendError> {
        let case = self.case(op, kv)?;
        let (ms, launches) = self.time(&*case)?;
        let last = case.sets() - 1;
        case.launch(self, last)?;
        let gb_s = case.bytes() as f64 / 1e6 / ms.median;
        Ok(KernelRow {
            op: op.name(),
            variant: op.variant(self.o),
            batch: self.batch,
            bytes: case.bytes(),
            ms,
            launches,
            gb_s,
            share: gb_s / device_read,
            splits: case.splits(),
            input_sets: case.sets(),
            rotated_bytes: case.bytes() * case.sets() as u64,
            check: case.check(self, last)?,
        })
    }

    /// The op with its inputs; `kv` holds at least one set for ops that read keys.
    pub(super) fn case<'k>(
        &mut self,
        op: Op,
        kv: &'k [KvSet],
    ) -> crate::backend::Result<Box<dyn Case + 'k>> {
        Ok(match op {
            Op::AttendDense => Box::new(Dense::new(self, kv)?),
            Op::AttendRows(share) => Box::new(Rows::new(self, kv, share)?),
            Op::ScoreLead | Op::ScoreInt8 | Op::ScoreSlice => Box::new(Score::new(self, kv, op)?),
            Op::TopK(share) => Box::new(Picks::new(self, share)?),
        })
    }

    /// Milliseconds of a launch, and launches per sample. The launches of a sample are the same every time, so that
    /// a backend that replays decode steps ([`Backend::replayable`]) replays them here too.
    fn time(&self, case: &dyn Case) -> crate::backend::Result<(Summary, usize)> {
        let launch = |n: usize| {
            let mut outcome = Ok(());
            let ms = self.b.time(&mut || {
                self.b.replayable(&mut || {
                    outcome = (0..n).try_for_each(|i| case.launch(self, i % case.sets()));
                    outcome.is_ok()
                })
            })?;
            outcome.map(|()| ms)
        };
        // Enough to read all input sets before one comes again, and long enough for the timer.
        let once = launch(1)?.min(launch(1)?);
        let long = (SAMPLE_MS / once.max(1e-6)).ceil() as usize;
        let launches = long.max(case.sets()).clamp(1, MAX_LAUNCHES);
        let (mut warm, mut n) = (0.0, 0);
        while n < 3 || (warm < WARM_UP_MS && n < MAX_LAUNCHES) {
            warm += launch(launches)?;
            n += 1;
        }
        let sample = |_| Ok(launch(launches)? / launches as f64);
        let samples = (0..self.o.repeats).map(sample).collect::<crate::backend::Result<_>>()?;
        Ok((Summary::of(samples), launches))
    }
}
