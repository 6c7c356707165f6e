//! Progress of long work: a bar with rate and time left for whoever watches, nothing for scripts.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use target_daemon::size::format_size;

use crate::output::Output;
use crate::view::duration_text;

/// Columns of the bar itself.
const BAR: &str = "{bar:30} {msg}";

/// How much of something is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    /// Bytes copied.
    pub(crate) copied_bytes: u64,
    /// Bytes to copy in all, as far as is known; 0: not known.
    pub(crate) total_bytes: u64,
    /// How fast it goes at present.
    pub(crate) bytes_per_second: u64,
}

impl Done {
    /// The sum of two.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            copied_bytes: self.copied_bytes.saturating_add(other.copied_bytes),
            total_bytes: self.total_bytes.saturating_add(other.total_bytes),
            bytes_per_second: self.bytes_per_second.saturating_add(other.bytes_per_second),
        }
    }

    /// `1 GiB of 4 GiB, 80 MiB/s, 38 s left`, or nothing if nothing is known.
    pub(crate) fn text(self) -> String {
        if self.total_bytes == 0 {
            return String::new();
        }
        let left = self.total_bytes.saturating_sub(self.copied_bytes);
        let time = left.checked_div(self.bytes_per_second).map_or_else(
            || "standing still".to_owned(),
            |seconds| format!("{} left", duration_text(seconds.saturating_mul(1000))),
        );
        format!(
            "{} of {}, {}/s, {time}",
            format_size(self.copied_bytes),
            format_size(self.total_bytes),
            format_size(self.bytes_per_second)
        )
    }
}

/// A bar on standard error, if that is a terminal and the answer is not JSON. Gone when dropped.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    told: String,
}

impl Progress {
    pub(crate) fn new(output: &Output) -> Self {
        let watched = !output.json && std::io::stderr().is_terminal();
        let bar = watched.then(|| {
            let style = ProgressStyle::with_template(BAR).expect("the template is well-formed");
            ProgressBar::new(0).with_style(style)
        });
        Self { bar, told: String::new() }
    }

    /// Shows what is waited for, and how far it is. Without a terminal, each new `what` is a line.
    pub(crate) fn show(&mut self, output: &Output, what: &str, done: Done) {
        if let Some(bar) = &self.bar {
            bar.set_length(done.total_bytes);
            bar.set_position(done.copied_bytes);
            let text = done.text();
            let gap = if text.is_empty() { "" } else { ": " };
            bar.set_message(format!("{what}{gap}{text}"));
        } else if !output.json && self.told != what {
            output.note(what);
        }
        what.clone_into(&mut self.told);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left() {
        let done = Done { copied_bytes: 1 << 30, total_bytes: 4 << 30, bytes_per_second: 1 << 20 };
        assert_eq!(done.text(), "1 GiB of 4 GiB, 1 MiB/s, 51 min 12 s left");
        let still = Done { bytes_per_second: 0, ..done };
        assert!(still.text().ends_with("standing still"));
        assert_eq!(Done::default().text(), "");
        assert_eq!(done.and(done).total_bytes, 8 << 30);
    }
}
