//! The text cut into items, with quotes undone.

use super::Error;

/// `key=value`, `key` or a lone value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// The text before the first `=` outside of quotes; `None` where the item began with a quote.
    pub key: Option<String>,
    pub value: Option<String>,
}

impl Item {
    /// The item as one text, `=` and all.
    pub fn whole(&self) -> String {
        match (&self.key, &self.value) {
            (Some(key), Some(value)) => format!("{key}={value}"),
            (Some(text), None) | (None, Some(text)) => text.clone(),
            (None, None) => String::new(),
        }
    }

    pub fn key(&self) -> Result<&str, Error> {
        match &self.key {
            Some(key) if !key.is_empty() => Ok(key),
            Some(_) => Err(Error("there is an empty item: remove the comma too many".into())),
            None => Err(Error(format!("\"{}\" stands where a key is expected", self.whole()))),
        }
    }
}

/// Cuts the whole text.
pub fn split(text: &str) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    let mut rest = text;
    loop {
        let item;
        (item, rest) = split_item(rest)?;
        items.push(item);
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None if rest.is_empty() => return Ok(items),
            None => return Err(Error(format!("expected ',' after a quoted value, not '{rest}'"))),
        }
    }
}

/// The first item of `text`, and what follows it.
fn split_item(text: &str) -> Result<(Item, &str), Error> {
    if text.starts_with('"') {
        let (value, rest) = quoted(text)?;
        return Ok((Item { key: None, value: Some(value) }, rest));
    }
    let end = text.find([',', '=']).unwrap_or(text.len());
    let (key, rest) = text.split_at(end);
    let key = Some(key.to_owned());
    match rest.strip_prefix('=') {
        None => Ok((Item { key, value: None }, rest)),
        Some(rest) if rest.starts_with('"') => {
            let (value, rest) = quoted(rest)?;
            Ok((Item { key, value: Some(value) }, rest))
        }
        Some(rest) => {
            let (value, rest) = rest.split_at(rest.find(',').unwrap_or(rest.len()));
            Ok((Item { key, value: Some(value.to_owned()) }, rest))
        }
    }
}

/// The content of the quoted text at the start of `text`, and what follows it.
fn quoted(text: &str) -> Result<(String, &str), Error> {
    let mut value = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, c @ ('"' | '\\'))) => value.push(c),
                Some((_, c)) => value.extend(['\\', c]),
                None => break,
            },
            c => value.push(c),
        }
    }
    Err(Error(format!("the quote in {text} does not end: add '\"'")))
}
