//! The agent's daemon: reads its configuration, binds its listener, tidies up, serves.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use roost_agent::api::service::Service;
use roost_agent::config::Config;
use roost_agent::errors::Chain;
use roost_agent::host::Host;
use roost_agent::outbox::{self, Outbox};
use roost_agent::registry::Registry;
use roost_agent::serve::{Access, serve};
use roost_agent::{recover, tls, watermark};
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
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let config = Config::load(arguments.config.as_deref())?;
    let access = Access {
        tls: tls::Identities::standalone(
            tls::server(&config.pki_dir).context("no API without certificates (`roost pki init` makes some)")?,
        ),
        client_names: config.client_names.clone(),
    };
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
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    let outcome = runtime.block_on(run(config, access));
    // Not through the runtime's end: that would drop every task, and a dropped sandbox ends its VM. VMs outlive the agent.
    match outcome {
        Ok(End::Asked) => std::process::exit(0),
        Ok(End::Terminated) => std::process::exit(TERMINATED),
        Err(error) => {
            eprintln!("Error: {error:?}");
            std::process::exit(1)
        }
    }
}

/// Exit status after a Terminate, which its unit does not start again.
const TERMINATED: i32 = 3;

/// Why the agent ends.
enum End {
    /// A signal asked for it; VMs run on.
    Asked,
    /// A control plane has given up this host, and nothing runs any more.
    Terminated,
}

async fn run(config: Config, access: Access) -> anyhow::Result<End> {
    let mut terminate = signal(SignalKind::terminate()).context("no signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("no signals")?;
    let listen: SocketAddr = config.listen;
    // Bound before recovery, so that callers get an answer, which is Unavailable until it is complete.
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    let host = Host::new(config);
    let outbox = Outbox::open(&host.layout.outbox(), outbox::Limits::default());
    let host = std::sync::Arc::new(match outbox {
        Ok(outbox) => host.with_outbox(outbox),
        // Sandboxes matter more than the news of them.
        Err(error) => {
            tracing::error!(error = %Chain(&error), "no outbox: events are lost until the agent is started anew");
            host
        }
    });
    let registry = Registry::new(host);
    let service = Service::new(registry.clone());
    let recovery = {
        let service = service.clone();
        async move {
            recover::recover(&registry).await.context("cannot recover")?;
            watermark::start(registry).await;
            service.recovered();
            notify_ready();
            tracing::info!(%listen, "serving");
            std::future::pending::<anyhow::Result<End>>().await
        }
    };
    tokio::select! {
        outcome = recovery => outcome,
        never = serve(listener, access, service.clone()) => match never {},
        () = service.terminated() => Ok(End::Terminated),
        _ = terminate.recv() => Ok(End::Asked),
        _ = interrupt.recv() => Ok(End::Asked),
    }
}

/// Tells a service manager that asked for it.
fn notify_ready() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager was not told");
    }
}
