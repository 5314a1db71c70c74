//! Raw bytes both ways, after an upgrade.
//!
//! A tunnel ends when both sides have said their last, when either breaks, with the time of its guest, or with the agent. The end of one
//! direction is passed on and leaves the other one as it is. An end that neither side has wanted is told to the caller as the end of its stream,
//! in TLS's own words, so that it does not take it for an attack or a broken network. What is read is written before more is read, so a slow side holds the fast one back, and a
//! tunnel holds two pieces and no more.
//!
//! Bytes are use; a tunnel is not. A page left open in a browser somewhere would otherwise keep its sandbox from ever being paused.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes read at a time.
const PIECE: usize = 16 << 10;

/// How long a caller may take to be told that its tunnel has ended.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);

/// Passes bytes on between a caller and its guest, in both directions, until both have ended or the tunnel is `over`; `used` is called for
/// every piece.
///
/// # Errors
/// Whichever comes first, of either direction.
pub(crate) async fn relay<A, B>(caller: A, guest: B, used: impl Fn(), over: impl Future<Output = ()>) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (from_caller, mut to_caller) = tokio::io::split(caller);
    let (from_guest, mut to_guest) = tokio::io::split(guest);
    {
        let forth = pass_on(from_caller, &mut to_guest, &used);
        let back = pass_on(from_guest, &mut to_caller, &used);
        tokio::select! {
            biased;
            () = over => {}
            outcome = async { tokio::try_join!(forth, back) } => return outcome.map(drop),
        }
    }
    tokio::time::timeout(GOODBYE_LIMIT, to_caller.shutdown())
        .await
        .unwrap_or(Ok(()))
}

async fn pass_on(
    mut from: impl AsyncRead + Unpin,
    to: &mut (impl AsyncWrite + Unpin),
    used: &impl Fn(),
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let read = from.read(&mut piece).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        used();
        to.write_all(&piece[..read]).await?;
        // TLS may hold on to a part.
        to.flush().await?;
    }
}
