//! `roost forward`: a port of a sandbox as a port of this machine, of any protocol over TCP.

use std::net::SocketAddr;
use std::str::FromStr;

use clap::Args;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use super::client::Https;
use super::{CliError, print};
use crate::errors::Chain;

/// What is forwarded.
#[derive(Args)]
pub(super) struct Forward {
    /// The address here to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    bind: std::net::IpAddr,
    /// The sandbox
    id: String,
    /// The port here and the sandbox's, or one number for both; 0 here takes a free one
    #[arg(required = true, value_name = "[LOCAL:]PORT")]
    ports: Vec<Ports>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    here: u16,
    there: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (here, there) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port"));
        let there = number(there)?;
        if there == 0 {
            return Err("a sandbox has no port 0".to_owned());
        }
        Ok(Self {
            here: number(here)?,
            there,
        })
    }
}

/// Forwards until it is interrupted.
pub(super) async fn forward(https: Https, wish: Forward) -> Result<(), CliError> {
    let mut listeners = Vec::new();
    for ports in &wish.ports {
        let listener = TcpListener::bind(SocketAddr::new(wish.bind, ports.here)).await?;
        print(format_args!(
            "{} -> {}:{}\n",
            listener.local_addr()?,
            wish.id,
            ports.there
        ))?;
        listeners.push((listener, ports.there));
    }
    let all = listeners.into_iter().map(|(listener, port)| {
        let (https, id) = (https.clone(), wish.id.clone());
        async move {
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(relay(https.clone(), id.clone(), port, stream));
            }
        }
    });
    // None of them ends but by an error.
    futures::future::try_join_all(all)
        .await
        .map(|_: Vec<()>| ())
        .map_err(CliError::Output)
}

/// One connection; what becomes of it is told, and the others go on.
async fn relay(https: Https, sandbox: String, port: u16, mut stream: TcpStream) {
    match https.forward(&sandbox, port).await {
        // Either end may break it off, and sees so itself.
        Ok(upgraded) => drop(tokio::io::copy_bidirectional(&mut stream, &mut TokioIo::new(upgraded)).await),
        Err(error) => eprintln!("roost: port {port} of {sandbox}: {}", Chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_is_both_ports() {
        let ports = |here, there| Ok(Ports { here, there });
        assert_eq!("80".parse(), ports(80, 80));
        assert_eq!("8080:80".parse(), ports(8080, 80));
        assert_eq!("0:80".parse(), ports(0, 80));
        for bad in ["", "0", "80:0", "a", "1:2:3", "65536", "-1", "80:"] {
            assert!(bad.parse::<Ports>().is_err(), "{bad:?}");
        }
    }
}
