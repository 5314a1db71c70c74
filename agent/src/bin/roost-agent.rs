//! The agent's daemon: reads its configuration, binds its listener, tidies up, serves. Or registers its host, and ends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Parser;
use roost_agent::api::service::Service;
use roost_agent::config::keys::default_file;
use roost_agent::config::{Address, Config, Sources};
use roost_agent::confine::{Confined, confine};
use roost_agent::control::credentials::{Secret, Store};
use roost_agent::control::register::register;
use roost_agent::control::standing::{self, Standing};
use roost_agent::control::url::Url;
use roost_agent::errors::Chain;
use roost_agent::host::files::Layout;
use roost_agent::host::{Host, ready};
use roost_agent::metrics::sampler;
use roost_agent::outbox::{self, Outbox};
use roost_agent::registry::Registry;
use roost_agent::reload::Reload;
use roost_agent::serve::{Access, serve};
use roost_agent::{recover, status, trace, watchdog, watermark};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Owns the sandboxes of this host and serves their API.
#[derive(Parser)]
#[command(version, name = "roost-agent")]
struct Arguments {
    /// Configuration file [default: /etc/roost/agent.toml, which may be missing]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Read the configuration and the certificates, say what is wrong with them, and end
    #[arg(long)]
    check_config: bool,
    /// Write all that holds, as TOML, with where each value is from, and end
    #[arg(long)]
    print_config: bool,
    /// Write a configuration file with every key, what it means and what it is by default, and end
    #[arg(long)]
    default_config: bool,
    /// Register this host at the control plane, and end. Without TOKEN it is read from --token-file, or from
    /// ROOST_REGISTRATION_TOKEN in the environment: other users of this host see a command line
    #[arg(long, value_name = "TOKEN", num_args = 0..=1, default_missing_value = "")]
    register: Option<String>,
    /// File with the token for --register
    #[arg(long, value_name = "FILE", requires = "register")]
    token_file: Option<PathBuf>,
    /// Where the control plane is [default: url in [control_plane] of the configuration, or where this host was registered]
    #[arg(long, value_name = "URL")]
    control_plane: Option<Url>,
    /// Address and port under which the control plane can call this host [default: address in [control_plane]]
    #[arg(long, value_name = "IP:PORT")]
    address: Option<Address>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.default_config {
        print!("{}", default_file());
        return Ok(());
    }
    let sources = arguments.sources();
    let loaded = sources.load();
    if arguments.check_config {
        let files = loaded
            .as_ref()
            .map_or_else(|problems| &problems.files, |loaded| &loaded.files);
        for file in files {
            println!("read {}", file.display());
        }
    }
    let loaded = loaded?;
    if arguments.print_config {
        print!("{}", loaded.describe());
        return Ok(());
    }
    let config = loaded.config;
    // Before there is a thread: both bind the calling one, and those that it starts.
    let confined = if arguments.register.is_some() || arguments.check_config {
        None
    } else {
        Some(confine(&config, &sources)?)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    // An exporter of traces works in the runtime.
    let (traces, lines) = {
        let _in_runtime = runtime.enter();
        trace::start(&config)?
    };
    match confined {
        Some(Confined::Not) => {
            tracing::warn!("the agent is not confined: its shims are its children, and would be with it")
        }
        Some(Confined::WithoutLandlock) => {
            tracing::warn!("this kernel has no Landlock: the agent keeps access to all files that its unit leaves it");
        }
        Some(Confined::Whole) | None => {}
    }
    if let Some(token) = arguments.register {
        let token = token_of(token, arguments.token_file)?;
        return runtime.block_on(register_host(&config, token));
    }
    let standing = Standing::load(&config)?;
    if arguments.check_config {
        println!("configuration and certificates can be used");
        return Ok(());
    }
    // A panic is a bug of ours that leaves a sandbox without its task; the next start puts everything in order.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let outcome = runtime.block_on(run(config, sources, lines, standing));
    if let Err(error) = traces.shutdown() {
        tracing::warn!(%error, "the last traces are lost");
    }
    // Not through the runtime's end: that would drop every task, and a dropped sandbox ends its VM. VMs outlive the agent.
    match outcome {
        Ok(End::Asked) => std::process::exit(0),
        Ok(End::Terminated) => std::process::exit(TERMINATED),
        Ok(End::Deleted) => std::process::exit(DELETED),
        Err(error) => {
            eprintln!("Error: {error:?}");
            std::process::exit(1)
        }
    }
}

impl Arguments {
    /// Where the configuration is from.
    fn sources(&self) -> Sources {
        let mut sources = Sources::of_process(self.config.clone());
        if let Some(url) = &self.control_plane {
            sources
                .options
                .push(("control_plane.url", "--control-plane", url.to_string()));
        }
        if let Some(address) = &self.address {
            let address = address.as_str().to_owned();
            sources.options.push(("control_plane.address", "--address", address));
        }
        sources
    }
}

/// Exit status after a Terminate, which its unit does not start again.
const TERMINATED: i32 = 3;
/// Exit status once the control plane has deleted this host, which its unit does not start again either.
const DELETED: i32 = 4;

/// Why the agent ends.
enum End {
    /// A signal asked for it; VMs run on.
    Asked,
    /// A control plane has given up this host, and nothing runs any more.
    Terminated,
    /// A control plane has deleted this host, and nothing runs any more.
    Deleted,
}

/// The registration token: as it was given, or of a file, or of the environment.
fn token_of(given: String, file: Option<PathBuf>) -> anyhow::Result<Secret> {
    let token = match (given, file) {
        (given, None) if !given.is_empty() => given,
        (given, Some(file)) if given.is_empty() => {
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?
        }
        (_, Some(_)) => bail!("a token and --token-file are one too many"),
        (_, None) => std::env::var("ROOST_REGISTRATION_TOKEN")
            .context("no token: give one to --register, or --token-file, or ROOST_REGISTRATION_TOKEN")?,
    };
    let token = token.trim();
    if token.is_empty() {
        bail!("the registration token is empty");
    }
    Ok(Secret::new(token.to_owned()))
}

async fn register_host(config: &Config, token: Secret) -> anyhow::Result<()> {
    let wanted = &config.control_plane;
    let url = wanted
        .url
        .clone()
        .context("no --control-plane, and no url in [control_plane]")?;
    let address = wanted
        .address
        .as_ref()
        .context("no --address, and no address in [control_plane]")?;
    let store = Store::new(&Layout::new(&config.dir, &config.vm_run_dir).credentials());
    let client = standing::client(config, url.clone())?;
    let registered = register(&client, &store, &config.dir, &token, address.as_str()).await?;
    println!(
        "registered at {url} as host {}; start roost-agent.service, or start it anew",
        registered.host_id
    );
    Ok(())
}

async fn run(config: Config, sources: Sources, lines: trace::Lines, standing: Standing) -> anyhow::Result<End> {
    let hangup = signal(SignalKind::hangup()).context("no signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("no signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("no signals")?;
    let listen: SocketAddr = config.listen;
    // Bound before recovery, so that callers get an answer, which is Unavailable until it is complete.
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    let status_listen = config.status_listen;
    let status_listener = TcpListener::bind(status_listen)
        .await
        .with_context(|| format!("cannot listen on {status_listen} (status_listen)"))?;
    let access = Arc::new(Access::new(standing.identities().clone(), &config));
    let host = match &standing {
        Standing::Standalone(_) => Host::new(config),
        Standing::Registered(_) => Host::new(config).under_control_plane(),
    };
    let outbox = Outbox::open(&host.layout.outbox(), outbox::Limits::default());
    // Sandboxes matter more than the news of them.
    let outbox = outbox.inspect_err(|error| {
        tracing::error!(error = %Chain(error), "no outbox: events are lost until the agent is started anew");
    });
    let outbox = outbox.ok();
    let host = Arc::new(match outbox.clone() {
        Some(outbox) => host.with_outbox(outbox),
        None => host,
    });
    let reload = Reload {
        sources: sources.clone(),
        host: host.clone(),
        access: access.clone(),
        lines,
    };
    let registry = Registry::new(host);
    let service = Service::new(registry.clone());
    let (registry_of_status, serving) = (registry.clone(), service.clone());
    let control = {
        let (registry, service) = (registry.clone(), service.clone());
        async move {
            match standing {
                Standing::Standalone(_) => std::future::pending().await,
                Standing::Registered(session) => {
                    let recovered = async move { service.until_recovered().await };
                    standing::run(session, registry, outbox, recovered).await;
                }
            }
        }
    };
    let recovery = {
        let service = service.clone();
        async move {
            recover::recover(&registry).await.context("cannot recover")?;
            watermark::start(registry.clone()).await;
            tokio::spawn(ready::keep(registry.host().clone()));
            tokio::spawn(sampler::run(registry.clone()));
            service.recovered();
            notify_ready();
            tokio::spawn(watchdog::run(registry));
            tracing::info!(%listen, "serving");
            std::future::pending::<anyhow::Result<End>>().await
        }
    };
    let asked = {
        let service = service.clone();
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            service.end_tunnels().await;
        }
    };
    tokio::select! {
        outcome = recovery => outcome,
        never = serve(listener, access, service.clone()) => match never {},
        never = status::serve(status_listener, registry_of_status, sources, move || serving.is_recovered()) => match never {},
        never = reload.run(hangup) => match never {},
        () = service.terminated() => Ok(End::Terminated),
        () = control => Ok(End::Deleted),
        () = asked => Ok(End::Asked),
    }
}

/// Tells a service manager that asked for it.
fn notify_ready() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager was not told");
    }
}
