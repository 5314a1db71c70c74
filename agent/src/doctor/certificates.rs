//! Certificates and keys: how long they hold, and who can read them.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use super::{Finding, Host};
use crate::control::credentials::{Credentials, Life, life_of};
use crate::host::files::Layout;

/// Seconds of a day.
const DAY: i64 = 24 * 60 * 60;
/// Time before its end at which a certificate is spoken of, but for those that hold less than ten times as long.
const SOON: i64 = 30 * DAY;

const OWN: &str = "certificates";
const GIVEN: &str = "control plane";

pub(super) fn own(host: &Host) -> Vec<Finding> {
    let dir = &host.config.pki_dir;
    let is_registered = host.metadata(credentials(host)).is_ok();
    let advice = "make others: move the files in there away, roost pki init, systemctl reload roost-agent";
    let mut findings = Vec::new();
    for (name, needed) in [("ca.pem", true), ("server.pem", true), ("client.pem", false)] {
        let path = dir.join(name);
        match host.read(&path) {
            Ok(pem) => findings.extend(judge_chain(OWN, &path, &pem, host.now, advice)),
            Err(unseen) if unseen.is_missing() && needed && !is_registered => findings.push(Finding::problem(
                OWN,
                format!("there is no {}: the agent does not start", path.display()),
                "roost pki init, or register this host at a control plane (roost-agent --register)",
            )),
            // A host that only the control plane calls has none, and one whose callers are elsewhere none for clients.
            Err(unseen) if unseen.is_missing() => {}
            Err(unseen) => findings.push(Finding::not_checked(OWN, unseen)),
        }
    }
    for name in ["server-key.pem", "client-key.pem", "ca-key.pem"] {
        findings.extend(judge_key(host, OWN, &dir.join(name)));
    }
    findings
}

/// A private key that others can read is theirs as well.
fn judge_key(host: &Host, check: &'static str, path: &Path) -> Option<Finding> {
    let shown = path.display();
    match host.metadata(path) {
        Ok(metadata) if metadata.mode() & 0o007 != 0 => Some(Finding::problem(
            check,
            format!(
                "{shown} has mode {:04o}: every user of this host can read it",
                metadata.mode() & 0o7777
            ),
            format!("chmod o= {shown}, and make another where this host has users that you do not trust"),
        )),
        Ok(_) => Some(Finding::ok(check, format!("{shown} is closed to others"))),
        Err(unseen) if unseen.is_missing() => None,
        Err(unseen) => Some(Finding::not_checked(check, unseen)),
    }
}

fn judge_chain(check: &'static str, path: &Path, pem: &str, now: i64, advice: &str) -> Vec<Finding> {
    let certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let lives: Option<Vec<_>> = certificates.ok().map(|all| all.iter().map(life_of).collect());
    match lives.and_then(|lives| lives.into_iter().collect::<Option<Vec<Life>>>()) {
        Some(lives) if !lives.is_empty() => lives
            .iter()
            .map(|life| judge_life(check, path, life, now, advice))
            .collect(),
        Some(_) | None => vec![Finding::problem(
            check,
            format!("{} holds no certificate that can be read", path.display()),
            advice,
        )],
    }
}

fn judge_life(check: &'static str, path: &Path, life: &Life, now: i64, advice: &str) -> Finding {
    let (shown, left) = (path.display(), life.until - now);
    let soon = SOON.min((life.until - life.from) / 10);
    if life.from > now {
        Finding::problem(
            check,
            format!("{shown} holds only in {}", span(life.from - now)),
            "set the clock of this host right, or of the one that made it",
        )
    } else if left <= 0 {
        Finding::problem(check, format!("{shown} expired {} ago", span(-left)), advice)
    } else if left < soon {
        Finding::warning(check, format!("{shown} holds for {} more", span(left)), advice)
    } else {
        Finding::ok(check, format!("{shown} holds for {} more", span(left)))
    }
}

/// A time in days, or in minutes where it is less than two.
fn span(seconds: i64) -> String {
    if seconds < 2 * DAY {
        format!("{} minutes", seconds / 60)
    } else {
        format!("{} days", seconds / DAY)
    }
}

fn credentials(host: &Host) -> std::path::PathBuf {
    Layout::new(&host.config.dir, &host.config.vm_run_dir)
        .credentials()
        .join("credentials.json")
}

pub(super) fn control_plane(host: &Host) -> Vec<Finding> {
    let path = credentials(host);
    let advice = "the agent renews it while the control plane can be reached: journalctl -u roost-agent says why it has not; else \
                  delete the host there and register it anew";
    let text = match host.read(&path) {
        Ok(text) => text,
        Err(unseen) if unseen.is_missing() => {
            let finding = match &host.config.control_plane.url {
                Some(url) => Finding::warning(
                    GIVEN,
                    format!("this host is not registered at {url}"),
                    "roost-agent --register, and systemctl restart roost-agent",
                ),
                None => Finding::ok(GIVEN, "none: a host of its own"),
            };
            return vec![finding];
        }
        Err(unseen) => return vec![Finding::not_checked(GIVEN, unseen)],
    };
    let mut findings: Vec<_> = judge_key(host, GIVEN, &path).into_iter().collect();
    match serde_json::from_str::<Credentials>(&text) {
        Ok(credentials) => findings.extend(judge_chain(GIVEN, &path, &credentials.cert_pem, host.now, advice)),
        // Not the error: it may quote what is in there.
        Err(_) => findings.push(Finding::problem(
            GIVEN,
            format!("{} does not hold a host's credentials", path.display()),
            "restore the file from a backup; else delete the host at the control plane and register it anew",
        )),
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::host::fake::Fake;
    use super::super::{State, Text, worst};
    use super::*;

    #[test]
    fn certificates_are_spoken_of_before_their_end_and_after_it() {
        // `pki init` makes them for ten years from an hour ago.
        let mut fake = Fake::good();
        let made = fake.now;
        for (days, state, said) in [
            (0, State::Ok, "server.pem holds for 3649 days more"),
            (3_640, State::Warning, "server.pem holds for 9 days more"),
            (3_660, State::Problem, "server.pem expired 10 days ago"),
            (-30, State::Problem, "server.pem holds only in 29 days"),
        ] {
            fake.now = made + days * DAY + 60;
            let findings = own(&fake.host());
            assert_eq!(worst(&findings), state, "{}", Text(&findings));
            assert!(
                Text(&findings).to_string().contains(said),
                "{said:?} is not in\n{}",
                Text(&findings)
            );
        }
    }

    #[test]
    fn files_that_are_missing_broken_or_open_are_named() {
        let fake = Fake::good();
        fake.mode("etc/roost/pki/server-key.pem", 0o644);
        fake.write("etc/roost/pki/server.pem", "no PEM");
        fake.remove("etc/roost/pki/ca.pem");
        fake.remove("etc/roost/pki/client.pem");
        let text = Text(&own(&fake.host())).to_string();
        for said in [
            "no /etc/roost/pki/ca.pem",
            "server.pem holds no certificate",
            "server-key.pem has mode 0644",
        ] {
            assert!(text.contains(said), "{said:?} is not in\n{text}");
        }
        assert!(!text.contains("client.pem"), "{text}");
    }

    #[test]
    fn credentials_of_the_control_plane_are_judged_and_nothing_of_them_is_told() {
        let fake = Fake::good();
        fake.write("etc/roost/agent.toml", "control_plane.url = \"https://c.example\"");
        let findings = control_plane(&fake.host());
        assert!(
            findings[0].state == State::Warning && findings[0].said.contains("c.example"),
            "{findings:?}"
        );
        let path = "var/lib/roost/credentials/credentials.json";
        let certificate = std::fs::read_to_string(fake.at("etc/roost/pki/server.pem")).expect("a certificate");
        let text = serde_json::json!({
            "host_id": "h", "jwt": "s3cret", "refresh_token": "s3cret", "cert_pem": certificate,
            "key_pem": "s3cret", "ca_cert_pem": "x",
        });
        fake.write(path, &text.to_string());
        fake.mode(path, 0o600);
        let findings = control_plane(&fake.host());
        assert_eq!(worst(&findings), State::Ok, "{}", Text(&findings));
        // Without certificates of its own it serves its control plane.
        fake.remove("etc/roost/pki");
        assert!(own(&fake.host()).is_empty());
        fake.mode(path, 0o644);
        assert_eq!(worst(&control_plane(&fake.host())), State::Problem);
        fake.write(path, "{\"jwt\": \"s3cret\"");
        let said = Text(&control_plane(&fake.host())).to_string();
        assert!(said.contains("does not hold") && !said.contains("s3cret"), "{said}");
    }
}
