//! The users' reference of the spec, made from its structs: `docs/spec.md`.

/// The page's text.
pub fn markdown() -> String {
    String::new()
}
