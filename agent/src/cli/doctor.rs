//! `roost doctor`: what is wrong with this machine, for people and for monitoring.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use roost_hostagent::hostagent::v1::ListSandboxesRequest;

use super::client::{Client, ClientError};
use super::{CliError, print, words};
use crate::doctor::{self, Host, Listed, State, Text};
use crate::errors::Chain;

/// Time between two looks for what is left over: what is being made or removed is on the agent's list, but for moments.
const PAUSE: Duration = Duration::from_secs(2);
/// Time for the agent's list.
const LIST_LIMIT: Duration = Duration::from_secs(10);

#[derive(Args)]
pub(super) struct Doctor {
    /// The agent's configuration file [default: /etc/roost/agent.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Looks at this machine and prints what it finds; the exit status says how bad that is: 0 well, 1 warnings, 2 problems.
pub(super) async fn doctor(
    client: Result<Client, ClientError>,
    wish: Doctor,
    json: bool,
) -> Result<ExitCode, CliError> {
    let (host, mut findings) = tokio::task::spawn_blocking(|| {
        let host = Host::of_machine(wish.config);
        let findings = doctor::examine(&host);
        (host, findings)
    })
    .await
    .expect("a look does not panic");
    let client = client.map_err(|error| Chain(&error).to_string());
    let first = doctor::suspects(&host, &list(&client).await);
    let second = if first.as_ref().is_ok_and(|suspects| !suspects.is_empty()) {
        tokio::time::sleep(PAUSE).await;
        doctor::suspects(&host, &list(&client).await)
    } else {
        first.clone()
    };
    findings.extend(doctor::confirmed(first, second));
    let worst = doctor::worst(&findings);
    if json {
        let report = serde_json::json!({ "state": worst, "findings": findings });
        print(format_args!("{report}\n"))?;
    } else {
        print(format_args!("{}", Text(&findings)))?;
    }
    Ok(ExitCode::from(match worst {
        State::Ok | State::NotChecked => 0,
        State::Warning => 1,
        State::Problem => 2,
    }))
}

/// The agent's sandboxes, paused ones too.
async fn list(client: &Result<Client, String>) -> Result<Vec<Listed>, String> {
    let client = client.as_ref().map_err(Clone::clone)?;
    let answer = client.list_sandboxes(ListSandboxesRequest::default());
    let answer = tokio::time::timeout(LIST_LIMIT, answer)
        .await
        .map_err(|_| "the agent does not answer".to_owned())?;
    let answer = answer.map_err(|error| words(&error))?.into_owned();
    let all = answer.sandboxes.into_iter().chain(answer.paused_sandboxes);
    Ok(all
        .map(|sandbox| Listed {
            address: sandbox.host_ip.parse().ok(),
            id: sandbox.sandbox_id,
        })
        .collect())
}
