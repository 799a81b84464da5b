//! The command-line form of a spec's structs: `disk.img,format=raw,readonly`.
//!
//! ```text
//! text   = item { "," item }
//! item   = key | key "=" value | value      (a lone value only in the first place)
//! value  = plain text without ","  |  '"' any text, with \" and \\ '"'
//! ```
//!
//! It is a serde format: what a struct takes in TOML or JSON it takes here, with the same names.
//!
//! | the type wants | the text has |
//! | --- | --- |
//! | a struct | items; the first may be the value of the first field alone |
//! | an enum | the variant's name first, then its content: `user,forward=2222:22`; `tap=NAME` gives the content's first field its value |
//! | a list | the same key several times |
//! | a bool | the key alone, or `key=true`, `on`, `yes`, `false`, `off`, `no` |
//! | a number | decimal, or hexadecimal after `0x` |

mod items;
mod reader;

use std::fmt;

use serde::de::{self, Deserialize, Unexpected};

/// Why a text could not be read; says the text, the word that is wrong, and what it could be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self(unknown("key", field, expected))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self(unknown("value", variant, expected))
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("'{field}' is missing: add {field}=..."))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self(format!("'{field}' is given twice"))
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        match unexpected {
            Unexpected::Str(text) => Self(format!("'{text}' is not {expected}")),
            other => Self(format!("expected {expected}, not {other}")),
        }
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(unexpected, expected)
    }
}

/// The message for a word that is none of `known`, with the nearest one where it looks like a
/// slip of the fingers.
fn unknown(kind: &str, word: &str, known: &[&str]) -> String {
    let list = known.join(", ");
    let near = known
        .iter()
        .map(|name| (distance(word, name), *name))
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3))
        .min();
    match near {
        Some((_, name)) => format!("unknown {kind} '{word}', did you mean '{name}'? Known: {list}"),
        None => format!("unknown {kind} '{word}'. Known: {list}"),
    }
}

/// The least number of inserted, removed or changed characters that make `a` from `b`.
fn distance(a: &str, b: &str) -> usize {
    // Words of the command line: bound the work, far words need no exact answer.
    let (a, b): (Vec<char>, Vec<char>) =
        (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Reads a value of any serde type from its command-line form.
///
/// # Errors
/// The text is not well formed, or the type does not take it.
pub fn from_str<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, Error> {
    let items = items::split(text)?;
    T::deserialize(reader::Text { items: &items })
}

#[cfg(test)]
mod tests;
