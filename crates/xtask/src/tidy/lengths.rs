//! File and function lengths, against the limits and the list of exceptions.

use std::collections::BTreeMap;

use super::exceptions::Exceptions;
use super::source::{Source, Token};

/// The longest file, in lines, without an exception.
pub(super) const FILE_LINES_MAX: usize = 800;

/// The longest function, in lines from `fn` to its closing brace, without an exception.
pub(super) const FUNCTION_LINES_MAX: usize = 70;

/// Lengths of everything that was measured.
#[derive(Debug, Default)]
pub(super) struct Lengths {
    files: BTreeMap<String, usize>,
    /// By file and name; of several functions with one name in a file, the longest.
    functions: BTreeMap<(String, String), usize>,
}

impl Lengths {
    /// Adds the file called `name`.
    pub(super) fn measure(&mut self, name: &str, text: &str, source: &Source) {
        self.files.insert(name.to_owned(), text.lines().count());
        for (function, lines) in functions(source) {
            let longest = self.functions.entry((name.to_owned(), function)).or_default();
            *longest = lines.max(*longest);
        }
    }

    /// Reports what is too long, and exceptions that are wider than what they excuse.
    pub(super) fn check(&self, exceptions: &Exceptions, problems: &mut Vec<String>) {
        for (file, &lines) in &self.files {
            let allowed = exceptions.file_lines(file);
            if let Some(problem) = judge(lines, FILE_LINES_MAX, allowed) {
                problems.push(format!("{file}: file {problem}"));
            }
        }
        for ((file, function), &lines) in &self.functions {
            let allowed = exceptions.function_lines(file, function);
            if let Some(problem) = judge(lines, FUNCTION_LINES_MAX, allowed) {
                problems.push(format!("{file}: fn {function} {problem}"));
            }
        }
        for unknown in exceptions.unknown(
            |file| self.files.contains_key(file),
            |file, function| self.functions.contains_key(&(file.to_owned(), function.to_owned())),
        ) {
            problems.push(format!("tidy-exceptions.toml: {unknown} does not exist, remove it"));
        }
    }
}

/// What is wrong with a length, if anything. The list of exceptions only shrinks: one that is
/// larger than it need be would let the next change grow into it.
fn judge(lines: usize, limit: usize, allowed: Option<usize>) -> Option<String> {
    match allowed {
        None if lines > limit => Some(format!("has {lines} lines, the limit is {limit}: split it")),
        Some(_) if lines <= limit => {
            Some(format!("has {lines} lines, within the limit: remove its exception"))
        }
        Some(allowed) if lines > allowed => {
            Some(format!("has {lines} lines, its exception says {allowed}: it may only shrink"))
        }
        Some(allowed) if lines < allowed => {
            Some(format!("has {lines} lines, its exception says {allowed}: lower it to {lines}"))
        }
        None | Some(_) => None,
    }
}

/// Every function with a body: its name and its length in lines.
fn functions(source: &Source) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    let mut function_line = None;
    for token in source.tokens() {
        if let Some(line) = function_line.take()
            && let Some(lines) = body_lines(source, &token, line)
        {
            found.push((token.text.to_owned(), lines));
        }
        // `fn name` is a function, `fn(` is a type.
        if token.text == "fn" && !source.follows(&token, '(') {
            function_line = Some(token.line);
        }
    }
    found
}

/// Lines from `first_line` to the brace that closes the body of the function called `name`.
fn body_lines(source: &Source, name: &Token<'_>, first_line: usize) -> Option<usize> {
    let mut line = name.line;
    let mut parentheses = 0_usize;
    let mut braces = 0_usize;
    for byte in &source.code().as_bytes()[name.end..] {
        match byte {
            b'\n' => line += 1,
            b'(' | b'[' => parentheses += 1,
            b')' | b']' => parentheses = parentheses.saturating_sub(1),
            // A declaration without a body; a `;` inside brackets is an array's length.
            b';' if parentheses == 0 && braces == 0 => return None,
            b'{' => braces += 1,
            b'}' => {
                braces = braces.saturating_sub(1);
                if braces == 0 && parentheses == 0 {
                    return Some(line - first_line + 1);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(text: &str) -> Vec<(String, usize)> {
        functions(&Source::new(text))
    }

    #[test]
    fn functions_are_measured_to_their_closing_brace() {
        let text = "fn a() {}\n\
                    fn b(x: [u8; 4]) -> [u8; 2]\nwhere\n    T: X,\n{\n    if x { y(\"}\") }\n}\n\
                    trait T { fn c(&self); fn d(&self) {\n} }\n\
                    const F: fn(u8) -> u8 = e;\n";
        let expected = [("a", 1), ("b", 6), ("d", 2)];
        let expected: Vec<_> = expected.iter().map(|&(name, n)| (name.to_owned(), n)).collect();
        assert_eq!(lengths(text), expected);
    }

    #[test]
    fn nested_functions_count_by_themselves_too() {
        let text = "fn outer() {\n    fn inner() {\n    }\n}\n";
        assert_eq!(lengths(text), [("outer".to_owned(), 4), ("inner".to_owned(), 2)]);
    }

    #[test]
    fn exceptions_only_shrink() {
        assert_eq!(judge(70, 70, None), None);
        assert!(judge(71, 70, None).is_some_and(|text| text.contains("split it")));
        assert_eq!(judge(90, 70, Some(90)), None);
        assert!(judge(91, 70, Some(90)).is_some_and(|text| text.contains("only shrink")));
        assert!(judge(89, 70, Some(90)).is_some_and(|text| text.contains("lower it to 89")));
        assert!(judge(70, 70, Some(90)).is_some_and(|text| text.contains("remove")));
    }

    #[test]
    fn an_exception_for_nothing_is_reported() {
        let exceptions = Exceptions::parse(
            "[[function]]\npath = \"a.rs\"\nname = \"gone\"\nlines = 80\nwhy = \"a table\"\n",
        )
        .expect("well-formed");
        let mut lengths = Lengths::default();
        lengths.measure("a.rs", "fn f() {}\n", &Source::new("fn f() {}\n"));
        let mut problems = Vec::new();
        lengths.check(&exceptions, &mut problems);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].contains("fn gone in a.rs does not exist"), "{problems:?}");
    }
}
