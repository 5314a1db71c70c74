//! `roost template build`: an image of somebody's root filesystem, made here as this user, and sent to the agent.
//!
//! ```text
//! archive, directory, OCI layout, mmdebstrap --> tree (+ envd) --> ext4 image --> ImportTemplate
//!                                                                  [--> create --> snapshot as the template --> destroy, delete]
//! ```
//!
//! What is on the way lies in a directory of its own below `TMPDIR` or `/var/tmp`, and goes with the command, also where it is interrupted.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;

use super::super::client::{Client, Operator};
use super::super::{CliError, print, print_json};
use super::archive::{Archive, ArchiveError, Entry, EntryKind, Time};
use super::debian::{self, DebianError};
use super::directory::{self, DirectoryError};
use super::ext4::{self, Ext4Error};
use super::oci::{self, Limited, MAX_UNPACKED, OciError, Store, unpack};
use super::tree::{LeftOut, Meaning, Tree, TreeError};
use super::upload::{self, UploadError};
use super::warm::Warm;
use crate::sandbox::build::fill_random;
use crate::sandbox::plan::{self, WishError};
use roost_hostagent::roost::v1::{ListTemplatesRequest, Template};

/// Most bytes of content where nothing else is said: such a template is larger than anybody's, and smaller than what fills a disk by accident.
const MOST: u64 = 32 << 30;
/// How much of an archive is looked at to tell what it is: enough for headers, and for pax headers of any usual size.
const PEEK: u64 = 64 << 10;
/// Where envd is installed, and where a guest has it.
const ENVD: &str = "/usr/lib/roost/envd";
const ENVD_IN_GUEST: &[u8] = b"usr/bin/envd";

/// What is built.
#[derive(Args)]
pub(super) struct Build {
    /// A root filesystem as a directory or a tar archive, an OCI image layout as either, or what `docker save` writes; archives may be
    /// compressed by gzip or zstd, and `-` is one from standard input
    #[arg(required_unless_present = "debian", conflicts_with = "debian")]
    source: Option<PathBuf>,
    /// A minimal Debian of this release in place of a source, by mmdebstrap
    #[arg(long, value_name = "RELEASE", value_parser = release)]
    debian: Option<String>,
    /// Packages that it has besides
    #[arg(long, value_name = "PACKAGES", requires = "debian", conflicts_with = "source")]
    include: Option<String>,
    /// Where packages come from in place of Debian's archive, as mmdebstrap has it: a URI, a line of sources.list, or a file of such; may be
    /// given several times
    #[arg(long, value_name = "MIRROR", requires = "debian", conflicts_with = "source")]
    mirror: Vec<String>,
    /// Which image, where the source has several
    #[arg(long, value_name = "NAME", conflicts_with = "debian")]
    image: Option<String>,
    /// A name for people, by which `roost create` finds it too
    #[arg(long, default_value = "")]
    name: String,
    /// UUID of the template; a new one otherwise
    #[arg(long, value_name = "UUID")]
    template: Option<Uuid>,
    /// UUID of the team that it belongs to
    #[arg(long, value_name = "UUID")]
    team: Option<Uuid>,
    /// Size of the image in MiB [default: what is in it and 64 MiB]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=(1 << 24)))]
    size_mb: Option<u64>,
    /// The guest's agent
    #[arg(long, value_name = "PATH", default_value = ENVD)]
    envd: PathBuf,
    /// Leave out the guest's agent: sandboxes run the one of the host's initramfs
    #[arg(long, conflicts_with = "envd")]
    no_envd: bool,
    /// Boot it once and keep its memory: sandboxes of the same size wake in place of booting
    #[arg(long)]
    snapshot: bool,
    /// vCPUs that sandboxes must have to wake [default: 1]
    #[arg(long, value_name = "N", requires = "snapshot")]
    vcpus: Option<i32>,
    /// Memory that they must have, in MiB [default: 512]
    #[arg(long, value_name = "MIB", requires = "snapshot")]
    memory: Option<i32>,
    /// Disk that they must have, in MiB [default: the image's size]
    #[arg(long, value_name = "MIB", requires = "snapshot")]
    disk: Option<i32>,
}

/// Why nothing was built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    /// The source.
    #[error("{} cannot be read", path.display())]
    Source {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A source of nothing.
    #[error("{0} has no files")]
    Empty(String),
    /// The guest's agent.
    #[error(
        "no guest agent at {}: install roost-guest-tools, say where it is by --envd, or leave it out by --no-envd",
        path.display()
    )]
    Envd {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory for what is on the way.
    #[error("no directory can be made below {}", dir.display())]
    Work {
        /// Below which one.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An image's layers.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// An archive.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Files of an image.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// A Debian.
    #[error(transparent)]
    Debian(#[from] DebianError),
    /// The filesystem.
    #[error(transparent)]
    Ext4(#[from] Ext4Error),
    /// Sending it.
    #[error(transparent)]
    Upload(#[from] UploadError),
    /// A name that no template can have.
    #[error(transparent)]
    Name(#[from] WishError),
    /// There is one.
    #[error("template {0} is there already")]
    Exists(Uuid),
    /// Somebody has had enough.
    #[error("interrupted; no template was made")]
    Interrupted,
}

fn release(text: &str) -> Result<String, String> {
    let is_word = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte));
    is_word
        .then(|| text.to_owned())
        .ok_or_else(|| "no release such as bookworm".to_owned())
}

/// What has been built.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Built {
    team_id: String,
    template_id: String,
    name: String,
    /// Of the image.
    length: u64,
    digest: String,
    /// Whether sandboxes of it wake in place of booting.
    has_memory: bool,
}

/// Builds what is asked for, and prints its UUID.
pub(super) async fn build(client: &Client, operator: &Operator, wish: Build, json: bool) -> Result<(), CliError> {
    let bar = ProgressBar::new_spinner();
    if json {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar.set_style(style("{spinner} {msg} {bytes}"));
    let built = build_with(client, operator, wish, &bar).await;
    bar.finish_and_clear();
    let built = built?;
    if json {
        return print_json(&built);
    }
    print(format_args!("{}\n", built.template_id))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("a template of known keys")
}

async fn build_with(client: &Client, operator: &Operator, wish: Build, bar: &ProgressBar) -> Result<Built, CliError> {
    let template = wish.template.unwrap_or_else(random_uuid);
    let team = wish.team.map(|team| team.to_string()).unwrap_or_default();
    let name = plan::name(wish.name.clone()).map_err(BuildError::from)?;
    // What would be refused in the end is refused before the work.
    let there = operator
        .list_templates(ListTemplatesRequest::default())
        .await?
        .into_owned();
    let in_team = wish.team.unwrap_or_default().to_string();
    let is_it = |one: &Template| one.template_id == template.to_string() && one.team_id == in_team;
    if there.templates.iter().any(is_it) {
        return Err(BuildError::Exists(template).into());
    }
    let snapshot = wish.snapshot.then(|| Warm {
        client,
        operator,
        team: team.clone(),
        name: name.clone(),
        template,
        vcpus: wish.vcpus.unwrap_or_default(),
        memory: wish.memory.unwrap_or_default(),
        disk: wish.disk.unwrap_or_default(),
    });
    let stop = Arc::new(AtomicBool::new(false));
    // Here, so that it goes with whatever happens.
    let work = Work::new()?;
    let mut local = tokio::task::spawn_blocking({
        let (stop, bar, work) = (stop.clone(), bar.clone(), work.0.clone());
        move || make_image(&wish, &work, &bar, &stop)
    });
    let image = tokio::select! {
        // First, because what it interrupts mostly fails of it.
        biased;
        () = interrupted() => {
            stop.store(true, Ordering::Relaxed);
            drop(local.await);
            return Err(BuildError::Interrupted.into());
        }
        image = &mut local => image.expect("building does not panic")?,
    };
    let length = image.length;
    // A template appears once: with its memory, or without where none is wanted.
    let first = if snapshot.is_some() { random_uuid() } else { template };
    bar.set_style(style(
        "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} sending the image",
    ));
    let sent = tokio::select! {
        sent = upload::send(operator, &team, first, &name, image, bar) => sent?,
        () = interrupted() => return Err(BuildError::Interrupted.into()),
    };
    drop(work);
    let has_memory = match snapshot {
        None => false,
        Some(warm) => {
            bar.set_style(style("{spinner} {msg}"));
            bar.set_message("booting it for its memory");
            warm.make(first).await?
        }
    };
    Ok(Built {
        team_id: team,
        template_id: template.to_string(),
        name,
        length,
        digest: sent.digest,
        has_memory,
    })
}

pub(super) fn random_uuid() -> Uuid {
    let mut bytes = [0; 16];
    fill_random(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// Waits until somebody interrupts this program.
pub(super) async fn interrupted() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // Then the signal ends this program as it always does.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// A directory of our own for what is on the way; it goes with this value.
struct Work(PathBuf);

impl Work {
    fn new() -> Result<Self, BuildError> {
        // Not /tmp, which may be memory: images are large.
        let below = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
        let dir = PathBuf::from(below);
        nix::unistd::mkdtemp(&dir.join("roost-template-XXXXXX"))
            .map(Self)
            .map_err(|errno| BuildError::Work {
                dir,
                source: errno.into(),
            })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("roost: {} could not be removed: {error}", self.0.display());
        }
    }
}

/// Makes the image of what is asked for. Blocks.
fn make_image(wish: &Build, work: &Path, bar: &ProgressBar, stop: &AtomicBool) -> Result<upload::Image, BuildError> {
    let envd = (!wish.no_envd).then(|| open_envd(&wish.envd)).transpose()?;
    let spool = work.join("spool");
    fs::create_dir(&spool).map_err(|source| BuildError::Work {
        dir: work.to_owned(),
        source,
    })?;
    let mut tree = Tree::new(&spool, wish.size_mb.map_or(MOST, |size| size << 20));
    bar.set_message("reading the source");
    let what = match (&wish.debian, &wish.source) {
        (Some(release), _) => {
            let debian = debian::Wish {
                release,
                include: wish.include.as_deref(),
                mirrors: &wish.mirror,
            };
            debian::add(&mut tree, &debian, work, stop)?;
            release.clone()
        }
        (None, Some(source)) => {
            add_source(&mut tree, source, wish.image.as_deref(), work, bar, stop)?;
            source.display().to_string()
        }
        (None, None) => unreachable!("the command line has one of them"),
    };
    if tree.is_empty() {
        return Err(BuildError::Empty(what));
    }
    if let Some((mut file, size)) = envd {
        let entry = Entry {
            path: ENVD_IN_GUEST.to_vec(),
            kind: EntryKind::File,
            size,
            mode: 0o755,
            uid: 0,
            gid: 0,
            modified: Time::default(),
            xattrs: std::collections::BTreeMap::new(),
            has_acl: false,
            link: Vec::new(),
            device: (0, 0),
        };
        tree.put(entry, &mut file, Meaning::Plain, stop)?;
    }
    tell(tree.left_out);
    bar.set_message("writing the filesystem");
    let need = ext4::Need::of(&tree);
    let size = need.size(wish.size_mb)?;
    let image = work.join("rootfs.ext4");
    ext4::make(&tree, need, size, &image, work)?;
    if stop.load(Ordering::Relaxed) {
        return Err(BuildError::Interrupted);
    }
    Ok(upload::Image::open(&image)?)
}

fn open_envd(path: &Path) -> Result<(File, u64), BuildError> {
    let failed = |source| BuildError::Envd {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(failed(io::Error::other("it is no program")));
    }
    Ok((file, metadata.len()))
}

/// Says what the image does not have of its source.
fn tell(left_out: LeftOut) {
    for (count, what) in [
        (
            left_out.acls,
            "access control lists, which are in a form that is not read",
        ),
        (
            left_out.xattrs,
            "extended attributes of a kind that Linux does not have",
        ),
        (left_out.sockets, "sockets"),
    ] {
        if count > 0 {
            eprintln!("roost: left out: {count} {what}");
        }
    }
}

fn add_source(
    tree: &mut Tree,
    source: &Path,
    image: Option<&str>,
    work: &Path,
    bar: &ProgressBar,
    stop: &AtomicBool,
) -> Result<(), BuildError> {
    let failed = |error| BuildError::Source {
        path: source.to_owned(),
        source: error,
    };
    if source == OsStr::new("-") {
        return add_archive(tree, io::stdin(), image, work, bar, stop, failed);
    }
    if source.is_dir() {
        if source.join("oci-layout").is_file() && source.join("index.json").is_file() {
            return add_image(tree, &Store::Directory(source.to_owned()), image, bar, stop);
        }
        return Ok(directory::add(tree, source, stop)?);
    }
    let file = File::open(source).map_err(failed)?;
    add_archive(tree, file, image, work, bar, stop, failed)
}

/// Adds what an archive is: an image, which it is read a second time for, or a root filesystem, which it is read once for.
fn add_archive(
    tree: &mut Tree,
    reader: impl Read,
    image: Option<&str>,
    work: &Path,
    bar: &ProgressBar,
    stop: &AtomicBool,
    failed: impl Fn(io::Error) -> BuildError,
) -> Result<(), BuildError> {
    let reader = unpack(bar.wrap_read(reader)).map_err(&failed)?;
    let mut reader = Limited {
        reader,
        left: MAX_UNPACKED,
    };
    let mut first = Vec::new();
    reader.by_ref().take(PEEK).read_to_end(&mut first).map_err(&failed)?;
    let is_image = is_image(&first);
    let mut whole = Cursor::new(first).chain(reader);
    if !is_image {
        return Ok(tree.add(&mut Archive::new(&mut whole), Meaning::Plain, stop)?);
    }
    let path = work.join("archive");
    let copy = File::options().read(true).write(true).create_new(true).open(&path);
    let mut copy = copy.map_err(&failed)?;
    let mut stopping = Stopping { reader: whole, stop };
    io::copy(&mut stopping, &mut copy).map_err(&failed)?;
    io::Seek::rewind(&mut copy).map_err(&failed)?;
    add_image(tree, &Store::index(copy)?, image, bar, stop)
}

/// Whether an archive that begins with this is one of an image's parts.
fn is_image(first: &[u8]) -> bool {
    let mut archive = Archive::new(Cursor::new(first));
    loop {
        match archive.next() {
            // The directory that all is in.
            Ok(Some(entry)) if matches!(entry.path.as_slice(), b"." | b"./" | b"/") => {}
            Ok(Some(entry)) => return oci::is_part(&entry.path),
            Ok(None) | Err(_) => return false,
        }
    }
}

/// A stream that ends with an error once somebody has had enough.
struct Stopping<'a, R> {
    reader: R,
    stop: &'a AtomicBool,
}

impl<R: Read> Read for Stopping<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped"));
        }
        self.reader.read(buffer)
    }
}

fn add_image(
    tree: &mut Tree,
    store: &Store,
    image: Option<&str>,
    bar: &ProgressBar,
    stop: &AtomicBool,
) -> Result<(), BuildError> {
    let layers = store.layers(image)?;
    let mut budget = MAX_UNPACKED;
    for (number, layer) in layers.iter().enumerate() {
        bar.set_message(format!("layer {} of {}", number + 1, layers.len()));
        layer.read(&mut budget, |archive| {
            tree.add(archive, Meaning::Layer, stop).map_err(BuildError::from)
        })?;
    }
    Ok(())
}
