//! Reads keys: never from the configuration itself, always from a file or an environment variable that it names.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use secrecy::zeroize::Zeroizing;
use serde_json::Value;

use super::Config;
use super::problem::{Wrong, wrong};
use super::reader::{Reader, list};
use super::values;
use crate::account::{ApiKey, LONGEST_KEY};

/// More than any key, certificate bundle or configuration has, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// An account's key and where it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The key itself.
    pub key: ApiKey,
    /// Where it was read.
    pub source: KeySource,
}

/// Where a key was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// `{ file: PATH }`: the file's content without the white space around it.
    File(PathBuf),
    /// `{ env: NAME }`: the environment variable's value without the white space around it.
    Env(String),
}

/// Every key and token read so far, and where it stands: each is whose it is, so that none may stand twice.
pub(super) type KnownKeys = HashMap<ApiKey, String>;

/// Reads the list of keys `name`.
pub(super) fn keys(reader: &mut Reader<'_>, name: &'static str) -> Vec<Key> {
    let items = reader.nullable(name, list).unwrap_or_default();
    if items.is_empty() && reader.sound(&["", name]) {
        let fix = r#"name at least one, e.g. [{ file: "/run/secrets/key" }]"#;
        reader.problem(name, "has no key", fix);
    }
    let path = reader.path(name);
    let keys = items
        .iter()
        .enumerate()
        .map(|(index, item)| secret(reader, format!("{path}[{index}]"), item, unique));
    keys.flatten().collect()
}

/// Reads the one secret `name`, which has to be there.
pub(super) fn one(reader: &mut Reader<'_>, name: &'static str) -> Option<Key> {
    let item = reader.nullable(name, Ok);
    if item.is_none() && reader.sound(&["", name]) {
        reader.problem(name, "is missing", "write { file: PATH } or { env: NAME }");
    }
    let path = reader.path(name);
    secret(reader, path, item?, unique)
}

/// Reads the one secret `name`, if it is there: it lets us in elsewhere, and may be the same as another.
pub(super) fn optional(reader: &mut Reader<'_>, name: &'static str) -> Option<Key> {
    let item = reader.nullable(name, Ok)?;
    let path = reader.path(name);
    secret(reader, path, item, key)
}

fn secret<'a>(
    reader: &mut Reader<'a>,
    path: String,
    item: &'a Value,
    read: fn(&mut Reader<'a>) -> Option<Key>,
) -> Option<Key> {
    if item.is_string() || item.is_number() {
        const WHAT: &str = "a key as plain text: keys are never written into the config";
        const FIX: &str = "put it in a file or an environment variable and write { file: PATH } or { env: NAME }";
        reader.within(path, None, |reader| reader.problem("", WHAT, FIX));
        return None;
    }
    reader.within(path, Some(item), read)
}

/// Reads a [`key`] that stands nowhere else.
fn unique(reader: &mut Reader<'_>) -> Option<Key> {
    let read = key(reader)?;
    if let Some(other) = reader.keys.get(&read.key) {
        let what = format!("is the same key as {other}");
        reader.problem("", what, "list each key once");
        return None;
    }
    let path = reader.path("");
    reader.keys.insert(read.key.clone(), path);
    Some(read)
}

/// Reads one key: `{ file: PATH }` or `{ env: NAME }`.
fn key(reader: &mut Reader<'_>) -> Option<Key> {
    reader.hide_names();
    let file = reader.nullable("file", |value| values::text(value, "/run/secrets/key"));
    let env = reader.nullable("env", |value| values::text(value, "CRUN_KEY"));
    let sound = reader.sound(&["", "file", "env"]);
    let (name, source, read) = match (file, env) {
        (Some(file), None) => {
            let (path, source) = (Path::new(file), KeySource::File(file.into()));
            if let Some(running) = keeps(reader.running, path) {
                let kept = kept(running.keys().find(|key| key.source == source));
                return kept.map_err(|wrong| reader.refuse("file", wrong)).ok();
            }
            ("file", source, read_file(path))
        }
        (None, Some(env)) => {
            let value = (reader.env)(env).map_or_else(
                || wrong("that environment variable is not set", "set it, or correct the name"),
                |value| Ok(value.into_bytes()),
            );
            ("env", KeySource::Env(env.to_owned()), value)
        }
        (Some(_), Some(_)) => {
            reader.problem("", "has both `file` and `env`", "keep one of the two");
            return None;
        }
        (None, None) => {
            if sound {
                let fix = "write { file: PATH } or { env: NAME }";
                reader.problem("", "has neither `file` nor `env`", fix);
            }
            return None;
        }
    };
    let key = read
        .map(Zeroizing::new)
        .and_then(|bytes| sendable(&bytes))
        .map_err(|wrong| reader.refuse(name, wrong))
        .ok()?;
    Some(Key { key, source })
}

fn sendable(bytes: &[u8]) -> Result<ApiKey, Wrong> {
    let key = bytes.trim_ascii();
    if key.is_empty() {
        return wrong("the key is empty", "put the key in");
    }
    if key.len() > LONGEST_KEY {
        let what = format!("the key is longer than {LONGEST_KEY} characters");
        return wrong(what, "put the key alone in");
    }
    let key = std::str::from_utf8(key).ok().and_then(ApiKey::new);
    key.map_or_else(
        || {
            let what = "the key has a character that a header cannot carry";
            wrong(what, "keep the key alone, on one line, in visible ASCII")
        },
        Ok,
    )
}

/// Whether a file can be read more than once: a pipe gives all it has at the start; opened again it is empty, or never ends.
pub fn may_be_read_anew(path: &Path) -> bool {
    // What is wrong with a folder, or a file that is gone, whoever reads it says.
    path.metadata().map_or(true, |is| is.is_file() || is.is_dir())
}

/// What a process runs with, if what was read from `path` stays as it is there.
pub(super) fn keeps<'a>(running: Option<&'a Config>, path: &Path) -> Option<&'a Config> {
    running.filter(|_| !may_be_read_anew(path))
}

/// What was read at the start, if it was.
pub(super) fn kept<T: Clone>(read: Option<&T>) -> Result<T, Wrong> {
    let what = "is no regular file, and such a one is read at the start only";
    read.cloned()
        .map_or_else(|| wrong(what, "name a regular file, or restart"), Ok)
}

/// The bytes of a file that the configuration names.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, Wrong> {
    let read = || -> io::Result<Vec<u8>> {
        // Room for any key, so that reading one leaves no copy behind in memory that was outgrown.
        let mut bytes = Vec::with_capacity(16 << 10);
        File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) if bytes.len() as u64 > MAX_FILE => wrong("the file is larger than 4MiB", "name another file"),
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            wrong("there is no such file", "create it, or correct the path")
        }
        Err(error) => wrong(
            format!("the file cannot be read ({error})"),
            "correct the path or the permissions",
        ),
    }
}
