//! The guest agent's protocol: what the host agent asks of `envd`, and what `envd` answers.
//!
//! [`process`] and [`filesystem`] are the Connect services, generated from `proto/`: messages, clients for the agent,
//! the service traits for `envd`. The types below are the bodies of the plain HTTP calls beside them. All of it is a
//! published wire format, so the agent also works with another envd in the guest: every field that we read may be
//! absent, and fields we do not know are ignored.
//!
//! Not here: when to call what (the agent), what a call does (`envd`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::let_underscore_must_use,
    reason = "generated code"
)]
mod generated {
    connectrpc::include_generated!("guest_proto.rs");
}

pub use generated::{filesystem, process};

/// The TCP port that envd listens on, in every guest.
pub const PORT: u16 = 49983;

/// The request header that carries the access token, once [`InitRequest::access_token`] has set one.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";

/// The response header of `GET /health` that names envd's version.
pub const VERSION_HEADER: &str = "x-envd-version";

/// The request header of streams: the longest silence, in whole seconds, before envd sends a `keepalive` event.
pub const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

/// `GET`: [`Health`] or nothing, with [`VERSION_HEADER`]; any 2xx means ready.
pub const HEALTH_PATH: &str = "/health";

/// `POST`: [`InitRequest`].
pub const INIT_PATH: &str = "/init";

/// `GET`: [`Metrics`].
pub const METRICS_PATH: &str = "/metrics";

/// `GET`: a JSON object, the default environment of processes.
pub const ENVS_PATH: &str = "/envs";

/// The contents of files. The query has `path`, `username`, and, in place of the token, `signature` and
/// `signature_expiration`; request headers `x-metadata-*` become attributes of the file.
///
/// `GET`: the file, by range and compressed where the headers ask for it. `POST`: an `application/octet-stream`, or a
/// multipart form with fields `file`; compressed too. Answers with a JSON list of name, type and path.
pub const FILES_PATH: &str = "/files";

/// `POST`: joins the files `source_paths` to `destination`, and removes them.
pub const FILES_COMPOSE_PATH: &str = "/files/compose";

/// `POST`, before the VM is paused: settles what should not be in flight in a snapshot. Writes what is dirty, drops what is
/// only cached, and ends the connections that are open: idle ones at once, others after the answer that they are giving.
///
/// Answers: 204; 500 not all is written yet. It goes on, and a repeated call waits for the same.
pub const SNAPSHOT_PREPARE_PATH: &str = "/snapshot/prepare";

/// `POST`, after [`SNAPSHOT_PREPARE_PATH`]: stops the programs of the guest, then freezes the filesystems that are on disks.
/// Until [`FSTHAW_PATH`] no program runs and nothing in the guest writes to these, which holds across a snapshot and a
/// restore: guests that wake from one snapshot draw no random number before `POST /init` has made them differ. Calls that
/// start a program wait; those that only read, and `POST /init`, are answered as ever. May be repeated.
///
/// Answers: 204, with [`HELD_HEADER`]; 404 an envd that cannot; 500 a filesystem cannot be frozen: then this call has frozen
/// none, and the programs go on.
pub const FSFREEZE_PATH: &str = "/fsfreeze";

/// `POST`: undoes [`FSFREEZE_PATH`]: thaws, then writes the files that `POST /init` could not meanwhile, then lets the
/// programs go on. May be repeated, also where nothing is frozen.
///
/// Answers: 204; 404 an envd that cannot; 500 a filesystem is still frozen, others may not be; the programs go on.
pub const FSTHAW_PATH: &str = "/fsthaw";

/// The response header of [`FSFREEZE_PATH`] that says which programs were stopped: a word of [`Held`]. An envd that freezes
/// filesystems alone does not send it.
pub const HELD_HEADER: &str = "x-roost-held";

/// Which programs of a guest [`FSFREEZE_PATH`] has stopped. A snapshot is whole whatever it says; it is to be woken more than
/// once only where all were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// All but envd.
    All,
    /// Not surely all: some wait in the kernel, for a disk or a network, or could not be moved.
    Some,
    /// None: the guest's kernel has no cgroup v2, or the machine is not envd's.
    None,
}

impl Held {
    /// The word in the header.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Held::All => "all",
            Held::Some => "some",
            Held::None => "none",
        }
    }

    /// What a word says; nothing for one that is not known, as where there is none.
    #[must_use]
    pub fn of_word(word: &[u8]) -> Option<Self> {
        [Held::All, Held::Some, Held::None]
            .into_iter()
            .find(|held| held.word().as_bytes() == word)
    }
}

/// The response header of `POST /init` that repeats [`InitRequest::nonce`]. It is there once clock, entropy and identity
/// have all been applied and a block of the root disk was read. An envd that knows no nonce does not send it.
pub const NONCE_HEADER: &str = "x-roost-nonce";

/// Most bytes of [`InitRequest::nonce`].
pub const MAX_NONCE: usize = 64;

/// Most bytes of entropy that one [`InitRequest`] may carry.
pub const MAX_ENTROPY: usize = 4096;

/// The body of `POST /init`: who the guest is, and what it can have learnt from nobody else. Sent after every boot and
/// every restore. What is absent stays as it was.
///
/// Answers: 204, with [`NONCE_HEADER`] where there is a nonce; 400 a body that is not this; 401 a token other than the one
/// set before; 500 a part could not be applied, or the root disk not be read: to be repeated.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InitRequest {
    /// The default environment of processes; replaces the one given before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// From now on required of every call but `GET /health`, as [`ACCESS_TOKEN_HEADER`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The host's clock. Written as RFC 3339; read as that, or as seconds since 1970.
    #[serde(with = "timestamp", skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<SystemTime>,
    /// Runs the processes of calls that name no user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// Where processes of calls that name no directory start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
    /// Changes with every boot and restore: tells envd that a clock that went back is meant, and that nobody is at the
    /// other end of the connections that are open; they end soon after the answer.
    #[serde(rename = "lifecycleID", skip_serializing_if = "Option::is_none")]
    pub lifecycle_id: Option<String>,
    /// Seen in the guest as `E2B_SANDBOX_ID` and `WRENN_SANDBOX_ID`. roost's own field.
    #[serde(rename = "sandboxID", skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// Seen in the guest as `E2B_TEMPLATE_ID` and `WRENN_TEMPLATE_ID`. roost's own field.
    #[serde(rename = "templateID", skip_serializing_if = "Option::is_none")]
    pub template_id: Option<String>,
    /// Mixed into the kernel's random pool, which is then reseeded: two guests woken from one snapshot would otherwise
    /// draw the same numbers. At most [`MAX_ENTROPY`] bytes, base64 on the wire. roost's own field.
    #[serde(with = "buffa::json_helpers::bytes", skip_serializing_if = "Vec::is_empty")]
    pub entropy: Vec<u8>,
    /// The resolvers of `/etc/resolv.conf`, in order; an empty list empties the file. roost's own field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Vec<IpAddr>>,
    /// Has the answer prove that the guest that gives it has woken and reaches its disk: see [`NONCE_HEADER`]. 1 to
    /// [`MAX_NONCE`] bytes of printable ASCII without spaces, which a header would lose. roost's own field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
}

/// Says which fields are there: the token, the environment and the entropy are nobody's business in a log.
impl std::fmt::Debug for InitRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InitRequest")
            .field("env_vars", &self.env_vars.as_ref().map(BTreeMap::len))
            .field("access_token", &self.access_token.as_ref().map(|_| "..."))
            .field("timestamp", &self.timestamp)
            .field("default_user", &self.default_user)
            .field("default_workdir", &self.default_workdir)
            .field("lifecycle_id", &self.lifecycle_id)
            .field("sandbox_id", &self.sandbox_id)
            .field("template_id", &self.template_id)
            .field("entropy", &self.entropy.len())
            .field("dns", &self.dns)
            .field("nonce", &self.nonce)
            .finish()
    }
}

/// The optional body of `GET /health`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// envd's version, as in [`VERSION_HEADER`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// The answer to `GET /metrics`. Sizes are bytes unless the name says otherwise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// The guest's clock, in seconds since 1970.
    pub ts: i64,
    /// Processors that are on line.
    pub cpu_count: u32,
    /// Use of all processors since the call before, 0 to 100.
    pub cpu_used_pct: f64,
    /// Memory that the kernel manages.
    pub mem_total: u64,
    /// Memory that is not available to new work.
    pub mem_used: u64,
    /// Page cache, which the kernel gives back when it needs to.
    pub mem_cache: u64,
    /// [`Metrics::mem_total`] in MiB.
    pub mem_total_mib: u64,
    /// [`Metrics::mem_used`] in MiB.
    pub mem_used_mib: u64,
    /// Used on the root filesystem.
    pub disk_used: u64,
    /// Size of the root filesystem.
    pub disk_total: u64,
}

/// A time as RFC 3339, or, from hosts that send it so, as a number of seconds.
mod timestamp {
    use std::time::{Duration, SystemTime};

    use buffa_types::google::protobuf::Timestamp;
    use serde::de::{Deserializer, Error, IntoDeserializer, Visitor};
    use serde::{Deserialize, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
        time.map(Timestamp::from).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SystemTime>, D::Error> {
        deserializer.deserialize_any(TimeVisitor)
    }

    struct TimeVisitor;

    impl<'de> Visitor<'de> for TimeVisitor {
        type Value = Option<SystemTime>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an RFC 3339 time or a number of seconds since 1970")
        }

        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
            let stamp = Timestamp::deserialize(IntoDeserializer::<E>::into_deserializer(text))?;
            SystemTime::try_from(stamp).map(Some).map_err(E::custom)
        }

        fn visit_u64<E: Error>(self, seconds: u64) -> Result<Self::Value, E> {
            after_epoch(Duration::from_secs(seconds))
        }

        fn visit_f64<E: Error>(self, seconds: f64) -> Result<Self::Value, E> {
            after_epoch(Duration::try_from_secs_f64(seconds).map_err(E::custom)?)
        }
    }

    fn after_epoch<E: Error>(age: Duration) -> Result<Option<SystemTime>, E> {
        SystemTime::UNIX_EPOCH
            .checked_add(age)
            .map(Some)
            .ok_or_else(|| E::custom("the time is out of range"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sample() -> InitRequest {
        InitRequest {
            env_vars: Some(BTreeMap::from([("LANG".to_owned(), "C.UTF-8".to_owned())])),
            access_token: Some("token".to_owned()),
            timestamp: Some(SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 250_000_000)),
            default_user: Some("user".to_owned()),
            default_workdir: Some("/home/user".to_owned()),
            lifecycle_id: Some("l1".to_owned()),
            sandbox_id: Some("s1".to_owned()),
            template_id: Some("t1".to_owned()),
            entropy: vec![0xfb, 0xff, 0],
            dns: Some(vec!["192.0.2.1".parse().unwrap()]),
            nonce: Some("n1".to_owned()),
        }
    }

    #[test]
    fn init_has_the_field_names_of_the_wire() {
        let json = serde_json::to_value(sample()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "envVars": {"LANG": "C.UTF-8"},
                "accessToken": "token",
                "timestamp": "2023-11-14T22:13:20.250Z",
                "defaultUser": "user",
                "defaultWorkdir": "/home/user",
                "lifecycleID": "l1",
                "sandboxID": "s1",
                "templateID": "t1",
                "entropy": "+/8A",
                "dns": ["192.0.2.1"],
                "nonce": "n1",
            })
        );
        assert_eq!(serde_json::from_value::<InitRequest>(json).unwrap(), sample());
    }

    #[test]
    fn init_of_nothing_is_an_empty_object_and_unknown_fields_are_ignored() {
        assert_eq!(serde_json::to_string(&InitRequest::default()).unwrap(), "{}");
        let parsed: InitRequest = serde_json::from_str(r#"{"volumeMounts": [], "timestamp": null}"#).unwrap();
        assert_eq!(parsed, InitRequest::default());
    }

    #[test]
    fn times_are_read_as_rfc_3339_or_as_seconds() {
        let at = |json: &str| {
            serde_json::from_str::<InitRequest>(&format!(r#"{{"timestamp": {json}}}"#))
                .unwrap()
                .timestamp
        };
        let expected = Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_500));
        assert_eq!(at(r#""2023-11-14T22:13:20.5Z""#), expected);
        assert_eq!(at(r#""2023-11-15T00:13:20.500000000+02:00""#), expected);
        assert_eq!(at("1700000000.5"), expected);
        assert_eq!(
            at("1700000000"),
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
        );
        for bad in [
            r#""yesterday""#,
            "-1",
            "1e300",
            "18446744073709551615",
            "true",
            r#""1700000000""#,
        ] {
            let json = format!(r#"{{"timestamp": {bad}}}"#);
            assert!(serde_json::from_str::<InitRequest>(&json).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn the_debug_form_shows_no_secret() {
        let shown = format!("{:?}", sample());
        assert!(
            !shown.contains("token\"") && !shown.contains("C.UTF-8") && !shown.contains("251"),
            "{shown}"
        );
    }

    #[test]
    fn what_was_held_survives_its_word() {
        for held in [Held::All, Held::Some, Held::None] {
            assert_eq!(Held::of_word(held.word().as_bytes()), Some(held));
        }
        assert_eq!(Held::of_word(b"ALL"), None);
    }

    #[test]
    fn metrics_of_an_older_envd_lack_fields() {
        let parsed: Metrics =
            serde_json::from_str(r#"{"ts": 1, "cpu_count": 2, "mem_total_mib": 512, "new": 1}"#).unwrap();
        assert_eq!(
            (parsed.ts, parsed.cpu_count, parsed.mem_total_mib, parsed.mem_used),
            (1, 2, 512, 0)
        );
    }

    #[test]
    fn messages_survive_both_codecs() {
        use buffa::Message as _;
        use process::{ProcessConfig, StartRequest};
        let request = StartRequest {
            process: ProcessConfig {
                cmd: "/bin/true".to_owned(),
                args: vec!["-x".to_owned()],
                cwd: Some("/".to_owned()),
                ..Default::default()
            }
            .into(),
            stdin: Some(false),
            ..Default::default()
        };
        assert_eq!(
            StartRequest::decode_from_slice(&request.encode_to_vec()).unwrap(),
            request
        );
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<StartRequest>(&json).unwrap(), request);
    }
}
