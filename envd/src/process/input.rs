//! A process's standard input: one writer at a time, in the order of arrival.

use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, watch};

/// The writing end of the pipe, until it is closed.
pub(super) struct Stdin {
    pipe: Mutex<Option<pipe::Sender>>,
    closed: watch::Sender<bool>,
}

/// Why input did not arrive, or not all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputError {
    /// There is no pipe, it has been closed, or the process has ended.
    Closed,
    /// The process reads no more.
    NoReader,
}

impl Stdin {
    pub(super) fn new(pipe: Option<pipe::Sender>) -> Self {
        let closed = watch::Sender::new(pipe.is_none());
        Self {
            pipe: Mutex::new(pipe),
            closed,
        }
    }

    /// Writes all of `bytes`; waits for the process to read. Closing ends the wait.
    pub(super) async fn write(&self, bytes: &[u8]) -> Result<(), InputError> {
        let mut closed = self.closed.subscribe();
        let write = async {
            let mut pipe = self.pipe.lock().await;
            pipe.as_mut()
                .ok_or(InputError::Closed)?
                .write_all(bytes)
                .await
                .map_err(|_| InputError::NoReader)
        };
        let closing = async {
            // The sender is ours: no error.
            closed.wait_for(|closed| *closed).await.ok();
        };
        tokio::select! {
            biased;
            () = closing => {
                // No writer holds the lock for long any more.
                self.pipe.lock().await.take();
                Err(InputError::Closed)
            }
            written = write => written,
        }
    }

    /// Ends the input, also under a writer that waits. Closing again changes nothing.
    pub(super) fn close(&self) {
        self.closed.send_replace(true);
        // A writer that holds the lock closes the pipe itself, as it wakes up.
        if let Ok(mut pipe) = self.pipe.try_lock() {
            pipe.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read_and_closing_is_end_of_file() {
        let (sender, mut receiver) = pipe::pipe().unwrap();
        let stdin = Stdin::new(Some(sender));
        stdin.write(b"one ").await.unwrap();
        stdin.write(b"two").await.unwrap();
        stdin.close();
        let mut text = String::new();
        receiver.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "one two");
        assert_eq!(stdin.write(b"three").await, Err(InputError::Closed));
    }

    #[tokio::test]
    async fn closing_ends_a_write_that_waits_for_a_reader() {
        let (sender, mut receiver) = pipe::pipe().unwrap();
        let stdin = Arc::new(Stdin::new(Some(sender)));
        let writer = tokio::spawn({
            let stdin = Arc::clone(&stdin);
            async move { stdin.write(&vec![b'x'; 1 << 20]).await }
        });
        let mut first = [0];
        receiver.read_exact(&mut first).await.unwrap();
        stdin.close();
        assert_eq!(writer.await.unwrap(), Err(InputError::Closed));
        let mut rest = Vec::new();
        receiver.read_to_end(&mut rest).await.unwrap();
        assert!(rest.len() < 1 << 20);
    }

    #[tokio::test]
    async fn a_process_that_reads_no_more_is_told_apart() {
        let (sender, receiver) = pipe::pipe().unwrap();
        let stdin = Stdin::new(Some(sender));
        drop(receiver);
        assert_eq!(stdin.write(b"x").await, Err(InputError::NoReader));
    }
}
