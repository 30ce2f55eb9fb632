//! Device times between events.

use super::error::Said;
use crate::backend::Result;
use cudarc::driver::{CudaEvent, CudaStream, sys};
use std::cell::RefCell;

thread_local! {
    /// The start of a measurement whose first work is not on the stream yet.
    static START: RefCell<Option<CudaEvent>> = const { RefCell::new(None) };
    /// The same once it is there.
    static STARTED: RefCell<Option<CudaEvent>> = const { RefCell::new(None) };
}

/// Starts this thread's measurement, where one waits: work comes to `stream` now.
pub(super) fn begin(stream: &CudaStream) -> Result<()> {
    let Some(event) = START.take() else { return Ok(()) };
    event.record(stream).said("recording an event")?;
    STARTED.set(Some(event));
    Ok(())
}

/// Device milliseconds of what `f` records on `stream`, from its first work on: what the host does before that, such as
/// listing what is to be replayed, does not count.
pub(super) fn timed(stream: &CudaStream, f: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let event = || {
        stream
            .context()
            .new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))
            .said("creating an event")
    };
    let (start, end) = (event()?, event()?);
    START.set(Some(start));
    let outcome = f();
    let begun = begin(stream);
    let started = STARTED.take();
    outcome.and(begun)?;
    end.record(stream).said("recording an event")?;
    end.synchronize().said("waiting for the device")?;
    let Some(start) = started else { return Ok(0.0) };
    Ok(f64::from(start.elapsed_ms(&end).said("reading a time")?))
}
