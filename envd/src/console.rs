//! What a person at the serial console, or in the log of a test, reads. One line per event; nothing else writes there.

use std::error::Error;
use std::fmt::Arguments;
use std::io::Write as _;

/// Writes one line to standard error. `eprintln!` panics where nobody listens any more, which PID 1 must not.
pub(crate) fn write_line(line: Arguments<'_>) {
    let mut text = format!("envd: {line}\n").into_bytes();
    text.truncate(1024);
    std::io::stderr().write_all(&text).ok();
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// `say!("what happened: {error}")`
macro_rules! say {
    ($($arg:tt)*) => { $crate::console::write_line(format_args!($($arg)*)) };
}
pub(crate) use say;
