//! What is wrong with a configuration, all of it at once.
//!
//! A problem never quotes a value of the file: a secret may have been pasted anywhere, and whoever reads the message has
//! the file at hand. Names of fields are quoted only where they look like names ([`quotable`]).

use std::fmt;

/// One thing that is wrong. Displayed as `<field>: <what>: <fix>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where: `accounts[1].keys[0].file`, or `line 3, column 5` when the file is not YAML.
    pub field: String,
    /// What is wrong with it.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

impl Problem {
    pub(super) fn new(field: impl Into<String>, wrong: Wrong) -> Self {
        Self {
            field: field.into(),
            what: wrong.what,
            fix: wrong.fix,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.field, self.what, self.fix)
    }
}

/// Why a configuration was refused: at least one problem. Displayed one per line; never contains a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// The problems, in the order in which the fields are read.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }

    pub(super) fn none_or(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Self(problems))
        }
    }
}

impl FromIterator<Problem> for Problems {
    fn from_iter<I: IntoIterator<Item = Problem>>(problems: I) -> Self {
        Self(problems.into_iter().collect())
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// What is wrong with a value and what to do, before it is known where the value stands.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) fix: String,
}

/// Shortens `Err(Wrong { … })`.
pub(super) fn wrong<T>(what: impl Into<String>, fix: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong {
        what: what.into(),
        fix: fix.into(),
    })
}

/// `name` as it may stand in a message: a word of letters, `_` and `-`, or nothing of it. Keys have digits.
pub(super) fn quotable(name: &str) -> Option<&str> {
    let word = (1..=32).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphabetic() || "_-".contains(c));
    word.then_some(name)
}
