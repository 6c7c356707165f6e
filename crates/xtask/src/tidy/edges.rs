//! Which crate may use which: arrows point down only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// One workspace member's place in the layers.
struct Layer {
    /// Directory, relative to the repository.
    path: &'static str,
    /// The workspace members it may use.
    uses: &'static [&'static str],
    /// What its tests may use besides.
    tests_use: &'static [&'static str],
    /// Whether it is sans-I/O (L0, L1), with the lints that ban clocks, sockets and the like.
    sans_io: bool,
}

/// Everything that may be linked into the binaries.
const ALL_LIBRARIES: &[&str] =
    &["base", "nvme", "store", "volume", "node", "cluster", "ring", "vhost-blk", "shell"];

/// The diskless head runs the daemon's leases and speaks its API, without a pool.
const CLIENT_USES: &[&str] = &[
    "base",
    "nvme",
    "store",
    "volume",
    "node",
    "cluster",
    "ring",
    "vhost-blk",
    "shell",
    "target-daemon",
];

/// The layers, lowest first. To add an edge, argue for it in `docs/decisions/`.
const LAYERS: &[Layer] = &[
    Layer { path: "crates/base", uses: &[], tests_use: &[], sans_io: true },
    Layer { path: "crates/nvme", uses: &["base"], tests_use: &[], sans_io: true },
    Layer { path: "crates/store", uses: &["base"], tests_use: &[], sans_io: true },
    Layer { path: "crates/volume", uses: &["base"], tests_use: &[], sans_io: true },
    Layer {
        path: "crates/node",
        uses: &["base", "nvme", "store", "volume"],
        tests_use: &[],
        sans_io: true,
    },
    Layer { path: "crates/cluster", uses: &["base"], tests_use: &[], sans_io: false },
    Layer { path: "crates/ring", uses: &["base"], tests_use: &[], sans_io: false },
    Layer { path: "crates/vhost-blk", uses: &["base"], tests_use: &[], sans_io: false },
    Layer {
        path: "crates/shell",
        uses: &["base", "nvme", "store", "volume", "node", "ring", "vhost-blk"],
        tests_use: &[],
        sans_io: false,
    },
    Layer { path: "target-daemon", uses: ALL_LIBRARIES, tests_use: &[], sans_io: false },
    Layer { path: "client-initiator", uses: CLIENT_USES, tests_use: &[], sans_io: false },
    Layer { path: "crates/blkio-client", uses: &[], tests_use: &[], sans_io: false },
    Layer {
        path: "crates/sim",
        uses: &["base", "nvme", "store", "volume", "node", "cluster"],
        tests_use: &[],
        sans_io: false,
    },
    Layer { path: "crates/model", uses: &["base"], tests_use: &[], sans_io: false },
    Layer { path: "qemu-tests", uses: &["base", "blkio-client"], tests_use: &[], sans_io: false },
    Layer { path: "crates/xtask", uses: &[], tests_use: &[], sans_io: false },
];

/// Where `unsafe` is allowed, and so the workspace's lints are written out.
const OWN_LINTS: &[&str] = super::UNSAFE_CRATES;

/// The lints of the sans-I/O crates, which each of them links to.
const SANS_IO_LINTS: &str = "../sans-io.clippy.toml";

/// Reads a manifest.
pub(super) fn read_manifest(path: &Path) -> Result<toml::Table> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.parse().with_context(|| path.display().to_string())
}

/// Checks every member's manifest and lints.
pub(super) fn check(root: &Path, members: &[String], problems: &mut Vec<String>) -> Result<()> {
    let workspace = read_manifest(&root.join("Cargo.toml"))?;
    let unsafe_code = lookup(&workspace, &["workspace", "lints", "rust", "unsafe_code"]);
    if unsafe_code.and_then(toml::Value::as_str) != Some("forbid") {
        problems.push("Cargo.toml: workspace.lints.rust.unsafe_code is not \"forbid\"".to_owned());
    }

    let mut names = BTreeMap::new();
    let mut manifests = Vec::new();
    for member in members {
        let manifest = read_manifest(&root.join(member).join("Cargo.toml"))?;
        let name = lookup(&manifest, &["package", "name"]).and_then(toml::Value::as_str);
        let name = name.with_context(|| format!("{member}/Cargo.toml has no package.name"))?;
        names.insert(name.to_owned(), member.clone());
        manifests.push((member, manifest));
    }
    for (member, manifest) in &manifests {
        let Some(layer) = LAYERS.iter().find(|layer| layer.path == member.as_str()) else {
            problems.push(format!(
                "{member}: not in a layer; give it one in crates/xtask/src/tidy/edges.rs"
            ));
            continue;
        };
        let known = |name: &str| names.contains_key(name);
        problems.extend(wrong_edges(layer, manifest, known));
        problems.extend(wrong_lints(root, layer, manifest));
    }
    Ok(())
}

fn lookup<'a>(table: &'a toml::Table, keys: &[&str]) -> Option<&'a toml::Value> {
    let (first, rest) = keys.split_first()?;
    rest.iter().try_fold(table.get(*first)?, |value, key| value.get(*key))
}

/// Uses of workspace members that the layer does not allow.
fn wrong_edges(
    layer: &Layer,
    manifest: &toml::Table,
    is_member: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (section, for_tests) in
        [("dependencies", false), ("build-dependencies", false), ("dev-dependencies", true)]
    {
        for used in dependencies(manifest, section) {
            let allowed = layer.uses.contains(&used.as_str())
                || (for_tests && layer.tests_use.contains(&used.as_str()));
            if is_member(&used) && !allowed {
                wrong.push(format!(
                    "{}/Cargo.toml: {section} has {used}, which its layer may not use",
                    layer.path
                ));
            }
        }
    }
    wrong
}

/// The packages named in a section, in the target-specific forms of the section too.
fn dependencies(manifest: &toml::Table, section: &str) -> BTreeSet<String> {
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    let of_targets = targets.into_iter().flatten().filter_map(|(_, target)| target.get(section));
    manifest
        .get(section)
        .into_iter()
        .chain(of_targets)
        .filter_map(toml::Value::as_table)
        .flatten()
        .map(|(key, value)| {
            // `alias = { package = "name" }` uses `name`.
            let package = value.get("package").and_then(toml::Value::as_str);
            package.unwrap_or(key).to_owned()
        })
        .collect()
}

fn wrong_lints(root: &Path, layer: &Layer, manifest: &toml::Table) -> Vec<String> {
    let mut wrong = Vec::new();
    let inherits = lookup(manifest, &["lints", "workspace"]).and_then(toml::Value::as_bool);
    if inherits != Some(true) && !OWN_LINTS.contains(&layer.path) {
        wrong.push(format!("{}/Cargo.toml: no [lints] workspace = true", layer.path));
    }
    if layer.sans_io {
        let path = root.join(layer.path).join("clippy.toml");
        if fs::read_link(&path).ok().as_deref() != Some(Path::new(SANS_IO_LINTS)) {
            wrong.push(format!("{}/clippy.toml is not a link to {SANS_IO_LINTS}", layer.path));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Layer =
        Layer { path: "crates/node", uses: &["base"], tests_use: &["store"], sans_io: false };

    fn edges(manifest: &str) -> Vec<String> {
        let manifest: toml::Table = manifest.parse().expect("well-formed");
        wrong_edges(&NODE, &manifest, |name| ["base", "store", "ring"].contains(&name))
    }

    #[test]
    fn arrows_point_down_only() {
        let cases = [
            ("[dependencies]\nbase.workspace = true\nserde.workspace = true\n", 0),
            ("[dependencies]\nring.workspace = true\n", 1),
            ("[dependencies.ring]\nworkspace = true\n", 1),
            ("[dependencies]\nr = { package = \"ring\", path = \"../ring\" }\n", 1),
            ("[target.'cfg(unix)'.dependencies]\nring = { path = \"../ring\" }\n", 1),
            ("[build-dependencies]\nring.workspace = true\n", 1),
            ("[dev-dependencies]\nring.workspace = true\nstore.workspace = true\n", 1),
            ("[dependencies]\nstore.workspace = true\n", 1),
        ];
        for (manifest, expected) in cases {
            assert_eq!(edges(manifest).len(), expected, "{manifest}");
        }
    }

    #[test]
    fn layers_have_no_cycle() {
        let index =
            |name: &str| LAYERS.iter().position(|layer| layer.path.ends_with(name)).expect(name);
        for (at, layer) in LAYERS.iter().enumerate() {
            for used in layer.uses {
                assert!(index(used) < at, "{} uses {used}, which is not below it", layer.path);
            }
        }
    }
}
