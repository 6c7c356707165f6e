//! `tidy-exceptions.toml`: what may be longer than the limits, by how much, and why.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// The list of exceptions.
#[derive(Debug, Default)]
pub(super) struct Exceptions {
    files: BTreeMap<String, usize>,
    functions: BTreeMap<(String, String), usize>,
}

impl Exceptions {
    /// Reads the list at `path`.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Parses `[[file]]` entries (`path`, `lines`, `why`) and `[[function]]` entries (`name` too).
    pub(super) fn parse(text: &str) -> Result<Self> {
        let table: toml::Table = text.parse()?;
        let mut exceptions = Self::default();
        for (kind, entries) in &table {
            let entries = entries.as_array().with_context(|| format!("{kind} is not a list"))?;
            for entry in entries {
                exceptions.add(kind, entry)?;
            }
        }
        Ok(exceptions)
    }

    fn add(&mut self, kind: &str, entry: &toml::Value) -> Result<()> {
        let text = |key: &str| {
            let value = entry.get(key).and_then(toml::Value::as_str);
            let value = value.with_context(|| format!("a {kind} without {key}: {entry}"))?;
            Ok::<_, anyhow::Error>(value.to_owned())
        };
        let lines = entry.get("lines").and_then(toml::Value::as_integer);
        let lines = lines.and_then(|lines| usize::try_from(lines).ok());
        let lines = lines.with_context(|| format!("a {kind} without lines: {entry}"))?;
        let path = text("path")?;
        text("why")?;
        let replaced = match kind {
            "file" => self.files.insert(path, lines),
            "function" => self.functions.insert((path, text("name")?), lines),
            _ => bail!("unknown list {kind}: there are file and function"),
        };
        if replaced.is_some() {
            bail!("listed twice: {entry}");
        }
        Ok(())
    }

    /// The lines allowed for a file, if it is an exception.
    pub(super) fn file_lines(&self, file: &str) -> Option<usize> {
        self.files.get(file).copied()
    }

    /// The lines allowed for a function, if it is an exception.
    pub(super) fn function_lines(&self, file: &str, function: &str) -> Option<usize> {
        self.functions.get(&(file.to_owned(), function.to_owned())).copied()
    }

    /// Entries for what is no longer there.
    pub(super) fn unknown(
        &self,
        has_file: impl Fn(&str) -> bool,
        has_function: impl Fn(&str, &str) -> bool,
    ) -> Vec<String> {
        let files = self.files.keys().filter(|file| !has_file(file)).cloned();
        let functions = self
            .functions
            .keys()
            .filter(|(file, function)| !has_function(file, function))
            .map(|(file, function)| format!("fn {function} in {file}"));
        files.chain(functions).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_need_a_reason_and_a_number() {
        for text in [
            "[[file]]\npath = \"a\"\nlines = 1\n",
            "[[file]]\npath = \"a\"\nwhy = \"b\"\n",
            "[[file]]\nlines = 1\nwhy = \"b\"\n",
            "[[function]]\npath = \"a\"\nlines = 1\nwhy = \"b\"\n",
            "[[other]]\npath = \"a\"\nlines = 1\nwhy = \"b\"\n",
            "[[file]]\npath = \"a\"\nlines = 1\nwhy = \"b\"\n\
             [[file]]\npath = \"a\"\nlines = 2\nwhy = \"b\"\n",
        ] {
            assert!(Exceptions::parse(text).is_err(), "{text}");
        }
        assert!(Exceptions::parse("").is_ok());
    }
}
