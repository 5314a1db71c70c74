//! What a process reads, from a pipe or its terminal: one writer at a time, in the order of arrival.

use std::sync::Arc;

use tokio::sync::{Mutex, watch};

use super::descriptor::Descriptor;

/// Where a process's input goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Pipe,
    Terminal,
}

/// The writing end, until it is closed.
pub(super) struct Stdin {
    pub(super) way: Way,
    end: Mutex<Option<Arc<Descriptor>>>,
    closed: watch::Sender<bool>,
}

/// Why input did not arrive, or not all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputError {
    /// There is nothing to write to, it has been closed, or the process has ended.
    Closed,
    /// The process reads no more.
    NoReader,
}

impl Stdin {
    pub(super) fn new(way: Way, end: Option<Arc<Descriptor>>) -> Self {
        let closed = watch::Sender::new(end.is_none());
        Self {
            way,
            end: Mutex::new(end),
            closed,
        }
    }

    /// Writes all of `bytes`; waits for the process to read. Closing ends the wait.
    pub(super) async fn write(&self, bytes: &[u8]) -> Result<(), InputError> {
        let mut closed = self.closed.subscribe();
        let write = async {
            let end = self.end.lock().await;
            let end = end.as_ref().ok_or(InputError::Closed)?;
            end.write_all(bytes).await.map_err(|_| InputError::NoReader)
        };
        let closing = async {
            // The sender is ours: no error.
            closed.wait_for(|closed| *closed).await.ok();
        };
        tokio::select! {
            biased;
            () = closing => {
                // No writer holds the lock for long any more.
                self.end.lock().await.take();
                Err(InputError::Closed)
            }
            written = write => written,
        }
    }

    /// Ends the input, also under a writer that waits. Closing again changes nothing.
    pub(super) fn close(&self) {
        self.closed.send_replace(true);
        // A writer that holds the lock closes it itself, as it wakes up.
        if let Ok(mut end) = self.end.try_lock() {
            end.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;

    fn pipe() -> (Stdin, Descriptor) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let writer = Descriptor::new(writer).unwrap();
        (
            Stdin::new(Way::Pipe, Some(Arc::new(writer))),
            Descriptor::new(reader).unwrap(),
        )
    }

    async fn read_to_end(reader: &Descriptor) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            match reader.read(&mut buffer).await.unwrap() {
                0 => return all,
                read => all.extend_from_slice(&buffer[..read]),
            }
        }
    }

    #[tokio::test]
    async fn what_is_written_is_read_and_closing_is_end_of_file() {
        let (stdin, reader) = pipe();
        stdin.write(b"one ").await.unwrap();
        stdin.write(b"two").await.unwrap();
        stdin.close();
        assert_eq!(read_to_end(&reader).await, b"one two");
        assert_eq!(stdin.write(b"three").await, Err(InputError::Closed));
    }

    #[tokio::test]
    async fn closing_ends_a_write_that_waits_for_a_reader() {
        let (stdin, reader) = pipe();
        let stdin = Arc::new(stdin);
        let writer = tokio::spawn({
            let stdin = Arc::clone(&stdin);
            async move { stdin.write(&vec![b'x'; 1 << 20]).await }
        });
        reader.read(&mut [0]).await.unwrap();
        stdin.close();
        assert_eq!(writer.await.unwrap(), Err(InputError::Closed));
        assert!(read_to_end(&reader).await.len() < 1 << 20);
    }

    #[tokio::test]
    async fn a_process_that_reads_no_more_is_told_apart() {
        let (stdin, reader) = pipe();
        drop(reader);
        assert_eq!(stdin.write(b"x").await, Err(InputError::NoReader));
    }
}
