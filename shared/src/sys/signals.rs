//! Signal dispositions. Only "ignore" and "default": a handler of our own would run anywhere.

use anyhow::{Context, Result};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Ignores these signals in the whole process; what is pending of them is discarded.
pub fn ignore(signals: &[Signal]) -> Result<()> {
    set(signals, SigHandler::SigIgn)
}

/// Gives these signals their default effect back.
pub fn restore(signals: &[Signal]) -> Result<()> {
    set(signals, SigHandler::SigDfl)
}

fn set(signals: &[Signal], handler: SigHandler) -> Result<()> {
    for signal_number in signals {
        // SAFETY: neither SIG_IGN nor SIG_DFL runs code of this process.
        unsafe { signal(*signal_number, handler) }
            .with_context(|| format!("failed to set what {signal_number} does"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_does_nothing() {
        ignore(&[Signal::SIGWINCH, Signal::SIGUSR2]).unwrap();
        nix::sys::signal::raise(Signal::SIGUSR2).unwrap();
        restore(&[Signal::SIGWINCH, Signal::SIGUSR2]).unwrap();
    }
}
