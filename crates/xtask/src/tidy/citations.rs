//! The failure model names the tests that prove it: every name must be that of a function.
//!
//! A name in backticks counts if it is one word of small letters with an underscore; `…` stands for what
//! was left out at its beginning or its end.

use std::collections::BTreeSet;

use super::source::Source;

/// The page that is checked, from the repository's root.
pub(super) const PAGE: &str = "docs/failure-model.md";

/// The functions of all files.
#[derive(Debug, Default)]
pub(super) struct Functions {
    names: BTreeSet<String>,
}

impl Functions {
    /// Takes in those of one file.
    pub(super) fn read(&mut self, source: &Source) {
        let mut is_next = false;
        for token in source.tokens() {
            if is_next {
                self.names.insert(token.text.to_owned());
            }
            is_next = token.text == "fn";
        }
    }

    fn has(&self, cited: &str) -> bool {
        let middle = cited.trim_matches('…');
        let fits = |name: &String| match (cited.starts_with('…'), cited.ends_with('…')) {
            (false, false) => name == middle,
            (false, true) => name.starts_with(middle),
            (true, false) => name.ends_with(middle),
            (true, true) => name.contains(middle),
        };
        self.names.iter().any(fits)
    }

    /// Names in `page` that are no function's, a line each.
    pub(super) fn check(&self, page: &str, problems: &mut Vec<String>) {
        for (number, line) in page.lines().enumerate() {
            for cited in line.split('`').skip(1).step_by(2).filter(|word| is_name(word)) {
                if !self.has(cited) {
                    let number = number + 1;
                    problems.push(format!("{PAGE}:{number}: there is no function `{cited}`"));
                }
            }
        }
    }
}

fn is_name(word: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '…');
    word.contains('_') && word.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_gone_are_found() {
        let mut functions = Functions::default();
        functions.read(&Source::new("fn a_pool_rots() {}\n// fn a_comment_only() {}\n"));
        let page = "| `a_pool_rots`, `a_pool…`, `…l_rots`, `…_pool_…`, `a::b_c`, `mend` |\n\
                    | `a_pool_rot`, `a_comment…`, `…_pool` |\n";
        let mut problems = Vec::new();
        functions.check(page, &mut problems);
        let expected = ["a_pool_rot", "a_comment…", "…_pool"]
            .map(|name| format!("docs/failure-model.md:2: there is no function `{name}`"));
        assert_eq!(problems, expected);
    }
}
