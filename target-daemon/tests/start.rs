//! What `holdfastd` says and how it exits when it cannot start.

#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::path::Path;
use std::process::Command;

use cluster::{Create, SqliteStore};

const CONFIG: &str = "name = \"a\"\nstore = \"sqlite:DIR/c.db\"\nlisten = \"127.0.0.1:0\"\n\
                      api = \"DIR/api\"\n[pool]\nfast = [\"DIR/fast\"]\nmass = [\"DIR/mass\"]\n";

/// Runs it with this configuration; its exit status and what it said.
fn run(directory: &Path, config: &str, more: &[&str]) -> (i32, String) {
    let path = directory.join("h.toml");
    std::fs::write(&path, config.replace("DIR", directory.to_str().unwrap())).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_holdfastd"))
        .arg("--config")
        .arg(&path)
        .args(more)
        .env_remove("NOTIFY_SOCKET")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

#[test]
fn configurations_are_checked_before_use() {
    let directory = tempfile::tempdir().unwrap();
    let check = |config: &str| run(directory.path(), config, &["--check-config"]);
    let (status, text) = check(CONFIG);
    assert_eq!(status, 0, "{text}");
    let (status, text) = check(&format!("{CONFIG}\n[limit]\nbuffers = \"1G\"\n"));
    assert!(status == 2 && text.contains("h.toml:9: unknown field `limit`"), "{text}");
    let (status, text) = check(&CONFIG.replace("name = \"a\"", "name = 7"));
    assert!(status == 2 && text.contains("h.toml:1:"), "{text}");
    let (status, text) = check("name = \"a\"\n");
    assert!(status == 2 && text.contains("missing field"), "{text}");
    let bad = CONFIG.replace("sqlite:", "").replace("127.0.0.1:0", "here");
    let (status, text) = run(directory.path(), &bad, &[]);
    assert!(status == 2 && text.contains(":2: store:") && text.contains(":3: listen:"), "{text}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing was made");
}

#[test]
fn a_configuration_that_is_not_there() {
    let output = Command::new(env!("CARGO_BIN_EXE_holdfastd"))
        .args(["--config", "/no/such/file.toml"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("/no/such/file.toml"));
}

#[test]
fn stores_that_are_missing_or_newer_and_pools_that_are_none() {
    let directory = tempfile::tempdir().unwrap();
    let start = || run(directory.path(), CONFIG, &[]);
    let (status, text) = start();
    assert!(status == 1 && text.contains("no such store"), "{text}");
    let store = directory.path().join("c.db");
    drop(SqliteStore::open(&store, Create::IfMissing).unwrap());
    let (status, text) = start();
    assert!(status == 1 && text.contains("fast: No such file"), "{text}");
    std::fs::write(directory.path().join("fast"), vec![0; 1 << 20]).unwrap();
    let (status, text) = start();
    assert!(status == 1 && text.contains("holdfast pool format"), "{text}");
    std::fs::write(directory.path().join("fast"), vec![9; 1 << 20]).unwrap();
    let (status, text) = start();
    assert!(status == 1 && text.contains("not a Holdfast pool"), "{text}");
    // A store as a newer version would leave it: the schema version is at byte 60 of the header.
    let mut bytes = std::fs::read(&store).unwrap();
    bytes[60..64].copy_from_slice(&99_u32.to_be_bytes());
    std::fs::write(&store, &bytes).unwrap();
    let (status, text) = start();
    assert!(status == 1 && text.contains("newer version of Holdfast (schema 99"), "{text}");
    assert_eq!(std::fs::read(&store).unwrap(), bytes, "left alone");
}
