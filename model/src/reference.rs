//! The users' reference of the spec, made from its structs: `docs/spec.md`.
//!
//! The structs' doc comments and serde attributes become a JSON schema, the schema becomes the
//! page. A test holds the page against the structs; `cargo xtask docs` writes it anew.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::spec::MachineSpec;

const HEAD: &str = "\
# The machine's spec

<!-- Made from model/src/spec.rs by `cargo xtask docs`: change it there. -->

A machine is described by one spec. It is a file for `lodge run --spec FILE.toml`, printed by
`lodge run --print-spec`; each key is also a flag of `lodge run` (`lodge run --help`). An
unknown key is an error.

```toml
name = \"web\"
cpus = 2
memory = \"2G\"
console = \"stdio\"                 # or { file = \"web.log\" }

[boot]
kernel = \"vmlinuz\"
initrd = \"initrd.img\"
cmdline = \"root=LABEL=lodge-root console=ttyS0\"

[[disks]]
path = \"web.qcow2\"

[[nets]]
user = { forward = [\"2222:22\"] }

[[nets]]
tap = { name = \"tap0\" }
```

A size is a whole number and a unit, a power of 1024: `K`, `M`, `G`, `T` (or `KiB`, ...); no unit
means bytes. On the command line a struct is `key=value,key=value`: its first key may be left
out, a yes is the key alone, a list is the key several times, and a value with a comma in it
stands between double quotes.
";

/// The page's text.
pub fn markdown() -> String {
    let schema = schemars::schema_for!(MachineSpec);
    let root = schema.as_value();
    let mut page = Page { text: HEAD.into() };
    page.section("The machine", root);
    let definitions = root.get("$defs").and_then(Value::as_object);
    for (name, definition) in definitions.into_iter().flatten() {
        page.section(name, definition);
    }
    page.text
}

struct Page {
    text: String,
}

impl Page {
    fn section(&mut self, name: &str, schema: &Value) {
        self.line(&format!("\n## {name}\n"));
        if let Some(about) = description(schema) {
            self.line(&format!("{}\n", about.replace("\n\n", "\n")));
        }
        if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
            let required = schema.get("required").and_then(Value::as_array);
            self.line("| key | value | default | meaning |\n| --- | --- | --- | --- |");
            for (key, property) in properties {
                let must = required.is_some_and(|list| list.iter().any(|item| item == key));
                self.row(key, property, must);
            }
        } else if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
            self.line("| value | meaning |\n| --- | --- |");
            for variant in variants {
                let about = cell(description(variant).unwrap_or_default());
                self.line(&format!("| {} | {about} |", variant_form(variant)));
            }
        }
    }

    fn row(&mut self, key: &str, property: &Value, must: bool) {
        let default = match property.get("default") {
            _ if must => "must be given".into(),
            Some(Value::Bool(yes)) => if *yes { "yes" } else { "no" }.into(),
            None if property.get("type").is_some_and(|kind| kind == "boolean") => "no".into(),
            None | Some(Value::Null) => "none".into(),
            Some(Value::Array(list)) if list.is_empty() => "none".into(),
            Some(Value::Object(_)) => "see there".into(),
            Some(value) => format!("`{}`", plain(value)),
        };
        let about = cell(description(property).unwrap_or_default());
        self.line(&format!("| `{key}` | {} | {default} | {about} |", kind(property)));
    }

    fn line(&mut self, line: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}

fn description(schema: &Value) -> Option<&str> {
    schema.get("description").and_then(Value::as_str)
}

/// A text as one cell of a table: no line breaks, no bars.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// A JSON value as TOML would have it, a text without quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What a variant of an enum looks like in a spec.
fn variant_form(variant: &Value) -> String {
    if let Some(name) = variant.get("const").and_then(Value::as_str) {
        return format!("`{name}`");
    }
    let properties = variant.get("properties").and_then(Value::as_object);
    match properties.and_then(|properties: &Map<_, _>| properties.iter().next()) {
        Some((name, content)) => format!("`{name}` = {}", kind(content)),
        None => kind(variant),
    }
}

/// What a value is, in a word or two, with a link where it is a struct or an enum.
fn kind(schema: &Value) -> String {
    let text = |key: &str| schema.get(key).and_then(Value::as_str);
    if let Some(reference) = text("$ref") {
        let name = reference.rsplit('/').next().unwrap_or(reference);
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(title) = text("title") {
        return title.to_owned();
    }
    for key in ["anyOf", "allOf"] {
        let options = schema.get(key).and_then(Value::as_array);
        let not_null = |option: &&Value| option.get("type").is_none_or(|kind| kind != "null");
        if let Some(option) = options.and_then(|options| options.iter().find(not_null)) {
            return kind(option);
        }
    }
    let name = match schema.get("type") {
        Some(Value::String(name)) => name,
        // `["string", "null"]`: an optional value.
        Some(Value::Array(names)) => names.first().and_then(Value::as_str).unwrap_or("value"),
        _ => "value",
    };
    match name {
        "string" => "text".into(),
        "integer" => "number".into(),
        "boolean" => "yes or no".into(),
        "object" => "keys".into(),
        "array" => {
            let item = schema.get("items").map_or_else(|| "value".into(), kind);
            format!("list of {item}")
        }
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_the_docs_is_fresh() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/spec.md");
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(page == markdown(), "docs/spec.md is stale: run `cargo xtask docs`");
    }

    #[test]
    fn every_field_and_value_has_a_meaning() {
        for line in markdown().lines().filter(|line| line.starts_with('|')) {
            assert!(!line.contains("|  |"), "no text in: {line}");
        }
        let page = markdown();
        for key in ["`cpus`", "`readonly`", "`forward`", "`stdio`", "`qcow2`", "`cmdline`"] {
            assert!(page.contains(key), "{key}");
        }
    }

    #[test]
    fn the_example_is_a_spec() {
        let example = HEAD.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        let spec = MachineSpec::from_toml(example).unwrap();
        assert_eq!(spec.nets.len(), 2);
    }
}
