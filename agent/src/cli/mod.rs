//! The command line, `roost`: sandboxes of one host, by hand, over the same API that a control plane uses.
//!
//! Exit status: 0, 1 when something failed, 2 for a wrong command line. `roost doctor` has 1 for warnings and 2 for problems. `roost exec` has the command's own, and 125 when it could
//! not be run at all.

mod client;
mod copy;
mod doctor;
mod egress;
mod exec;
mod forward;
pub(crate) mod template;
mod top;

use std::collections::HashMap;
use std::io::{self, IsTerminal as _, Write};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use connectrpc::{ConnectError, ErrorCode};
use serde::Serialize;
use uuid::Uuid;

use crate::errors::Chain;
use crate::pki;
use crate::sandbox::unix_now;
use client::{Client, ClientError, Operator};
use copy::{Copy, CopyError};
use doctor::Doctor;
use egress::{Egress, Policy};
use exec::{Exec, ExecError};
use forward::Forward;
use roost_hostagent::hostagent::v1::{
    CreateSandboxRequest, CreateSnapshotRequest, DeleteSnapshotRequest, DestroySandboxRequest, FlattenRootfsRequest,
    ListSandboxesRequest, PauseSandboxRequest, PingSandboxRequest, ResumeSandboxRequest, SandboxInfo,
};
use roost_hostagent::roost::v1::{DrainRequest, LogsRequest, WhyRequest};
use template::build::BuildError;
use template::{ResolveError, Templates};

/// The exit status of an exec that could not be run.
const NOT_RUN: u8 = 125;

/// Sandboxes of one host.
#[derive(Parser)]
#[command(version, name = "roost")]
struct Arguments {
    /// The agent: host name or address, and port
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT",
        env = "ROOST_HOST",
        default_value = "127.0.0.1:50051"
    )]
    host: String,
    /// Directory with ca.pem, client.pem and client-key.pem
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "ROOST_PKI",
        default_value = "/etc/roost/pki"
    )]
    pki: PathBuf,
    /// Print the agent's answer as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a sandbox; prints its id once it takes commands
    Create(Create),
    /// List the sandboxes of the host
    Ls,
    /// Run a command in a sandbox; its output and exit status are passed on
    Exec(InSandbox),
    /// Make a sandbox, run a command in it, and destroy it again
    Run(Run),
    /// Copy files and directories into a sandbox or out of it
    Cp(Copy),
    /// Make ports of a sandbox ports of this machine, until it is interrupted
    Forward(Forward),
    /// Show what a sandbox may reach and which rules have dropped what; or change it, where a policy is given
    Egress(Egress),
    /// Print what a sandbox has written to its console, as far back as that is kept
    Logs {
        /// The messages of its VMM in place of its console
        #[arg(long)]
        vmm: bool,
        /// The sandbox
        id: String,
    },
    /// Show the sandboxes and what they use, again every second
    Top,
    /// Print a script that completes this command line in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages of this command line
    #[command(hide = true)]
    Man {
        /// Directory to write them to
        dir: PathBuf,
    },
    /// Count as activity of a sandbox
    Ping {
        /// The sandbox
        id: String,
    },
    /// Pause sandboxes: memory and disk are kept, and nothing runs
    Pause {
        /// The sandboxes
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Resume a paused sandbox where it was
    Resume(Resume),
    /// Make a template of a sandbox's memory and disk, from which others start where it is now; prints what it takes on disk
    Snapshot(Capture),
    /// Make a template of a sandbox's disk alone; prints what it takes on disk
    Flatten(Capture),
    /// Make templates of images, list them, look at them, delete them
    Template(Templates),
    /// Delete a template; sandboxes that were made of it keep what they need
    Rmi(Template),
    /// Say why a sandbox ended that nobody destroyed; known for a day
    Why {
        /// The sandbox
        id: String,
    },
    /// Empty the host: refuse new work and pause all sandboxes, until the agent is started anew
    Drain,
    /// Destroy sandboxes and delete all they have
    Rm {
        /// The sandboxes
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Look for what is wrong with this machine, and say what to do about it. Exit status: 0 where all is well, 1 for warnings, 2 for
    /// problems, as monitoring has it. Root sees more than others; what was not seen counts for nothing
    Doctor(Doctor),
    /// Certificates of a standalone host
    Pki {
        #[command(subcommand)]
        command: Pki,
    },
}

#[derive(Args)]
struct Create {
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
struct Resume {
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
struct Template {
    /// UUID of the template
    #[arg(long, value_name = "UUID")]
    template: String,
    /// UUID of the team that it belongs to
    #[arg(long, value_name = "UUID", default_value = "")]
    team: String,
}

#[derive(Args)]
struct Capture {
    #[command(flatten)]
    template: Template,
    /// A name for people
    #[arg(long, default_value = "")]
    name: String,
    /// The sandbox
    id: String,
}

#[derive(Args)]
struct InSandbox {
    #[command(flatten)]
    exec: Exec,
    /// The sandbox
    id: String,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    create: Create,
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

#[derive(Subcommand)]
enum Pki {
    /// Make a CA, a server certificate and a client certificate for the command line
    Init {
        /// Directory to make them in
        #[arg(long, value_name = "DIR", default_value = "/etc/roost/pki")]
        dir: PathBuf,
        /// A host name or address of this host, besides localhost; may be given several times
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
    },
    /// Make a certificate for one more client of this host, by the CA that `init` made. What it may do is for `client_names` and
    /// `viewer_names` of the agent's configuration to say
    Client {
        /// Directory of the CA
        #[arg(long, value_name = "DIR", default_value = "/etc/roost/pki")]
        ca: PathBuf,
        /// Days that it is valid
        #[arg(long, value_name = "DAYS", default_value = "365")]
        days: NonZeroU16,
        /// Its name
        name: String,
        /// Directory to write it to, for the client's `roost --pki`
        dir: PathBuf,
    },
}

/// What went wrong, as the person at the terminal is told.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{}", words(.0))]
    Call(ConnectError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error("not copied")]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error(transparent)]
    Pki(#[from] pki::PkiError),
    #[error("cannot write output")]
    Output(#[from] io::Error),
}

/// By hand, without naming the error as a source: its text is the whole of ours already.
impl From<ConnectError> for CliError {
    fn from(error: ConnectError) -> Self {
        Self::Call(error)
    }
}

/// What the agent or the transport said: of the agent's errors the text, which says it all.
fn words(error: &ConnectError) -> String {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(error) = inner.downcast_ref::<ClientError>() {
            return Chain(error).to_string();
        }
        source = inner.source();
    }
    // A part of the message may be a guest's; the terminal is not its to write to.
    let message = error
        .message
        .as_ref()
        .map(|message| message.replace(char::is_control, "?"));
    match (message, error.code) {
        (Some(message), ErrorCode::NotFound | ErrorCode::InvalidArgument | ErrorCode::AlreadyExists) => message,
        (Some(message), code) => format!("{message} ({})", code.as_str()),
        (None, code) => code.as_str().to_owned(),
    }
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("roost: {error}");
            return ExitCode::FAILURE;
        }
    };
    let failed = if matches!(arguments.command, Command::Exec(_) | Command::Run(_)) {
        ExitCode::from(NOT_RUN)
    } else {
        ExitCode::FAILURE
    };
    let code = runtime.block_on(run(arguments)).unwrap_or_else(|error| {
        eprintln!("roost: {}", Chain(&error));
        failed
    });
    // A thread that reads a terminal cannot be waited for.
    runtime.shutdown_background();
    code
}

async fn run(arguments: Arguments) -> Result<ExitCode, CliError> {
    let Arguments {
        host,
        pki,
        json,
        command,
    } = arguments;
    let client = || client::connect(&host, &pki);
    match command {
        Command::Create(wish) => {
            let wish = resolved(|| client::connect_operator(&host, &pki), wish).await?;
            create(&client()?, wish, json).await?;
        }
        Command::Ls => list(&client()?, json).await?,
        Command::Exec(InSandbox { exec, id, command }) => {
            let operator = client::connect_operator(&host, &pki)?;
            return exec::exec((&client()?, &operator), id, exec, command, json).await;
        }
        Command::Run(mut wish) => {
            let operator = client::connect_operator(&host, &pki)?;
            wish.create = resolved(|| Ok(operator.clone()), wish.create).await?;
            return self::run_once((&client()?, &operator), wish).await;
        }
        Command::Cp(wish) => copy::copy(&client()?, wish).await?,
        Command::Forward(wish) => forward::forward(client::connect_plain(&host, &pki)?, wish).await?,
        Command::Egress(wish) => {
            let answer = egress::egress(&client::connect_operator(&host, &pki)?, wish).await?;
            if json {
                print_json(&answer)?;
            } else {
                print(format_args!("{}", egress::text(&answer)))?;
            }
        }
        Command::Logs { vmm, id } => logs(&client::connect_operator(&host, &pki)?, id, vmm).await?,
        Command::Top => top::top(&client()?).await?,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "roost", &mut io::stdout());
        }
        Command::Man { dir } => clap_mangen::generate_to(Arguments::command(), dir)?,
        Command::Ping { id } => {
            let request = PingSandboxRequest {
                sandbox_id: id,
                ..PingSandboxRequest::default()
            };
            client()?.ping_sandbox(request).await?;
        }
        Command::Pause { ids } => return pause(&client()?, ids).await,
        Command::Resume(wish) => resume(&client()?, wish, json).await?,
        Command::Snapshot(wish) => snapshot(&client()?, wish, json).await?,
        Command::Flatten(wish) => flatten(&client()?, wish, json).await?,
        Command::Rmi(Template { template, team }) => {
            let request = DeleteSnapshotRequest {
                template_id: template,
                team_id: team,
                ..DeleteSnapshotRequest::default()
            };
            client()?.delete_snapshot(request).await?;
        }
        Command::Template(wish) => {
            let operator = client::connect_operator(&host, &pki)?;
            return template::run(&client()?, &operator, wish, json).await;
        }
        Command::Rm { ids } => return remove(&client()?, ids).await,
        Command::Why { id } => why(&client::connect_operator(&host, &pki)?, id, json).await?,
        Command::Drain => return drain(&client::connect_operator(&host, &pki)?, json).await,
        Command::Doctor(wish) => {
            let operator = client::connect_operator(&host, &pki);
            return doctor::doctor(client(), operator, wish, json).await;
        }
        Command::Pki {
            command: Pki::Init { dir, names },
        } => init(&dir, &names)?,
        Command::Pki {
            command: Pki::Client { ca, days, name, dir },
        } => {
            pki::client(&ca, &dir, &name, days)?;
            let files = pki::CLIENT_FILES.join(", ");
            print(format_args!(
                "wrote {files} to {}; let {name} in by client_names or viewer_names\n",
                dir.display()
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A wish whose template is a UUID. What looks like one is the agent's to judge; a name is looked up.
async fn resolved(
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

async fn create(client: &Client, wish: Create, json: bool) -> Result<(), CliError> {
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
async fn run_once((client, operator): (&Client, &Operator), wish: Run) -> Result<ExitCode, CliError> {
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

/// What a guest wrote is for its reader to handle: a terminal that shows it does what it says.
async fn logs(client: &Operator, id: String, vmm: bool) -> Result<(), CliError> {
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

async fn list(client: &Client, json: bool) -> Result<(), CliError> {
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

/// Prints rows in columns that are as wide as they must be.
fn table<const N: usize>(rows: Vec<[String; N]>) -> Result<(), CliError> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        print(format_args!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end()))?;
    }
    Ok(())
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

/// An age in its largest unit.
fn age(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{}s", seconds.max(0)),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

async fn remove(client: &Client, ids: Vec<String>) -> Result<ExitCode, CliError> {
    each(ids, async |id| {
        let request = DestroySandboxRequest {
            sandbox_id: id,
            ..DestroySandboxRequest::default()
        };
        client.destroy_sandbox(request).await.map(drop)
    })
    .await
}

async fn pause(client: &Client, ids: Vec<String>) -> Result<ExitCode, CliError> {
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

async fn resume(client: &Client, wish: Resume, json: bool) -> Result<(), CliError> {
    let request = ResumeSandboxRequest {
        sandbox_id: wish.id,
        timeout_sec: wish.timeout.unwrap_or_default(),
        disk_only: wish.disk_only,
        ..ResumeSandboxRequest::default()
    };
    let answer = client.resume_sandbox(request).await?.into_owned();
    if json { print_json(&answer) } else { Ok(()) }
}

async fn snapshot(client: &Client, wish: Capture, json: bool) -> Result<(), CliError> {
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

async fn flatten(client: &Client, wish: Capture, json: bool) -> Result<(), CliError> {
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

fn print_size(bytes: i64) -> Result<(), CliError> {
    print(format_args!("{} MiB\n", bytes.max(0).unsigned_abs().div_ceil(1 << 20)))
}

async fn why(client: &Operator, id: String, json: bool) -> Result<(), CliError> {
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

async fn drain(client: &Operator, json: bool) -> Result<ExitCode, CliError> {
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

fn init(dir: &Path, names: &[String]) -> Result<(), CliError> {
    pki::init(dir, names)?;
    print(format_args!("wrote {} to {}\n", pki::FILES.join(", "), dir.display()))?;
    // The agent runs as this user where roost is installed, and must read the server's key.
    if nix::unistd::geteuid().is_root()
        && let Ok(Some(user)) = nix::unistd::User::from_name("roost")
    {
        pki::give_server_key(dir, &user)?;
        print(format_args!("gave server-key.pem to user roost\n"))?;
    }
    Ok(())
}

fn print_json(answer: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(answer).map_err(io::Error::from)?;
    print(format_args!("{text}\n"))
}

/// Prints to standard output; `println!` would panic when the reader has gone.
fn print(text: std::fmt::Arguments<'_>) -> Result<(), CliError> {
    io::stdout().write_fmt(text).map_err(CliError::from)
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("not of the form NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Arguments as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn what_follows_the_id_is_the_command_options_included() {
        let parsed = Arguments::try_parse_from(["roost", "exec", "sb", "ls", "-l", "--json"]).expect("parsed");
        let Command::Exec(exec) = parsed.command else {
            panic!("no exec")
        };
        assert_eq!(exec.command, ["ls", "-l", "--json"]);
        assert!(!parsed.json);
        let parsed = Arguments::try_parse_from(["roost", "exec", "sb", "--", "--version"]).expect("parsed");
        let Command::Exec(exec) = parsed.command else {
            panic!("no exec")
        };
        assert_eq!(exec.command, ["--version"]);
    }

    #[test]
    fn ages_are_in_the_largest_unit_that_says_something() {
        for (seconds, text) in [
            (-5, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7200, "2h"),
            (200_000, "2d"),
        ] {
            assert_eq!(age(seconds), text);
        }
    }
}
