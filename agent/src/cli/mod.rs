//! The command line, `roost`: sandboxes of one host, by hand, over the same API that a control plane uses.
//!
//! Exit status: 0, 1 when something failed, 2 for a wrong command line. `roost doctor` has 1 for warnings and 2 for problems. `roost exec` has the
//! command's own, and 125 when it could not be run at all.

mod client;
mod copy;
mod create;
mod doctor;
mod egress;
mod exec;
mod forward;
mod output;
mod sandboxes;
pub(crate) mod template;
mod top;

use std::io;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use connectrpc::{ConnectError, ErrorCode};

use crate::errors::Chain;
use crate::pki;
use client::ClientError;
use copy::{Copy, CopyError};
use create::{Create, Run, pair};
use doctor::Doctor;
use egress::Egress;
use exec::{Exec, ExecError};
use forward::Forward;
use output::{age, print, print_json, table};
use roost_hostagent::hostagent::v1::{DeleteSnapshotRequest, PingSandboxRequest};
use sandboxes::{Capture, Resume, Template};
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
struct InSandbox {
    #[command(flatten)]
    exec: Exec,
    /// The sandbox
    id: String,
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
            let wish = create::resolved(|| client::connect_operator(&host, &pki), wish).await?;
            create::create(&client()?, wish, json).await?;
        }
        Command::Ls => sandboxes::list(&client()?, json).await?,
        Command::Exec(InSandbox { exec, id, command }) => {
            let operator = client::connect_operator(&host, &pki)?;
            return exec::exec((&client()?, &operator), id, exec, command, json).await;
        }
        Command::Run(mut wish) => {
            let operator = client::connect_operator(&host, &pki)?;
            wish.create = create::resolved(|| Ok(operator.clone()), wish.create).await?;
            return create::run_once((&client()?, &operator), wish).await;
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
        Command::Logs { vmm, id } => sandboxes::logs(&client::connect_operator(&host, &pki)?, id, vmm).await?,
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
        Command::Pause { ids } => return sandboxes::pause(&client()?, ids).await,
        Command::Resume(wish) => sandboxes::resume(&client()?, wish, json).await?,
        Command::Snapshot(wish) => sandboxes::snapshot(&client()?, wish, json).await?,
        Command::Flatten(wish) => sandboxes::flatten(&client()?, wish, json).await?,
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
        Command::Rm { ids } => return sandboxes::remove(&client()?, ids).await,
        Command::Why { id } => sandboxes::why(&client::connect_operator(&host, &pki)?, id, json).await?,
        Command::Drain => return sandboxes::drain(&client::connect_operator(&host, &pki)?, json).await,
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
}
