//! Raw bytes both ways, after an upgrade.
//!
//! A tunnel ends when both sides have said their last, when either breaks, or with the time of its guest. The end of one direction is passed
//! on and leaves the other one as it is. What is read is written before more is read, so a slow side holds the fast one back, and a
//! tunnel holds two pieces and no more.
//!
//! Bytes are use; a tunnel is not. A page left open in a browser somewhere would otherwise keep its sandbox from ever being paused.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes read at a time.
const PIECE: usize = 16 << 10;

/// Passes bytes on between two sides, in both directions; `used` is called for every piece.
///
/// # Errors
/// Whichever comes first, of either direction.
pub(crate) async fn relay<A, B>(a: A, b: B, used: impl Fn()) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (from_a, to_a) = tokio::io::split(a);
    let (from_b, to_b) = tokio::io::split(b);
    tokio::try_join!(pass_on(from_a, to_b, &used), pass_on(from_b, to_a, &used))?;
    Ok(())
}

async fn pass_on(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
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
