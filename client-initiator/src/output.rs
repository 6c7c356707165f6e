//! Results: tables for people, JSON for programs.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::exit::Failure;

/// How to answer.
pub(crate) struct Output {
    /// As JSON.
    pub(crate) json: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `text` makes.
    pub(crate) fn print<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        let line = if self.json {
            serde_json::to_string_pretty(value).expect("results are plain data with text keys")
        } else {
            text()
        };
        write_line(&mut std::io::stdout(), &line);
    }

    /// Like [`Output::print`], with the JSON on one line: for results that come one by one.
    pub(crate) fn print_line<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        let line = if self.json {
            serde_json::to_string(value).expect("results are plain data with text keys")
        } else {
            text()
        };
        write_line(&mut std::io::stdout(), &line);
    }

    /// Tells why the command failed.
    pub(crate) fn failure(&self, failure: &Failure) {
        let line = if self.json {
            let error = serde_json::json!({
                "error": { "code": failure.exit.name(), "message": failure.message }
            });
            error.to_string()
        } else {
            format!("holdfast: {}", failure.message)
        };
        write_line(&mut std::io::stderr(), &line);
    }

    /// Tells people something by the way, on standard error.
    pub(crate) fn note(&self, text: &str) {
        if !self.json {
            write_line(&mut std::io::stderr(), text);
        }
    }

    /// Shows progress in place, if somebody watches.
    pub(crate) fn progress(&self, text: &str) {
        let mut stderr = std::io::stderr();
        if !self.json && stderr.is_terminal() {
            drop(write!(stderr, "\r\x1b[2K{text}").and_then(|()| stderr.flush()));
        }
    }
}

/// A reader that went away is no failure of the command.
fn write_line(to: &mut dyn Write, line: &str) {
    drop(writeln!(to, "{line}").and_then(|()| to.flush()));
}

/// `rows` under `header`, in columns.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let lines: Vec<String> =
        std::iter::once(line(&header)).chain(rows.iter().map(|row| line(row))).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows =
            vec![vec!["long-name".to_owned(), "1".to_owned()], vec!["b".to_owned(), String::new()]];
        assert_eq!(table(&["NAME", "X"], &rows), "NAME       X\nlong-name  1\nb");
    }
}
