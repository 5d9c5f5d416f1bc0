//! Modules import only from lower rows, as drawn in `src/lib.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall fail")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// The map's rows, lowest first. A module may name (`crate::x`) only modules of lower rows, and itself.
static ROWS: LazyLock<Vec<Vec<&str>>> = LazyLock::new(|| {
    let map = include_str!("../src/lib.rs").split("//! ```").nth(1).unwrap();
    let rows = map
        .lines()
        .filter_map(|line| line.strip_prefix("//! ")?.split_once("   "));
    rows.map(|(modules, _)| modules.split_whitespace().collect())
        .rev()
        .collect()
});

/// Names that say where code was put, and not what it is.
const NO_NOUNS: &[&str] = &["utils", "util", "common", "types", "models", "helpers", "misc"];

fn row_of(module: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.contains(&module))
}

/// What is wrong with a file of `module`, which stands `depth` levels below the crate's root.
fn faults(module: &str, depth: usize, text: &str) -> Vec<String> {
    // The map itself, and the commands, may name everything.
    let is_above_all = ["lib", "main"].contains(&module);
    let Some(own) = row_of(module).or(is_above_all.then_some(ROWS.len())) else {
        return vec![format!("{module} stands in no row")];
    };
    let mut faults = Vec::new();
    if !text.starts_with("//!") && !text.starts_with("use ") {
        faults.push("opens without saying what it is for".to_owned());
    }
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    let code = text.lines().filter(is_code).collect::<Vec<_>>().join("\n");
    for used in code.split("crate::").skip(1) {
        let name: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if name.is_empty() {
            faults.push("names several modules at once: write crate::module".to_owned());
        } else if let Some(row) = row_of(&name)
            && name != module
            && row >= own
        {
            faults.push(format!("uses crate::{name}, which stands no lower"));
        }
    }
    // A module written within the file is one level further down.
    let of_the_file = code.split("\nmod tests {").next().unwrap_or_default();
    if of_the_file.contains(&"super::".repeat(depth)) {
        faults.push("leaves its module by way of super: write crate::module".to_owned());
    }
    faults
}

fn sources(folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.insert(path.clone(), fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn imports_point_downwards() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    sources(&root, &mut found);
    assert!(found.len() > 30, "the sources are there");
    let mut wrong = Vec::new();
    for module in ROWS.iter().flatten() {
        if !found.contains_key(&root.join(format!("{module}.rs"))) {
            wrong.push(format!("{module} is on the map, and nowhere else"));
        }
    }
    for (path, text) in &found {
        let relative = path.strip_prefix(&root).unwrap();
        let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        let stem = path.file_stem().unwrap().to_str().unwrap();
        if NO_NOUNS.contains(&stem) {
            wrong.push(format!("{}: {stem} says nothing", relative.display()));
        }
        wrong.extend(
            faults(module, relative.components().count(), text)
                .iter()
                .map(|fault| format!("{}: {fault}", relative.display())),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_planted_fault_is_found() {
    assert!(faults("budget", 1, "//! x\nuse crate::task::TaskId;\n").is_empty());
    assert_eq!(faults("budget", 1, "//! x\nuse crate::gateway::Gateway;\n").len(), 1);
    assert_eq!(
        faults("cache", 1, "//! x\nfn f(x: crate::flight::Leader) {}\n").len(),
        1
    );
    assert_eq!(faults("cache", 1, "//! x\nuse crate::{task, stored};\n").len(), 1);
    assert_eq!(faults("cache", 1, "fn f() {}\n").len(), 1);
    assert_eq!(faults("cache", 1, "//! x\nuse super::gateway::Gateway;\n").len(), 1);
    assert_eq!(
        faults("budget", 2, "//! x\nuse super::super::upstream::Pool;\n").len(),
        1
    );
    assert_eq!(faults("task", 1, "//! x\npub use super::{server::Server};\n").len(), 1);
    assert!(faults("budget", 2, "//! x\nuse super::Pace;\n").is_empty());
    assert!(faults("cache", 1, "//! x\nstruct X;\nmod tests {\n    use super::*;\n}\n").is_empty());
    assert_eq!(faults("elsewhere", 1, "//! x\n").len(), 1);
    assert!(faults("cache", 1, "//! x\n// crate::gateway keeps it\n").is_empty());
}
