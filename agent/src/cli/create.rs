//! `roost create` and `roost run`.

use std::collections::HashMap;
use std::process::ExitCode;

use clap::Args;
use uuid::Uuid;

use super::client::{Client, ClientError, Operator};
use super::egress::Policy;
use super::exec::{self, Exec};
use super::template::{self, ResolveError};
use super::{CliError, print, print_json, words};
use roost_hostagent::hostagent::v1::{CreateSandboxRequest, DestroySandboxRequest};

#[derive(Args)]
pub(super) struct Create {
    /// Its id; the agent makes one otherwise
    #[arg(long)]
    id: Option<String>,
    /// UUID or name of the template; the minimal image otherwise
    #[arg(long, value_name = "TEMPLATE")]
    template: Option<String>,
    /// UUID of the team that the template belongs to
    #[arg(long, value_name = "UUID")]
    team: Option<String>,
    /// vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    vcpus: Option<i32>,
    /// Memory in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    memory: Option<i32>,
    /// Disk in MiB [default: the image's size]
    #[arg(long, value_name = "MIB")]
    disk: Option<i32>,
    /// Seconds without activity until it is paused [default: never]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i32>,
    /// The user that commands run as
    #[arg(long)]
    user: Option<String>,
    /// A variable of every command's environment; may be given several times
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    #[command(flatten)]
    policy: Policy,
}

#[derive(Args)]
pub(super) struct Run {
    #[command(flatten)]
    pub(super) create: Create,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Keep the sandbox when the command has ended
    #[arg(long)]
    keep: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// A wish whose template is a UUID. What looks like one is the agent's to judge; a name is looked up.
pub(super) async fn resolved(
    operator: impl FnOnce() -> Result<Operator, ClientError>,
    mut wish: Create,
) -> Result<Create, CliError> {
    let name = wish.template.take_if(|template| Uuid::try_parse(template).is_err());
    if let Some(name) = name {
        let team = wish.team.as_deref().map(Uuid::try_parse).transpose();
        let team = team.map_err(|_| ResolveError::None(name.clone()))?;
        let found = template::resolve(&operator()?, &name, team).await?;
        wish.template = Some(found.template_id);
        wish.team = Some(found.team_id);
    }
    Ok(wish)
}

pub(super) async fn create(client: &Client, wish: Create, json: bool) -> Result<(), CliError> {
    let answer = client.create_sandbox(create_request(wish)).await?.into_owned();
    if json {
        print_json(&answer)
    } else {
        print(format_args!("{}\n", answer.sandbox_id))
    }
}

fn create_request(wish: Create) -> CreateSandboxRequest {
    CreateSandboxRequest {
        sandbox_id: wish.id.unwrap_or_default(),
        template_id: wish.template.unwrap_or_default(),
        team_id: wish.team.unwrap_or_default(),
        vcpus: wish.vcpus.unwrap_or_default(),
        memory_mb: wish.memory.unwrap_or_default(),
        disk_size_mb: wish.disk.unwrap_or_default(),
        timeout_sec: wish.timeout.unwrap_or_default(),
        default_user: wish.user.unwrap_or_default(),
        default_env: wish.env.into_iter().collect::<HashMap<_, _>>().into_iter().collect(),
        egress: wish.policy.into_message().into(),
        ..CreateSandboxRequest::default()
    }
}

/// A command in a sandbox of its own; its exit status.
pub(super) async fn run_once((client, operator): (&Client, &Operator), wish: Run) -> Result<ExitCode, CliError> {
    let made = client.create_sandbox(create_request(wish.create)).await?.into_owned();
    let id = made.sandbox_id;
    let ended = exec::exec(
        (client, operator),
        id.clone(),
        Exec::of(wish.interactive, wish.tty),
        wish.command,
        false,
    )
    .await;
    if wish.keep {
        eprintln!("roost: {id} is kept");
        return ended;
    }
    let request = DestroySandboxRequest {
        sandbox_id: id.clone(),
        ..DestroySandboxRequest::default()
    };
    if let Err(error) = client.destroy_sandbox(request).await {
        eprintln!("roost: {id} was not destroyed: {}", words(&error));
        return ended.and(Ok(ExitCode::FAILURE));
    }
    ended
}

/// A variable, from `NAME=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("not of the form NAME=VALUE".to_owned()),
    }
}
