//! `roost cp`: files and directories into a sandbox and out of it.
//!
//! Holds: a file passes through in pieces; one that cannot be copied whole is not left half-written under its name at this end, and at the
//! other as far as the guest's envd keeps to that. What a guest names stays in the target (`fetch`).

mod fetch;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use futures::stream;
use indicatif::{ProgressBar, ProgressStyle};

use super::CliError;
use super::client::Client;
use roost_hostagent::hostagent::v1::{
    ExecRequest, FileEntry, ListDirRequest, MakeDirRequest, ReadFileStreamRequest, ReadFileStreamResponse,
    WriteFileStreamMeta, WriteFileStreamRequest,
};

/// Bytes of a file in one message.
const CHUNK: usize = 256 << 10;
/// Permissions that files have in a sandbox where nothing else is said.
const USUAL_MODE: u32 = 0o644;

/// What is copied, and where.
#[derive(Args)]
pub(super) struct Copy {
    /// What to copy: a path here, or SANDBOX:PATH
    source: Place,
    /// Where to: a path here, or SANDBOX:PATH; into it where it is a directory
    target: Place,
}

/// A path here or in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    There { sandbox: String, path: String },
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            // As with scp: a path with a colon in it is written with a slash before that.
            Some((sandbox, path)) if !sandbox.contains('/') && !sandbox.is_empty() => {
                if path.is_empty() {
                    return Err("no path after the colon; SANDBOX:. is the home of its user".to_owned());
                }
                Ok(Self::There {
                    sandbox: sandbox.to_owned(),
                    path: path.to_owned(),
                })
            }
            _ => Ok(Self::Here(text.into())),
        }
    }
}

/// Why something was not copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    #[error("one of the two must be in a sandbox, as in SANDBOX:PATH, and the other here")]
    Direction,
    // A part of it may be a guest's.
    #[error("{path:?}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is neither a file, a directory nor a symbolic link", .0.display())]
    Kind(PathBuf),
    #[error("the sandbox has a file of a name that is none here: {0:?}")]
    Name(String),
    #[error("{0:?} is a symbolic link here and a directory in the sandbox: remove it, or copy to another place")]
    Link(PathBuf),
    #[error("in the sandbox, {0:?} failed: {1}")]
    Command(String, String),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CliError {
    let path = path.to_owned();
    |source| CopyError::File { path, source }.into()
}

/// Copies what is asked for.
pub(super) async fn copy(client: &Client, wish: Copy) -> Result<(), CliError> {
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}")
            .expect("a template of known keys"),
    );
    let copied = match (wish.source, wish.target) {
        (Place::Here(from), Place::There { sandbox, path }) => {
            let there = There {
                client,
                sandbox,
                bar: &bar,
            };
            let path = there
                .below(path, from.file_name().map(|name| name.to_string_lossy().into_owned()))
                .await;
            bar.set_length(size_here(&from)?);
            there.put(&from, &path).await
        }
        (Place::There { sandbox, path }, Place::Here(to)) => {
            let there = There {
                client,
                sandbox,
                bar: &bar,
            };
            fetch::fetch(&there, &path, &to).await
        }
        _ => Err(CopyError::Direction.into()),
    };
    bar.finish_and_clear();
    copied
}

/// What a file or a tree here holds.
fn size_here(path: &Path) -> Result<u64, CliError> {
    let about = fs::symlink_metadata(path).map_err(at(path))?;
    if !about.is_dir() {
        return Ok(if about.is_file() { about.len() } else { 0 });
    }
    let mut sum = 0;
    for entry in fs::read_dir(path).map_err(at(path))? {
        sum += size_here(&entry.map_err(at(path))?.path())?;
    }
    Ok(sum)
}

/// The files of a sandbox.
struct There<'a> {
    client: &'a Client,
    sandbox: String,
    bar: &'a ProgressBar,
}

impl There<'_> {
    /// The path of something that is copied to `path`: in it, where that is a directory.
    async fn below(&self, path: String, name: Option<String>) -> String {
        match (name, self.list(&path, 1).await) {
            (Some(name), Ok(_)) => format!("{}/{name}", path.trim_end_matches('/')),
            _ => path,
        }
    }

    async fn put(&self, from: &Path, to: &str) -> Result<(), CliError> {
        let about = fs::symlink_metadata(from).map_err(at(from))?;
        self.bar.set_message(from.display().to_string());
        if about.is_symlink() {
            let target = fs::read_link(from).map_err(at(from))?.to_string_lossy().into_owned();
            return self.run(&["ln", "-sfn", "--", &target, to]).await.map(drop);
        }
        if about.is_file() {
            self.put_file(from, to).await?;
            let mode = about.permissions().mode() & 0o777;
            if mode != USUAL_MODE {
                self.run(&["chmod", &format!("{mode:o}"), "--", to]).await?;
            }
            return Ok(());
        }
        if !about.is_dir() {
            return Err(CopyError::Kind(from.to_owned()).into());
        }
        let request = MakeDirRequest {
            sandbox_id: self.sandbox.clone(),
            path: to.to_owned(),
            ..MakeDirRequest::default()
        };
        match self.client.make_dir(request).await {
            Err(error) if error.code != connectrpc::ErrorCode::AlreadyExists => return Err(error.into()),
            _ => {}
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(from).map_err(at(from))? {
            names.push(entry.map_err(at(from))?.file_name());
        }
        for name in names {
            let below = format!("{to}/{}", name.to_string_lossy());
            Box::pin(self.put(&from.join(&name), &below)).await?;
        }
        Ok(())
    }

    async fn put_file(&self, from: &Path, to: &str) -> Result<(), CliError> {
        use tokio::io::AsyncReadExt as _;
        let file = tokio::fs::File::open(from).await.map_err(at(from))?;
        let meta = WriteFileStreamMeta {
            sandbox_id: self.sandbox.clone(),
            path: to.to_owned(),
            ..WriteFileStreamMeta::default()
        };
        let first = WriteFileStreamRequest {
            content: meta.into(),
            ..WriteFileStreamRequest::default()
        };
        let (failed, failure) = tokio::sync::oneshot::channel();
        let bar = self.bar.clone();
        let state = Some((Some(first), file, failed));
        let messages = stream::unfold(state, move |state| {
            let bar = bar.clone();
            async move {
                let (first, mut file, failed) = state?;
                if let Some(first) = first {
                    return Some((first, Some((None, file, failed))));
                }
                let mut chunk = vec![0; CHUNK];
                match file.read(&mut chunk).await {
                    Ok(0) => None,
                    Ok(read) => {
                        chunk.truncate(read);
                        bar.inc(read as u64);
                        let content =
                            Some(roost_hostagent::hostagent::v1::write_file_stream_request::Content::Chunk(chunk));
                        let message = WriteFileStreamRequest {
                            content,
                            ..WriteFileStreamRequest::default()
                        };
                        Some((message, Some((None, file, failed))))
                    }
                    Err(error) => {
                        // A second meta is refused, and the file is not written.
                        failed.send(error).ok();
                        let meta = WriteFileStreamMeta::default();
                        let message = WriteFileStreamRequest {
                            content: meta.into(),
                            ..WriteFileStreamRequest::default()
                        };
                        Some((message, None))
                    }
                }
            }
        });
        let written = self.client.write_file_stream(Box::pin(messages)).await;
        if let Ok(error) = failure.await {
            return Err(at(from)(error));
        }
        written?;
        Ok(())
    }

    async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, CliError> {
        let request = ListDirRequest {
            sandbox_id: self.sandbox.clone(),
            path: path.to_owned(),
            depth,
            ..ListDirRequest::default()
        };
        Ok(self.client.list_dir(request).await?.into_owned().entries)
    }

    /// Runs a command that must succeed; what it wrote.
    async fn run(&self, command: &[&str]) -> Result<String, CliError> {
        let mut words = command.iter().map(|word| (*word).to_owned());
        let request = ExecRequest {
            sandbox_id: self.sandbox.clone(),
            cmd: words.next().unwrap_or_default(),
            args: words.collect(),
            ..ExecRequest::default()
        };
        let answer = self.client.exec(request).await?.into_owned();
        if answer.exit_code == 0 {
            return Ok(String::from_utf8_lossy(&answer.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&answer.stderr).replace(char::is_control, " ");
        Err(CopyError::Command(command.join(" "), said.trim().to_owned()).into())
    }
}

impl fetch::Source for There<'_> {
    async fn list(&self, path: &str) -> Result<Vec<FileEntry>, CliError> {
        self.list(path, 1).await
    }

    async fn read_link(&self, path: &str) -> Result<String, CliError> {
        self.run(&["readlink", "-n", "--", path]).await
    }

    async fn read(&self, path: &str, into: &mut fetch::Unfinished<'_>) -> Result<(), CliError> {
        self.bar.set_message(path.replace(char::is_control, "?"));
        let request = ReadFileStreamRequest {
            sandbox_id: self.sandbox.clone(),
            path: path.to_owned(),
            ..ReadFileStreamRequest::default()
        };
        let mut stream = self.client.read_file_stream(request).await?;
        while let Some(message) = stream.message::<ReadFileStreamResponse>().await? {
            let chunk = message.to_owned_message().chunk;
            into.write(&chunk)?;
            self.bar.inc(chunk.len() as u64);
        }
        Ok(())
    }

    fn expect(&self, bytes: u64) {
        self.bar.inc_length(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_in_a_sandbox_where_a_colon_comes_before_any_slash() {
        let there = |sandbox: &str, path: &str| {
            Ok(Place::There {
                sandbox: sandbox.to_owned(),
                path: path.to_owned(),
            })
        };
        let here = |path: &str| Ok(Place::Here(path.into()));
        for (text, place) in [
            ("sb:/etc/passwd", there("sb", "/etc/passwd")),
            ("sb:a:b", there("sb", "a:b")),
            ("sb:.", there("sb", ".")),
            ("./a:b", here("./a:b")),
            ("/a:b", here("/a:b")),
            ("a", here("a")),
            (":a", here(":a")),
        ] {
            assert_eq!(text.parse::<Place>(), place, "{text}");
        }
        assert!("sb:".parse::<Place>().is_err());
    }
}
