//! `cargo xtask reference`: `docs/api.md`, the API's reference, from the `.proto` files and their comments.
//!
//! Holds: what it writes depends on those files alone, so that a test can tell whether the page is theirs. Reads the part of the language
//! that they use, and refuses the rest by line; and so it does what has no comment, but for messages without fields.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::cache;

/// The files, in the order of the page.
const PROTOS: [&str; 2] = ["agent/proto/hostagent.proto", "agent/proto/roost.proto"];
const PAGE: &str = "docs/api.md";

const HEAD: &str = "\
# API reference

Made of the `.proto` files by `cargo xtask reference`; change their comments, not this page. [Examples by curl](../agent/proto/README.md).

A call is a `POST` to `/<service>/<call>` at port 50051, with a client certificate: Connect, gRPC or gRPC-Web, protobuf or JSON. In JSON a field
`memory_mb` is `memoryMb`, 64-bit numbers are strings, bytes are base64, and what is zero or empty may be left out. Errors are Connect's, with its
codes: `invalid_argument`, `not_found`, `already_exists`, `failed_precondition`, `resource_exhausted`, `permission_denied`, `unavailable`,
`deadline_exceeded`, `internal`.
";

/// Writes the page.
///
/// # Errors
/// A `.proto` file that cannot be read or understood; a page that cannot be written.
pub(crate) fn run() -> Result<()> {
    let page = path(PAGE);
    fs::write(&page, made()?).with_context(|| format!("cannot write {}", page.display()))
}

fn path(name: &str) -> PathBuf {
    cache::workspace().join(name)
}

fn made() -> Result<String> {
    let mut page = HEAD.to_owned();
    for proto in PROTOS {
        let text = fs::read_to_string(path(proto)).with_context(|| format!("cannot read {proto}"))?;
        page.push_str(&section(&text).with_context(|| format!("cannot understand {proto}"))?);
    }
    Ok(page)
}

/// Where in a file a line is.
#[derive(Clone, PartialEq)]
enum In {
    Service,
    Message,
    Enum,
    OneOf(String),
}

/// A file's part of the page.
fn section(proto: &str) -> Result<String> {
    let mut page = String::new();
    let mut package = "";
    let mut comment: Vec<&str> = Vec::new();
    let mut inside: Vec<In> = Vec::new();
    let mut head: Option<String> = None;
    for (number, line) in (1..).zip(proto.lines()) {
        let line = line.trim();
        if let Some(words) = line.strip_prefix("//") {
            comment.push(words.trim());
            continue;
        }
        // What stands above the first declaration is of the file.
        if line.starts_with("syntax") {
            head = Some(comment.join(" "));
        }
        let said = comment.join(" ");
        comment.clear();
        let words: Vec<&str> = line.trim_end_matches(['{', ';', '}']).split_whitespace().collect();
        let speaks_for_itself = matches!(words.first(), None | Some(&("syntax" | "package" | "import" | "oneof")));
        if said.is_empty() && !speaks_for_itself && !line.ends_with("{}") {
            bail!("line {number}: {line:?} has no comment");
        }
        match (words.as_slice(), inside.last().cloned()) {
            ([], _) if line == "}" => {
                if inside.pop().is_none() {
                    bail!("line {number}: nothing ends here");
                }
            }
            ([] | ["syntax", ..] | ["import", ..], _) => {}
            (["package", name], None) => package = name,
            (["service", name], None) => {
                let head = head.take().unwrap_or_default();
                writeln!(page, "\n## {package}.{name}\n\n{head}\n\n{said}\n")?;
                writeln!(page, "| call | takes | answers | |\n|---|---|---|---|")?;
                inside.push(In::Service);
            }
            (["rpc", ..], Some(In::Service)) => {
                writeln!(page, "{}", call(line, &said).with_context(|| format!("line {number}"))?)?
            }
            (["message", name], None) => {
                writeln!(page, "\n### {name}\n")?;
                if !said.is_empty() {
                    writeln!(page, "{said}\n")?;
                }
                if line.ends_with('}') {
                    writeln!(page, "No fields.")?;
                } else {
                    writeln!(page, "| field | number | type | |\n|---|---|---|---|")?;
                    inside.push(In::Message);
                }
            }
            (["enum", name], None) => {
                writeln!(
                    page,
                    "\n### {name}\n\n{said}\n\n| value | number | | |\n|---|---|---|---|"
                )?;
                inside.push(In::Enum);
            }
            (["oneof", name], Some(In::Message)) => inside.push(In::OneOf((*name).to_owned())),
            ([kind @ .., name, "=", at], Some(place)) if line.ends_with(';') => {
                let kind = kind.join(" ").replace('|', "\\|");
                let one_of = match &place {
                    In::OneOf(of) => format!("One of `{of}`. "),
                    In::Service => bail!("line {number}: a field of a service"),
                    In::Message | In::Enum => String::new(),
                };
                let kind = if place == In::Enum {
                    String::new()
                } else {
                    format!("`{kind}`")
                };
                writeln!(page, "| `{name}` | {at} | {kind} | {one_of}{said} |")?;
            }
            _ => bail!("line {number}: {line:?}"),
        }
    }
    Ok(page)
}

/// A call's row, from `rpc Name(Takes) returns (stream Answers);`.
fn call(line: &str, said: &str) -> Result<String> {
    let mut parts = line.trim_start_matches("rpc").split(['(', ')']).map(str::trim);
    let (Some(name), Some(takes), Some("returns"), Some(answers)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        bail!("{line:?} is no call");
    };
    let linked = |message: &str| {
        let (stream, message) = match message.strip_prefix("stream ") {
            Some(message) => ("stream of ", message),
            None => ("", message),
        };
        format!("{stream}[{message}](#{})", message.to_lowercase())
    };
    Ok(format!(
        "| `{name}` | {} | {} | {said} |",
        linked(takes),
        linked(answers)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_that_of_the_proto_files() {
        let there = fs::read_to_string(path(PAGE)).expect("a page");
        assert!(
            there == made().expect("made"),
            "cargo xtask reference has not been run since they changed"
        );
    }

    #[test]
    fn every_kind_of_line_has_its_place() {
        let proto = "// Of the file.\nsyntax = \"proto3\";\n\npackage a.v1;\n\n// Of the service.\nservice S {\n  // Does.\n  rpc Do(In) \
                     returns (stream Out);\n}\n\nmessage In {}\n\n// Of it.\nmessage Out {\n  oneof which {\n    // First.\n    string a \
                     = 1;\n  }\n  // Of b.\n  map<string, string> b = 2;\n}\n\n// Of the list.\nenum E {\n  // Nothing.\n  E_NONE = 0;\n}\n";
        let page = section(proto).expect("understood");
        for line in [
            "## a.v1.S",
            "Of the file.",
            "Of the service.",
            "| `Do` | [In](#in) | stream of [Out](#out) | Does. |",
            "No fields.",
            "| `a` | 1 | `string` | One of `which`. First. |",
            "| `b` | 2 | `map<string, string>` | Of b. |",
            "| `E_NONE` | 0 |  | Nothing. |",
        ] {
            assert!(page.lines().any(|there| there == line), "{line:?} is not in {page}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_by_line() {
        for proto in [
            "// Of A.\nmessage A {\n  // Of B.\n  group B = 1 {\n",
            "}\n",
            "// Of S.\nservice S {\n  // Of a.\n  string a = 1;\n",
            "// Of A.\nextend A {\n",
            "// Of A.\nmessage A {\n  string a = 1;\n",
            "message A {\n",
        ] {
            let error = format!("{:#}", section(proto).expect_err(proto));
            assert!(error.contains("line "), "{error}");
        }
    }
}
