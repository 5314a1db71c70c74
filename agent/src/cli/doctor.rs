//! `roost doctor`: what is wrong with this machine, for people and for monitoring.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use roost_hostagent::hostagent::v1::ListSandboxesRequest;
use roost_hostagent::roost::v1::ReadyRequest;

use super::client::{Client, ClientError, Operator};
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
    operator: Result<Operator, ClientError>,
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
    let clients = client.and_then(|client| Ok((client, operator?)));
    let clients = clients.map_err(|error| Chain(&error).to_string());
    let first = doctor::suspects(&host, &list(&clients).await);
    let second = if first.as_ref().is_ok_and(|suspects| !suspects.is_empty()) {
        tokio::time::sleep(PAUSE).await;
        doctor::suspects(&host, &list(&clients).await)
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

/// The agent's sandboxes, paused ones too, and what it has made ahead.
async fn list(clients: &Result<(Client, Operator), String>) -> Result<Vec<Listed>, String> {
    let (client, operator) = clients.as_ref().map_err(Clone::clone)?;
    let answers = async {
        // First, so that what becomes a sandbox's meanwhile is in both.
        let ready = operator.ready(ReadyRequest::default()).await?.into_owned();
        let list = client.list_sandboxes(ListSandboxesRequest::default()).await?;
        Ok((ready, list.into_owned()))
    };
    let answers = tokio::time::timeout(LIST_LIMIT, answers)
        .await
        .map_err(|_| "the agent does not answer".to_owned())?;
    let (ready, list) = answers.map_err(|error| words(&error))?;
    let sandboxes = list.sandboxes.into_iter().chain(list.paused_sandboxes);
    let sandboxes = sandboxes.map(|sandbox| Listed {
        address: sandbox.host_ip.parse().ok(),
        id: Some(sandbox.sandbox_id),
    });
    let ready = ready.host_ips.iter().map(|address| Listed {
        address: address.parse().ok(),
        id: None,
    });
    Ok(sandboxes.chain(ready).collect())
}
