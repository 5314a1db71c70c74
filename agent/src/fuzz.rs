//! What the agent reads of what others write, as functions of any bytes: none of them may panic, and each checks what must hold of what it
//! has taken. For the fuzzers in `fuzz/` (`cargo xtask fuzz`), and for a test that plays their corpora with changes each time.

use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use futures::StreamExt;
use http::Uri;
use roost_common::ipc;
use roost_common::privd::PrivdServerTransport;
use roost_common::shim::{FromShim, ToShim};
use rustix::cmsg_space;
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::cli::template;
use crate::egress::{Name, by_name, name};
use crate::guest::process::Command;
use crate::guest::{Guest, Token};
use crate::proxy;
use crate::sandbox::record::Record;
use crate::snapshot::{self, manifest::Manifest};
use roost_common::net::Cidr;

/// A target: its name, which is its corpus's folder, and what it does with any bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 11] = [
    ("archive", archive),
    ("client_hello", client_hello),
    ("guest_answer", guest_answer),
    ("image", image),
    ("location", location),
    ("manifest", manifest),
    ("packet", packet),
    ("policy", policy),
    ("proxy_path", proxy_path),
    ("record", record),
    ("vmm_state", vmm_state),
];

/// What a VMM writes of itself: `state.json` of a snapshot.
pub fn vmm_state(bytes: &[u8]) {
    snapshot::judge_state(bytes);
}

/// The manifest of a snapshot, which lies where a VMM's uid could write before it was sealed.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) {
        let again = serde_json::to_vec(&manifest).expect("strings and numbers serialise");
        let again: Manifest = serde_json::from_slice(&again).expect("what we wrote");
        assert_eq!(again, manifest);
        // Sums of what others say.
        let _: u64 = manifest.files.allocated().0;
    }
}

/// The record of a sandbox, as a disk that has lost something gives it back.
pub fn record(bytes: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<Record>(bytes) {
        let again = serde_json::to_vec(&record).expect("strings and numbers serialise");
        assert_eq!(serde_json::from_slice::<Record>(&again).expect("what we wrote"), record);
        let _: bool = record.plan.egress.policy(&[]).proxied;
    }
}

/// Names and ranges of a policy, and names as connections ask for them: two texts, one in each line.
pub fn policy(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (listed, asked) = text.split_once('\n').unwrap_or((&text, ""));
    if let Ok(range) = listed.parse::<Cidr>() {
        assert!(range.is_proper());
        assert_eq!(range.to_string().parse(), Ok(range));
    }
    if let Ok(name) = listed.parse::<Name>() {
        assert_eq!(name.to_string().parse(), Ok(name.clone()));
        // Of what is a name, whatever matches ends in what is listed.
        if name::check(asked).is_ok() && name.matches(asked) {
            let listed = name.to_string();
            assert!(
                asked.to_ascii_lowercase().ends_with(listed.trim_start_matches('*')),
                "{listed}: {asked}"
            );
        }
    }
}

/// The path of a request to the proxy.
pub fn proxy_path(bytes: &[u8]) {
    if let Ok(uri) = Uri::try_from(bytes) {
        proxy::judge_path(&uri);
    }
}

/// A reference in an answer of a guest.
pub fn location(bytes: &[u8]) {
    proxy::judge_location(&String::from_utf8_lossy(bytes));
}

/// The first bytes of a guest's connection to a server by name.
pub fn client_hello(bytes: &[u8]) {
    by_name::judge_hello(bytes);
}

/// Most descriptors that a fuzzed packet carries: one more than any message of ours takes.
const DESCRIPTORS: u8 = 4;

/// A packet, as privd, a shim and the agent get it: whose by the first byte, how many descriptors it carries by the second, and its bytes.
pub fn packet(bytes: &[u8]) {
    let _: bool = judge_packet(bytes);
}

/// Whether it is a packet of ours.
fn judge_packet(bytes: &[u8]) -> bool {
    let [whose, descriptors, payload @ ..] = bytes else {
        return false;
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (ours, theirs) = pair.expect("a pair of sockets");
    let given: Vec<OwnedFd> = (0..descriptors % (DESCRIPTORS + 1))
        .map(|_| std::fs::File::open("/dev/null").expect("it is there").into())
        .collect();
    let given: Vec<_> = given.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS as usize))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !given.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&given)), "there is room");
    }
    let payload = std::io::IoSlice::new(payload);
    // One that is too long for the socket is none.
    if rustix::net::sendmsg(&ours, &[payload], &mut ancillary, SendFlags::NOSIGNAL).is_err() {
        return false;
    }
    match whose % 3 {
        0 => received_again::<ToShim>(&ours, &theirs),
        1 => received_again::<FromShim>(&ours, &theirs),
        _ => in_runtime(async {
            let mut calls = PrivdServerTransport::new(theirs).expect("a socket");
            matches!(calls.next().await, Some(Ok(_)))
        }),
    }
}

/// Whether it is understood; what is, is understood again when it is sent on.
fn received_again<T: Serialize + DeserializeOwned>(ours: &OwnedFd, theirs: &OwnedFd) -> bool {
    let Ok((message, _)) = ipc::receive::<T>(theirs.as_fd()) else {
        return false;
    };
    ipc::send(ours.as_fd(), &message).expect("what fitted a packet");
    ipc::receive::<T>(theirs.as_fd()).expect("what we sent");
    true
}

/// All that a guest sends back to a call: which call by the first byte. Whatever it is, the call ends with it.
pub fn guest_answer(bytes: &[u8]) {
    let _: bool = judge_answer(bytes);
}

/// Whether the call succeeds.
fn judge_answer(bytes: &[u8]) -> bool {
    let [which, answer @ ..] = bytes else {
        return false;
    };
    in_runtime(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let guest = Guest::new(listener.local_addr().expect("it is bound"), Token::random());
        let answers = async {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                // A call is sent in one piece; what of it is read here does not matter.
                let mut asked = [0; 4096];
                drop(stream.read(&mut asked).await);
                drop(stream.write_all(answer).await);
            }
        };
        tokio::select! {
            succeeds = call(&guest, which % 5) => succeeds,
            never = answers => never,
        }
    })
}

async fn call(guest: &Guest, which: u8) -> bool {
    match which {
        0 => guest.metrics().await.is_ok(),
        1 => guest.freeze().await.is_ok(),
        2 => guest.list_dir("/".into(), 1).await.is_ok(),
        3 => match guest.read_file("/a").await {
            Ok(file) => file.whole(1 << 20).await.is_ok(),
            Err(_) => false,
        },
        _ => match guest.start(Command::default()).await {
            Ok(mut events) => loop {
                match events.next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            },
            Err(_) => false,
        },
    }
}

fn in_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(work)
}

/// A layer of somebody's image.
pub fn archive(bytes: &[u8]) {
    template::judge_archive(bytes);
}

/// What `docker save` wrote, or an OCI image layout in an archive.
pub fn image(bytes: &[u8]) {
    template::judge_image(bytes);
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    /// Changes of each seed.
    const CHANGES: u64 = 3000;

    fn corpus(target: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../fuzz/corpus")
            .join(target)
    }

    /// One to four changes: bits, numbers at their edges, cuts, repetitions, and parts of another seed.
    fn changed(seeds: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
        let mut bytes = seeds[random.usize(..seeds.len())].clone();
        for _ in 0..=random.usize(..4) {
            let at = random.usize(..bytes.len().max(1));
            match random.usize(..7) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << random.usize(..8),
                1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'/', b'.'][random.usize(..8)],
                2 => bytes.truncate(at),
                3 => {
                    let piece = bytes[at..(at + random.usize(..16)).min(bytes.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                4 => {
                    let number = ["-1", "18446744073709551615", "4096", "1e999", "null", "[]", "\u{e4}"];
                    bytes.splice(at..at, number[random.usize(..number.len())].bytes());
                }
                5 => {
                    let other = &seeds[random.usize(..seeds.len())];
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[random.usize(..other.len().max(1)).min(other.len())..]);
                }
                _ => drop(bytes.drain(at..(at + random.usize(..8)).min(bytes.len()))),
            }
        }
        bytes
    }

    #[test]
    fn the_corpora_and_what_is_near_them_are_survived() {
        for (number, (name, target)) in (1_u64..).zip(TARGETS) {
            let files = std::fs::read_dir(corpus(name)).unwrap_or_else(|error| panic!("no corpus of {name}: {error}"));
            let mut files: Vec<_> = files.flatten().map(|file| file.path()).collect();
            files.sort();
            let seeds: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).expect("a seed")).collect();
            assert!(!seeds.is_empty(), "{name} has no seeds");
            seeds.iter().for_each(|seed| target(seed));
            let mut random = fastrand::Rng::with_seed(number);
            for _ in 0..CHANGES {
                target(&changed(&seeds, &mut random));
            }
        }
    }

    #[test]
    fn each_target_takes_some_of_its_seeds() {
        // A corpus of nothing but what is refused at once would show nothing.
        let read = |name: &str, file: &str| std::fs::read(corpus(name).join(file)).expect("a seed");
        serde_json::from_slice::<Manifest>(&read("manifest", "whole")).expect("a manifest");
        serde_json::from_slice::<Record>(&read("record", "whole")).expect("a record");
        assert!(by_name::judge_hello(&read("client_hello", "whole")));
        assert!(snapshot::judge_state(&read("vmm_state", "whole")));
        assert!(template::judge_archive(&read("archive", "whole")));
        for whole in ["saved", "layout"] {
            // They are for one kind of machine.
            assert_eq!(
                template::judge_image(&read("image", whole)),
                cfg!(target_arch = "x86_64")
            );
        }
        assert!(proxy::judge_path(&Uri::from_static("/proxy/cl-a/80/b?c")));
        for packet in [
            "launch",
            "publish",
            "lent",
            "hello",
            "open_disk",
            "open_network",
            "set_policy",
        ] {
            assert!(judge_packet(&read("packet", packet)), "{packet}");
        }
        for answer in ["metrics", "held", "list", "file", "chunked", "process"] {
            assert!(judge_answer(&read("guest_answer", answer)), "{answer}");
        }
    }
}
