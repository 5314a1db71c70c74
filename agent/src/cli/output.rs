//! What is printed: text, tables, JSON, ages and sizes.

use std::io::{self, Write as _};

use serde::Serialize;

use super::CliError;

pub(super) fn print_json(answer: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(answer).map_err(io::Error::from)?;
    print(format_args!("{text}\n"))
}

/// Prints to standard output; `println!` would panic when the reader has gone.
pub(super) fn print(text: std::fmt::Arguments<'_>) -> Result<(), CliError> {
    io::stdout().write_fmt(text).map_err(CliError::from)
}

/// Prints rows in columns that are as wide as they must be.
pub(super) fn table<const N: usize>(rows: Vec<[String; N]>) -> Result<(), CliError> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        print(format_args!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end()))?;
    }
    Ok(())
}

pub(super) fn print_size(bytes: i64) -> Result<(), CliError> {
    print(format_args!("{} MiB\n", bytes.max(0).unsigned_abs().div_ceil(1 << 20)))
}

/// An age in its largest unit.
pub(super) fn age(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{}s", seconds.max(0)),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_in_the_largest_unit_that_says_something() {
        for (seconds, text) in [
            (-5, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7200, "2h"),
            (200_000, "2d"),
        ] {
            assert_eq!(age(seconds), text);
        }
    }
}
