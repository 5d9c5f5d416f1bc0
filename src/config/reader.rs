//! Walks the tree of a YAML file: knows where it is, which fields it was asked for, and collects problems.
//!
//! A getter always returns a value, the default where the file's own is missing or wrong, so that one pass finds every
//! problem. What the fields are is `fields`' business, what a value may look like is `values`'.

use std::collections::BTreeSet;
use std::mem;

use serde_json::{Map, Value};

use super::Config;
use super::problem::{Problem, Problems, Wrong, quotable, wrong};
use super::secret::KnownKeys;

/// How alike an unknown name and a known one must be (Jaro-Winkler, 0 to 1) for the one to be offered for the other.
const SIMILAR: f64 = 0.82;

/// Text to tree. Quoted numbers stay text; a duplicate key, a second document and YAML's own bombs are refused. What
/// `is_field` is named in an error; any other name may be a secret.
pub(super) fn tree(text: &str, is_field: &dyn Fn(&str) -> bool) -> Result<Value, Problem> {
    let options = serde_saphyr::options! {
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let field = error.location().filter(|at| at.line() > 0).map_or_else(
            || "the file".to_owned(),
            |at| format!("line {}, column {}", at.line(), at.column()),
        );
        Problem::new(field, not_yaml(&error, is_field))
    })
}

/// Says what the parser said, without any piece of the file that it may have quoted.
fn not_yaml(error: &serde_saphyr::Error, is_field: &dyn Fn(&str) -> bool) -> Wrong {
    use serde_saphyr::Error;

    let (what, fix) = if let Error::AliasError { error, .. } = error {
        return not_yaml(error, is_field);
    } else if let Error::DuplicateMappingKey { key, .. } = error {
        let field = key.as_ref().filter(|key| is_field(key));
        let field = field.map_or_else(|| "this field".to_owned(), |field| format!("`{field}`"));
        (format!("{field} is given twice"), "keep one of the two")
    } else if let Error::MultipleDocuments { .. } = error {
        ("a second YAML document begins here".to_owned(), "keep one document")
    } else if let Error::ExternalMessage { msg, .. } = error {
        (format!("not YAML ({msg})"), "correct the syntax")
    } else if let Error::NonFiniteFloat { .. } = error {
        ("not a finite number".to_owned(), "write a number, or quote a text")
    } else if let Error::Budget { .. } = error {
        ("too large or too deeply nested".to_owned(), "simplify the file")
    } else {
        ("YAML that no configuration is made of".to_owned(), "correct the syntax")
    };
    Wrong { what, fix: fix.into() }
}

/// The mapping that is being read.
#[derive(Default)]
struct Here<'a> {
    path: String,
    fields: Option<&'a Map<String, Value>>,
    asked: Vec<&'static str>,
    /// Whether a name that is unknown here may be a secret.
    secret: bool,
}

/// A name that nobody asked for, kept until every field is known.
struct Unknown {
    section: String,
    name: String,
    secret: bool,
    siblings: Vec<&'static str>,
}

/// A cursor over the tree.
pub(super) struct Reader<'a> {
    pub(super) env: &'a dyn Fn(&str) -> Option<String>,
    /// What the process runs with, where it is read anew.
    pub(super) running: Option<&'a Config>,
    pub(super) keys: KnownKeys,
    here: Here<'a>,
    problems: Vec<Problem>,
    unknown: Vec<Unknown>,
    known: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(env: &'a dyn Fn(&str) -> Option<String>, running: Option<&'a Config>) -> Self {
        Self {
            env,
            running,
            keys: KnownKeys::new(),
            here: Here::default(),
            problems: Vec::new(),
            unknown: Vec::new(),
            known: BTreeSet::new(),
        }
    }

    /// Reads the mapping `root`, which stands nowhere.
    pub(super) fn root<T>(&mut self, root: &'a Value, read: impl FnOnce(&mut Self) -> T) -> T {
        self.within(String::new(), Some(root), read)
    }

    /// Reads the mapping `name`; one that is missing or null is empty.
    pub(super) fn section<T>(&mut self, name: &'static str, read: impl FnOnce(&mut Self) -> T) -> T {
        let value = self.take(name);
        self.within(self.path(name), value, read)
    }

    /// Reads the mapping `name`; `None` when it is missing or null.
    pub(super) fn optional<T>(&mut self, name: &'static str, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let value = self.take(name).filter(|value| !value.is_null())?;
        Some(self.within(self.path(name), Some(value), read))
    }

    /// Reads each item of the list `name`, a mapping; a list that is missing or null is empty.
    pub(super) fn each<T>(&mut self, name: &'static str, mut read: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let path = self.path(name);
        let items = self.nullable(name, list).unwrap_or_default().iter().enumerate();
        items
            .map(|(index, item)| self.within(format!("{path}[{index}]"), Some(item), &mut read))
            .collect()
    }

    /// Reads one value by `check`. Null is as wrong as any other wrong value.
    pub(super) fn value<T>(
        &mut self,
        name: &'static str,
        default: T,
        check: impl FnOnce(&'a Value) -> Result<T, Wrong>,
    ) -> T {
        let Some(value) = self.take(name) else {
            return default;
        };
        let checked = if value.is_null() {
            wrong("is empty", "give it a value, or remove it for the default")
        } else {
            check(value)
        };
        checked.unwrap_or_else(|wrong| {
            self.refuse(name, wrong);
            default
        })
    }

    /// Reads each item of the list `name` by `check`. Null is wrong: an empty list and the default may differ.
    pub(super) fn list<T>(
        &mut self,
        name: &'static str,
        default: Vec<T>,
        check: impl Fn(&'a Value) -> Result<T, Wrong>,
    ) -> Vec<T> {
        let Some(items) = self.value(name, None, |value| list(value).map(Some)) else {
            return default;
        };
        let path = self.path(name);
        let checked = items.iter().enumerate().filter_map(|(index, item)| {
            check(item)
                .map_err(|wrong| self.problem_at(format!("{path}[{index}]"), wrong))
                .ok()
        });
        checked.collect()
    }

    /// Reads one value by `check`; missing or null is `None`.
    pub(super) fn nullable<T>(
        &mut self,
        name: &'static str,
        check: impl FnOnce(&'a Value) -> Result<T, Wrong>,
    ) -> Option<T> {
        let value = self.take(name).filter(|value| !value.is_null())?;
        check(value).map_err(|wrong| self.refuse(name, wrong)).ok()
    }

    /// The file's own value, which makes `name` a known field.
    fn take(&mut self, name: &'static str) -> Option<&'a Value> {
        self.here.asked.push(name);
        self.known.insert(without_indices(&self.path(name)));
        self.here.fields.and_then(|fields| fields.get(name))
    }

    /// Where `name` stands; where the mapping itself stands when `name` is empty.
    pub(super) fn path(&self, name: &str) -> String {
        let path = &self.here.path;
        match (path.is_empty(), name.is_empty()) {
            (true, _) => name.to_owned(),
            (false, true) => path.clone(),
            (false, false) => format!("{path}.{name}"),
        }
    }

    /// Notes that `name` here, or the mapping itself when `name` is empty, is wrong, and what to do.
    pub(super) fn problem(&mut self, name: &str, what: impl Into<String>, fix: impl Into<String>) {
        let (what, fix) = (what.into(), fix.into());
        self.refuse(name, Wrong { what, fix });
    }

    /// Notes what a check found wrong with `name` here.
    pub(super) fn refuse(&mut self, name: &str, wrong: Wrong) {
        self.problem_at(self.path(name), wrong);
    }

    /// Notes that what stands at `path` is wrong.
    fn problem_at(&mut self, path: impl Into<String>, wrong: Wrong) {
        self.problems.push(Problem::new(path, wrong));
    }

    /// Whether nothing was found wrong with any of `names` here; the mapping itself is the empty name.
    pub(super) fn sound(&self, names: &[&str]) -> bool {
        let paths: Vec<_> = names.iter().map(|name| self.path(name)).collect();
        !self.problems.iter().any(|problem| paths.contains(&problem.field))
    }

    /// From here on no unknown name of this mapping is quoted: it may be a secret.
    pub(super) fn hide_names(&mut self) {
        self.here.secret = true;
    }

    /// Notes that `fields` do not fit together, at the first of them, unless one of them is wrong by itself.
    pub(super) fn together(&mut self, fields: &[&str], fit: bool, what: impl Into<String>, fix: impl Into<String>) {
        if let (false, true, Some(field)) = (fit, self.sound(fields), fields.first()) {
            self.problem(field, what, fix);
        }
    }

    /// Reads the mapping that stands at `path`; names in it that `read` does not ask for are unknown.
    pub(super) fn within<T>(&mut self, path: String, value: Option<&'a Value>, read: impl FnOnce(&mut Self) -> T) -> T {
        let here = Here {
            path,
            fields: value.and_then(Value::as_object),
            ..Here::default()
        };
        let outer = mem::replace(&mut self.here, here);
        if let Some(value) = value.filter(|value| !value.is_null() && !value.is_object()) {
            let wrong = is_not(value, "a mapping of fields", "{}");
            let whole = self.here.path.is_empty();
            self.problem_at(if whole { "the file".to_owned() } else { self.path("") }, wrong);
        }
        let read = read(self);
        let here = mem::replace(&mut self.here, outer);
        let names = here.fields.into_iter().flat_map(Map::keys);
        self.unknown.extend(
            names
                .filter(|name| !here.asked.contains(&name.as_str()))
                .map(|name| Unknown {
                    section: here.path.clone(),
                    name: name.clone(),
                    secret: here.secret,
                    siblings: here.asked.clone(),
                }),
        );
        read
    }

    /// Every field that was asked for, as `accounts.keys.file`.
    pub(super) fn known(&self) -> &BTreeSet<String> {
        &self.known
    }

    /// All problems of `text`, when there is one.
    pub(super) fn finish(mut self, text: &str) -> Result<(), Problems> {
        for unknown in mem::take(&mut self.unknown) {
            let section = if unknown.section.is_empty() {
                String::new()
            } else {
                format!("{}.", unknown.section)
            };
            let quoted = quotable(&unknown.name).filter(|_| !unknown.secret);
            let name = quoted.unwrap_or("<unknown>");
            let line = line_of(&unknown.name, text).filter(|_| quoted.is_none());
            let wrong = Wrong {
                what: line.map_or_else(
                    || "no such field".to_owned(),
                    |line| format!("no such field, on line {line}"),
                ),
                fix: self.suggest(&unknown),
            };
            self.problems.push(Problem::new(format!("{section}{name}"), wrong));
        }
        Problems::none_or(self.problems)
    }

    fn suggest(&self, unknown: &Unknown) -> String {
        let elsewhere = |known: &&String| known.rsplit('.').next() == Some(&unknown.name);
        if let Some(elsewhere) = self.known.iter().find(elsewhere) {
            return format!("did you mean `{elsewhere}`?");
        }
        let likeness = |known: &str| strsim::jaro_winkler(known, &unknown.name.to_ascii_lowercase());
        let nearest = unknown
            .siblings
            .iter()
            .max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        if let Some(nearest) = nearest.filter(|nearest| likeness(nearest) >= SIMILAR) {
            return format!("did you mean `{nearest}`?");
        }
        format!("the fields here are {}", unknown.siblings.join(", "))
    }
}

/// A list.
pub(super) fn list(value: &Value) -> Result<&[Value], Wrong> {
    value
        .as_array()
        .map(Vec::as_slice)
        .ok_or_else(|| is_not(value, "a list", "[]"))
}

/// `value` should have been `wanted`, for example `example`.
pub(super) fn is_not(value: &Value, wanted: &str, example: &str) -> Wrong {
    let found = match value {
        Value::Null => "empty",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    };
    Wrong {
        what: format!("is {found}, not {wanted}"),
        fix: format!("write {wanted}, e.g. {example}"),
    }
}

/// The only line of `text` on which `name` is followed by a colon: where it stands, since the tree does not tell.
fn line_of(name: &str, text: &str) -> Option<usize> {
    let is_field = |line: &str| {
        line.match_indices(name).any(|(at, _)| {
            let (before, after) = (&line[..at], &line[at + name.len()..]);
            let begins = before
                .chars()
                .next_back()
                .is_none_or(|c| c.is_whitespace() || "{,'\"".contains(c));
            begins && after.trim_start_matches(['\'', '"']).trim_start().starts_with(':')
        })
    };
    let mut lines = (1..).zip(text.lines()).filter(|(_, line)| is_field(line));
    let (line, _) = lines.next()?;
    lines.next().is_none().then_some(line)
}

/// `accounts[1].keys[0].file` without the numbers.
fn without_indices(path: &str) -> String {
    path.split('[')
        .map(|part| part.split_once(']').map_or(part, |(_, rest)| rest))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn yaml_types_survive() {
        let text = "a: \"15\"\nb: 15\nc: null\nd: true\ne: yes\nf: 1.5\ng: -3\nh:\ni: 30s\nj: '~'\n";
        let expected = json!({
            "a": "15", "b": 15, "c": null, "d": true, "e": "yes", "f": 1.5, "g": -3, "h": null, "i": "30s", "j": "~",
        });
        let tree = |text| tree(text, &|_| false);
        assert_eq!(tree(text), Ok(expected));
        assert_eq!(tree(""), Ok(Value::Null));
        assert_eq!(tree("# nothing\n"), Ok(Value::Null));
    }

    #[test]
    fn broken_yaml_has_a_place() {
        let said = |text: &str| {
            tree(text, &|name| ["drain", "env"].contains(&name))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            said("drain: 3s\ndrain: 4s\n"),
            "line 2, column 1: `drain` is given twice: keep one of the two"
        );
        assert_eq!(
            said("accounts:\n- name: a\n  keys: [{ env: A, env: B }]\n"),
            "line 3, column 20: `env` is given twice: keep one of the two"
        );
        assert!(
            said("budget: {\n  limit: 15\n").starts_with("line "),
            "{}",
            said("budget: {\n  limit: 15\n")
        );
        assert!(said("a: [1\nb: 2\n").contains("not YAML ("));
        assert_eq!(
            said("a: 1\n---\nb: 1\n"),
            "line 3, column 1: a second YAML document begins here: keep one document"
        );
        assert!(said("ak_77secret: 1\nak_77secret: 2\n").contains("this field is given twice"));
        assert!(!said("a: !!int ak_77secret\n").contains("secret"));
        assert!(!said("a: &ak_77secret 1\nb: *ak_78secret\n").contains("secret"));
    }

    #[test]
    fn a_field_is_found_where_it_stands_and_nowhere_else() {
        let text = "# http2 is none\na: { http2: true, \"a b\": 1 }\nc:\n  - x.y : 1\nd: 1\ne: { d: 2 }\nxd: 3\n";
        for (name, line) in [("http2", 2), ("a b", 2), ("x.y", 4), ("xd", 7)] {
            assert_eq!(line_of(name, text), Some(line), "{name}");
        }
        for name in ["d", "http", "2", "nowhere"] {
            assert_eq!(line_of(name, text), None, "{name}");
        }
    }

    #[test]
    fn indices_are_no_names() {
        assert_eq!(without_indices("accounts[1].keys[0].file"), "accounts.keys.file");
        assert_eq!(without_indices("listen"), "listen");
    }
}
