//! Where the configuration comes from: a file, those in the directory beside it, the environment, the command line. Of a key, the last value
//! holds; every value is judged, those too that another replaces.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::Config;
use super::keys::{ByDefault, KEYS, Key, Refused, find, is_table};

/// Where the configuration is looked for when nothing else is said.
pub const DEFAULT_FILE: &str = "/etc/roost/agent.toml";
/// What the variables that set keys begin with.
const PREFIX: &str = "ROOST_AGENT_";
/// Sets `dir`, as [`PREFIX`] and `DIR` do, for all of roost's programs.
const DIR: &str = "ROOST_DIR";

/// Where a value is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody has set it.
    Default,
    /// A line of a file, counted from 1.
    File(PathBuf, usize),
    /// A variable of the environment.
    Variable(String),
    /// An option of the command line.
    Option(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => write!(f, "{name} in the environment"),
            Self::Option(name) => f.write_str(name),
        }
    }
}

/// Something that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file, or the directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML.
    #[error("{at}: {why}")]
    Syntax {
        /// Where.
        at: Origin,
        /// What the parser says.
        why: String,
    },
    /// There is no such key.
    #[error("{at}: {key} is not a key of this agent{hint}; roost-agent --default-config has them all")]
    Unknown {
        /// Where.
        at: Origin,
        /// What it is called.
        key: String,
        /// Where it might belong.
        hint: String,
    },
    /// A value that the key does not take.
    #[error("{at}: {key} = {value} is out of range: {range}{why}")]
    Value {
        /// Where.
        at: Origin,
        /// The key.
        key: &'static str,
        /// What it was set to, as it is written.
        value: String,
        /// What it may be.
        range: &'static str,
        /// What else there is to say.
        why: String,
    },
}

/// Why there is no configuration: everything that is wrong, in the order in which it is read. At least one.
#[derive(Debug)]
pub struct Problems {
    /// The files that were read.
    pub files: Vec<PathBuf>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.problems.iter().enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Where to read the configuration from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file; without one [`DEFAULT_FILE`], which may be missing. `<file>.d/*.toml` come after it.
    pub file: Option<PathBuf>,
    /// The environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Keys that the command line sets: their names, the options, the values, which are texts.
    pub options: Vec<(&'static str, &'static str, String)>,
}

impl Sources {
    /// A file, or the usual one, and the environment of this process.
    pub fn of_process(file: Option<PathBuf>) -> Self {
        Self {
            file,
            environment: std::env::vars_os().collect(),
            options: Vec::new(),
        }
    }

    /// The directory of the file.
    pub fn directory(&self) -> Option<&Path> {
        self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE)).parent()
    }

    /// Reads all of it.
    ///
    /// # Errors
    /// [`Problems`].
    pub fn load(&self) -> Result<Loaded, Problems> {
        let mut reader = Reader::default();
        let path = self.file.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        reader.file(path, self.file.is_none());
        reader.directory(&beside(path));
        reader.environment(&self.environment);
        for (name, option, value) in &self.options {
            let key = find(name).expect("options are of keys that there are");
            let written = format!("{value:?}");
            let value = Spanned::new(0..0, DeValue::String(value.into()));
            reader.take(key, value, written, Origin::Option(option));
        }
        reader.finish()
    }
}

/// The directory of a file's additions: `agent.toml.d` of `agent.toml`.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".d");
    name.into()
}

/// A configuration, and where it is from.
#[derive(Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// The files that were read, in order.
    pub files: Vec<PathBuf>,
    /// What was set, as it is written.
    set: BTreeMap<&'static str, (Origin, String)>,
}

impl Loaded {
    /// Where a key's value is from.
    pub fn origin(&self, key: &Key) -> Origin {
        self.set
            .get(key.name)
            .map_or(Origin::Default, |(origin, _)| origin.clone())
    }

    /// All that holds, as TOML, with where each value is from.
    pub fn describe(&self) -> String {
        let line = |key: &Key| {
            let (name, origin) = (key.name, self.origin(key));
            match (self.set.get(name), key.default) {
                (Some((_, value)), _) => format!("# {origin}\n{name} = {value}\n"),
                (None, ByDefault::Is(value)) => format!("# {origin}\n{name} = {value}\n"),
                (None, ByDefault::Unset(_)) => format!("# {name} is not set\n"),
            }
        };
        KEYS.iter().map(line).collect()
    }
}

/// What has been read so far.
#[derive(Debug, Default)]
struct Reader {
    config: Config,
    files: Vec<PathBuf>,
    set: BTreeMap<&'static str, (Origin, String)>,
    problems: Vec<Problem>,
}

impl Reader {
    fn finish(self) -> Result<Loaded, Problems> {
        let Self {
            config,
            files,
            set,
            problems,
        } = self;
        if problems.is_empty() {
            Ok(Loaded { config, files, set })
        } else {
            Err(Problems { files, problems })
        }
    }

    fn file(&mut self, path: &Path, may_be_missing: bool) {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                self.files.push(path.into());
                self.text(path, &text);
            }
            Err(error) if may_be_missing && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => self.problems.push(Problem::Read {
                path: path.into(),
                source,
            }),
        }
    }

    /// The files `*.toml` of a directory that may be missing, in the order of their names' bytes; hidden ones are an editor's.
    fn directory(&mut self, path: &Path) {
        let entries = std::fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(source) => {
                let path = path.into();
                return self.problems.push(Problem::Read { path, source });
            }
        };
        let is_ours = |path: &PathBuf| {
            let hidden = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            !hidden && path.extension().is_some_and(|extension| extension == "toml")
        };
        let mut files: Vec<_> = entries.into_iter().map(|entry| entry.path()).filter(is_ours).collect();
        files.sort();
        for file in files {
            self.file(&file, false);
        }
    }

    fn text(&mut self, path: &Path, text: &str) {
        let at = |span: Range<usize>| {
            let before = text.as_bytes().get(..span.start).unwrap_or(text.as_bytes());
            Origin::File(path.into(), 1 + before.iter().filter(|byte| **byte == b'\n').count())
        };
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            // What the parser has made of the rest is a guess.
            return self.problems.extend(errors.into_iter().map(|error| Problem::Syntax {
                at: at(error.span().unwrap_or_default()),
                why: error.message().to_owned(),
            }));
        }
        // In the order in which they are written.
        let mut open: Vec<_> = table
            .into_inner()
            .into_iter()
            .map(|(key, value)| (String::new(), key, value))
            .collect();
        let mut keys = Vec::new();
        while let Some((table, key, value)) = open.pop() {
            let name = format!("{table}{}", key.get_ref());
            match value.get_ref() {
                DeValue::Table(_) if table.is_empty() && is_table(&name) => {
                    let DeValue::Table(inner) = value.into_inner() else {
                        unreachable!("it was one")
                    };
                    open.extend(inner.into_iter().map(|(key, value)| (format!("{name}."), key, value)));
                }
                _ => keys.push((key.span(), name, value)),
            }
        }
        keys.sort_by_key(|(span, ..)| span.start);
        for (span, name, value) in keys {
            let at = at(span);
            match find(&name) {
                Some(key) => {
                    let written = text.get(value.span()).unwrap_or_default().to_owned();
                    self.take(key, value, written, at);
                }
                None => self.unknown(name, at),
            }
        }
    }

    fn environment(&mut self, environment: &[(OsString, OsString)]) {
        let mut ours: Vec<_> = environment
            .iter()
            .filter(|(name, _)| name == DIR || name.as_encoded_bytes().starts_with(PREFIX.as_bytes()))
            .collect();
        // The general name first: the agent's own replaces it.
        ours.sort_by_key(|(name, _)| (name != DIR, name.clone()));
        for (name, value) in ours {
            let name = name.to_string_lossy().into_owned();
            let key = KEYS
                .iter()
                .find(|key| key.variable() == name || (name == DIR && key.name == "dir"));
            let at = Origin::Variable(name.clone());
            match (key, value.to_str()) {
                (None, _) => self.unknown(name, at),
                (Some(key), Some(value)) => self.variable(key, value, at),
                (Some(_), None) => self.problems.push(Problem::Syntax {
                    at,
                    why: "not UTF-8".into(),
                }),
            }
        }
    }

    fn variable(&mut self, key: &'static Key, text: &str, at: Origin) {
        if key.is_text() && !text.starts_with(['"', '\'']) {
            let value = Spanned::new(0..0, DeValue::String(text.into()));
            return self.take(key, value, format!("{text:?}"), at);
        }
        match DeValue::parse(text) {
            Ok(value) => self.take(key, value, text.to_owned(), at),
            Err(error) => self.problems.push(Problem::Syntax {
                at,
                why: error.message().to_owned(),
            }),
        }
    }

    fn take(&mut self, key: &'static Key, value: Spanned<DeValue<'_>>, written: String, at: Origin) {
        let refused = key.set(&mut self.config, ValueDeserializer::from(value));
        let why = match refused {
            Ok(()) => {
                self.set.insert(key.name, (at, written));
                return;
            }
            Err(Refused::OutOfRange) => String::new(),
            Err(Refused::Unreadable(error)) => format!(" ({})", error.message()),
        };
        self.problems.push(Problem::Value {
            at,
            key: key.name,
            value: written,
            range: key.range,
            why,
        });
    }

    fn unknown(&mut self, key: String, at: Origin) {
        let same_end = |known: &&Key| known.name.rsplit('.').next() == key.rsplit('.').next();
        let hint = KEYS
            .iter()
            .find(same_end)
            .map_or_else(String::new, |known| format!(", but {} is", known.name));
        self.problems.push(Problem::Unknown { at, key, hint });
    }
}

/// The configuration of a text alone.
#[cfg(test)]
pub(super) fn of_text(text: &str) -> Result<Loaded, Problems> {
    let mut reader = Reader::default();
    reader.text(Path::new("agent.toml"), text);
    reader.finish()
}

#[cfg(test)]
mod tests;
