//! Ctrl-C and SIGTERM: noted, so that the program can clean up; a second one ends it at once.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::common::program::Failure;

/// Which signal came.
#[derive(Clone)]
pub struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    pub fn listen() -> Result<Self, Failure> {
        let signal = Arc::new(AtomicUsize::new(0));
        let again = Arc::new(AtomicBool::new(false));
        for number in [SIGINT, SIGTERM] {
            // In this order: the first one finds the flag down and raises it.
            flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&again))
                .and_then(|_| flag::register(number, Arc::clone(&again)))
                .and_then(|_| flag::register_usize(number, Arc::clone(&signal), number as usize))
                .map_err(|error| Failure::User(format!("cannot listen for signals: {error}")))?;
        }
        Ok(Interrupt(signal))
    }

    /// The failure, once a signal came.
    pub fn failure(&self) -> Option<Failure> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(Failure::Interrupted(signal as u8)),
        }
    }

    pub fn flow(&self) -> ControlFlow<()> {
        if self.failure().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
