//! What the compiler does not check: layering, lengths, docs and leftovers.
//!
//! The rules are in `CONTRIBUTING.md`; the exceptions in `crates/xtask/tidy-exceptions.toml`,
//! a list that may only shrink.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

mod citations;
mod edges;
mod exceptions;
mod lengths;
mod source;

use exceptions::Exceptions;
use source::Source;

/// Crates that may contain `unsafe`: each owns a kernel or guest interface, or is a binding.
const UNSAFE_CRATES: &[&str] = &["crates/ring", "crates/vhost-blk", "crates/blkio-client"];

/// Macros that must not be left behind.
const LEFTOVERS: &[&str] = &["todo", "unimplemented", "dbg"];

/// What a run found.
#[derive(Debug)]
pub(crate) struct Report {
    /// Rust files looked at.
    pub(crate) files: usize,
    /// Workspace members looked at.
    pub(crate) crates: usize,
    /// One line for each violation, with the place and what to do.
    pub(crate) problems: Vec<String>,
}

/// Checks the repository at `root`.
pub(crate) fn run(root: &Path) -> Result<Report> {
    let exceptions = Exceptions::read(&root.join("crates/xtask/tidy-exceptions.toml"))?;
    let members = members(root)?;
    let mut problems = Vec::new();
    edges::check(root, &members, &mut problems)?;

    let mut files = 0;
    let mut lengths = lengths::Lengths::default();
    let mut functions = citations::Functions::default();
    for member in &members {
        for path in rust_files(&root.join(member))? {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            let source = Source::new(&text);
            check_contents(member, &name, &text, &source, &mut problems);
            lengths.measure(&name, &text, &source);
            functions.read(&source);
            files += 1;
        }
    }
    lengths.check(&exceptions, &mut problems);
    let page = root.join(citations::PAGE);
    let page = fs::read_to_string(&page).with_context(|| page.display().to_string())?;
    functions.check(&page, &mut problems);
    Ok(Report { files, crates: members.len(), problems })
}

/// The workspace's members, relative to `root`, sorted.
fn members(root: &Path) -> Result<Vec<String>> {
    let manifest = edges::read_manifest(&root.join("Cargo.toml"))?;
    let listed = manifest
        .get("workspace")
        .and_then(|workspace| workspace.get("members"))
        .and_then(toml::Value::as_array)
        .context("Cargo.toml has no workspace.members")?;
    let mut members = Vec::new();
    for member in listed.iter().filter_map(toml::Value::as_str) {
        let Some(parent) = member.strip_suffix("/*") else {
            members.push(member.to_owned());
            continue;
        };
        for entry in fs::read_dir(root.join(parent))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let path = format!("{parent}/{name}");
            // crates/fuzz is a workspace of its own, on nightly.
            if name != "fuzz" && root.join(&path).join("Cargo.toml").exists() {
                members.push(path);
            }
        }
    }
    members.sort();
    Ok(members)
}

fn rust_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() && !path.ends_with("target") {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn check_contents(
    member: &str,
    name: &str,
    text: &str,
    source: &Source,
    problems: &mut Vec<String>,
) {
    if !text.trim_start().starts_with("//!") {
        problems.push(format!("{name}: does not start with a //! doc that says what it is for"));
    }
    for token in source.tokens() {
        if token.text == "unsafe" && !UNSAFE_CRATES.contains(&member) {
            problems.push(format!(
                "{name}:{}: unsafe code outside {}",
                token.line,
                UNSAFE_CRATES.join(" and ")
            ));
        }
        if LEFTOVERS.contains(&token.text) && source.follows(&token, '!') {
            problems.push(format!("{name}:{}: {}! left behind", token.line, token.text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems_of(member: &str, text: &str) -> Vec<String> {
        let mut problems = Vec::new();
        check_contents(member, "file.rs", text, &Source::new(text), &mut problems);
        problems
    }

    #[test]
    fn a_clean_file_has_no_problems() {
        let text = "//! Doc.\n// todo!() unsafe\nconst S: &str = \"unsafe dbg!(1)\";\n";
        assert_eq!(problems_of("crates/base", text), Vec::<String>::new());
    }

    #[test]
    fn unsafe_is_for_two_crates_only() {
        let text = "//! Doc.\nfn f() { unsafe { g() } }\n";
        assert_eq!(problems_of("crates/ring", text).len(), 0);
        let found = problems_of("crates/store", text);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("file.rs:2: unsafe"), "{found:?}");
    }

    #[test]
    fn leftovers_and_missing_docs_are_found() {
        let text = "fn f() {\n    todo!()\n}\nfn g() { dbg!(1); unimplemented !() }\n";
        let found = problems_of("crates/base", text);
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found[1].starts_with("file.rs:2: todo!"), "{found:?}");
    }

    #[test]
    fn this_repository_is_walked() {
        let members = members(crate::repository_root()).expect("the root manifest is readable");
        assert!(members.contains(&"crates/base".to_owned()), "{members:?}");
        assert!(members.contains(&"qemu-tests".to_owned()), "{members:?}");
    }
}
