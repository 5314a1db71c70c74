//! Sandboxes that are there: listed, paused, resumed, made templates of, destroyed; what they wrote, and why they ended.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::Args;
use connectrpc::ConnectError;

use super::client::{Client, Operator};
use super::output::{age, print_size, table};
use super::{CliError, print, print_json, words};
use crate::sandbox::unix_now;
use roost_hostagent::hostagent::v1::{
    CreateSnapshotRequest, DestroySandboxRequest, FlattenRootfsRequest, ListSandboxesRequest, PauseSandboxRequest,
    ResumeSandboxRequest, SandboxInfo,
};
use roost_hostagent::roost::v1::{DrainRequest, LogsRequest, WhyRequest};

#[derive(Args)]
pub(super) struct Resume {
    /// Boot from its disk and give its memory up
    #[arg(long)]
    disk_only: bool,
    /// Another number of seconds without activity until it is paused [default: as before]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i32>,
    /// The sandbox
    id: String,
}

#[derive(Args)]
pub(super) struct Template {
    /// UUID of the template
    #[arg(long, value_name = "UUID")]
    pub(super) template: String,
    /// UUID of the team that it belongs to
    #[arg(long, value_name = "UUID", default_value = "")]
    pub(super) team: String,
}

#[derive(Args)]
pub(super) struct Capture {
    #[command(flatten)]
    template: Template,
    /// A name for people
    #[arg(long, default_value = "")]
    name: String,
    /// The sandbox
    id: String,
}

pub(super) async fn list(client: &Client, json: bool) -> Result<(), CliError> {
    let answer = client
        .list_sandboxes(ListSandboxesRequest::default())
        .await?
        .into_owned();
    if json {
        return print_json(&answer);
    }
    let header = ["ID", "STATUS", "VCPUS", "MEMORY", "ADDRESS", "AGE"].map(str::to_owned);
    let rows = answer.sandboxes.iter().chain(&answer.paused_sandboxes).map(row);
    table(std::iter::once(header).chain(rows).collect())
}

fn row(sandbox: &SandboxInfo) -> [String; 6] {
    [
        sandbox.sandbox_id.clone(),
        sandbox.status.clone(),
        sandbox.vcpus.to_string(),
        format!("{} MiB", sandbox.memory_mb),
        sandbox.host_ip.clone(),
        age(unix_now().saturating_sub(sandbox.created_at_unix)),
    ]
}

pub(super) async fn remove(client: &Client, ids: Vec<String>) -> Result<ExitCode, CliError> {
    each(ids, async |id| {
        let request = DestroySandboxRequest {
            sandbox_id: id,
            ..DestroySandboxRequest::default()
        };
        client.destroy_sandbox(request).await.map(drop)
    })
    .await
}

pub(super) async fn pause(client: &Client, ids: Vec<String>) -> Result<ExitCode, CliError> {
    each(ids, async |id| {
        let request = PauseSandboxRequest {
            sandbox_id: id,
            ..PauseSandboxRequest::default()
        };
        client.pause_sandbox(request).await.map(drop)
    })
    .await
}

/// Calls for one sandbox after the other; a failure is told, and the others have their turn.
async fn each(ids: Vec<String>, call: impl AsyncFn(String) -> Result<(), ConnectError>) -> Result<ExitCode, CliError> {
    let mut code = ExitCode::SUCCESS;
    for id in ids {
        if let Err(error) = call(id.clone()).await {
            eprintln!("roost: {id}: {}", words(&error));
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

pub(super) async fn resume(client: &Client, wish: Resume, json: bool) -> Result<(), CliError> {
    let request = ResumeSandboxRequest {
        sandbox_id: wish.id,
        timeout_sec: wish.timeout.unwrap_or_default(),
        disk_only: wish.disk_only,
        ..ResumeSandboxRequest::default()
    };
    let answer = client.resume_sandbox(request).await?.into_owned();
    if json { print_json(&answer) } else { Ok(()) }
}

pub(super) async fn snapshot(client: &Client, wish: Capture, json: bool) -> Result<(), CliError> {
    let request = CreateSnapshotRequest {
        sandbox_id: wish.id,
        name: wish.name,
        team_id: wish.template.team,
        template_id: wish.template.template,
        ..CreateSnapshotRequest::default()
    };
    let answer = client.create_snapshot(request).await?.into_owned();
    if json {
        print_json(&answer)
    } else {
        print_size(answer.size_bytes)
    }
}

pub(super) async fn flatten(client: &Client, wish: Capture, json: bool) -> Result<(), CliError> {
    let request = FlattenRootfsRequest {
        sandbox_id: wish.id,
        name: wish.name,
        team_id: wish.template.team,
        template_id: wish.template.template,
        ..FlattenRootfsRequest::default()
    };
    let answer = client.flatten_rootfs(request).await?.into_owned();
    if json {
        print_json(&answer)
    } else {
        print_size(answer.size_bytes)
    }
}

/// What a guest wrote is for its reader to handle: a terminal that shows it does what it says.
pub(super) async fn logs(client: &Operator, id: String, vmm: bool) -> Result<(), CliError> {
    let request = LogsRequest {
        sandbox_id: id,
        vmm,
        ..LogsRequest::default()
    };
    let content = client.logs(request).await?.into_owned().content;
    let mut out = io::stdout();
    if out.is_terminal() {
        let shown = |byte: &u8| matches!(byte, b'\n' | b'\t' | b' '..=b'~');
        // A console ends its lines with both.
        let printed = content.iter().filter(|byte| **byte != b'\r');
        let safe: Vec<u8> = printed.map(|byte| if shown(byte) { *byte } else { b'?' }).collect();
        out.write_all(&safe)?;
    } else {
        out.write_all(&content)?;
    }
    Ok(out.flush()?)
}

pub(super) async fn why(client: &Operator, id: String, json: bool) -> Result<(), CliError> {
    let request = WhyRequest {
        sandbox_id: id,
        ..WhyRequest::default()
    };
    let answer = client.why(request).await?.into_owned();
    if json {
        return print_json(&answer);
    }
    print(format_args!(
        "{}: {} ({}), {} ago, {} after it was made\n",
        answer.sandbox_id,
        answer.summary,
        answer.reason,
        age(unix_now().saturating_sub(answer.ended_at_unix)),
        age(answer.ended_at_unix.saturating_sub(answer.created_at_unix)),
    ))?;
    for (what, tail) in [("console", &answer.console_tail), ("VMM's log", &answer.vmm_log_tail)] {
        if !tail.is_empty() {
            print(format_args!("\nthe end of the {what}:\n{tail}\n"))?;
        }
    }
    Ok(())
}

pub(super) async fn drain(client: &Operator, json: bool) -> Result<ExitCode, CliError> {
    let answer = client.drain(DrainRequest::default()).await?.into_owned();
    if json {
        print_json(&answer)?;
    } else {
        for (became, ids) in [
            ("paused", &answer.paused_sandbox_ids),
            ("destroyed", &answer.destroyed_sandbox_ids),
            ("FAILED", &answer.failed_sandbox_ids),
        ] {
            for id in ids {
                print(format_args!("{id}  {became}\n"))?;
            }
        }
    }
    Ok(if answer.failed_sandbox_ids.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
