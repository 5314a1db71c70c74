//! Packets as a tarpc transport: the client half for the agent, the server half for privd.
//!
//! The wire carries an envelope of our own, not tarpc's types. What a peer may set is bounded *before* a tarpc message is built
//! from it: tarpc computes with a peer's deadline unchecked and panics when the sum overflows, and it has no bound on the calls
//! in flight of its own. A peer that breaks a rule has its connection ended.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::{Sink, Stream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tarpc::{ClientMessage, Request, Response, ServerError, trace};

use super::{IpcError, Packet, PacketSocket};

/// Longest time a caller may give a call, and the shortest.
pub const DEADLINE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(120);
/// Most calls of one connection in flight.
pub const MAX_IN_FLIGHT: usize = 8;

/// Client to server.
#[derive(Serialize, Deserialize)]
enum Call<T> {
    Request {
        id: u64,
        deadline_ms: u32,
        trace: TraceParent,
        message: T,
    },
    Cancel {
        id: u64,
    },
}

/// What caused a call, as W3C's `traceparent` has it; zeros where nobody knows. Any value is as good as any other: the server writes it
/// down and does nothing else with it.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct TraceParent {
    trace_id: [u8; 16],
    span_id: [u8; 8],
    is_sampled: bool,
}

impl From<trace::Context> for TraceParent {
    fn from(context: trace::Context) -> Self {
        Self {
            trace_id: u128::from(context.trace_id).to_be_bytes(),
            span_id: u64::from(context.span_id).to_be_bytes(),
            is_sampled: context.sampling_decision == trace::SamplingDecision::Sampled,
        }
    }
}

impl From<TraceParent> for trace::Context {
    fn from(parent: TraceParent) -> Self {
        Self {
            trace_id: u128::from_be_bytes(parent.trace_id).into(),
            span_id: u64::from_be_bytes(parent.span_id).into(),
            sampling_decision: if parent.is_sampled {
                trace::SamplingDecision::Sampled
            } else {
                trace::SamplingDecision::Unsampled
            },
        }
    }
}

/// Server to client.
#[derive(Serialize, Deserialize)]
struct Answer<T> {
    id: u64,
    outcome: Result<T, Refused>,
}

/// The server's framework, not its handler, refused the call.
#[derive(Serialize, Deserialize)]
struct Refused {
    detail: String,
}

/// The socket and what waits to be sent on it.
struct Wire {
    socket: PacketSocket,
    queue: VecDeque<Packet>,
}

impl Wire {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            socket: PacketSocket::new(socket)?,
            queue: VecDeque::new(),
        })
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), IpcError>> {
        while let Some(packet) = self.queue.front() {
            let outcome = ready!(self.socket.poll_send(cx, packet));
            self.queue.pop_front();
            outcome?;
        }
        Poll::Ready(Ok(()))
    }
}

/// The server's half: calls arrive, answers leave.
pub struct ServerTransport<Req, Resp> {
    wire: Wire,
    in_flight: HashSet<u64>,
    types: PhantomData<fn(Req) -> Resp>,
}

impl<Req, Resp> ServerTransport<Req, Resp> {
    /// Wraps a connected, non-blocking SEQPACKET socket.
    ///
    /// # Errors
    /// When the socket cannot be registered with the runtime.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            wire: Wire::new(socket)?,
            in_flight: HashSet::new(),
            types: PhantomData,
        })
    }
}

impl<Req: DeserializeOwned, Resp> Stream for ServerTransport<Req, Resp> {
    type Item = Result<ClientMessage<Req>, IpcError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // A closed connection is an error here, not the end of the stream: tarpc would let the calls in flight run on to their
        // deadlines, for nobody.
        let call = match ready!(self.wire.socket.poll_receive::<Call<Req>>(cx)) {
            Ok((call, _)) => call,
            Err(error) => return Poll::Ready(Some(Err(error))),
        };
        Poll::Ready(Some(match call {
            Call::Cancel { id } => {
                self.in_flight.remove(&id);
                Ok(ClientMessage::Cancel {
                    trace_context: trace::Context::default(),
                    request_id: id,
                })
            }
            Call::Request {
                id,
                deadline_ms,
                trace,
                message,
            } => {
                let allowed = Duration::from_millis(u64::from(deadline_ms));
                if !DEADLINE.contains(&allowed) {
                    Err(IpcError::Protocol("set a deadline outside 1 to 120 seconds"))
                } else if self.in_flight.len() >= MAX_IN_FLIGHT {
                    Err(IpcError::Protocol("has too many calls in flight"))
                } else if !self.in_flight.insert(id) {
                    Err(IpcError::Protocol("used the id of a call in flight again"))
                } else {
                    let mut context = tarpc::context::current();
                    context.deadline = Instant::now() + allowed;
                    context.trace_context = trace.into();
                    Ok(ClientMessage::Request(Request { context, id, message }))
                }
            }
        }))
    }
}

impl<Req, Resp: Serialize> Sink<Response<Resp>> for ServerTransport<Req, Resp> {
    type Error = IpcError;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), IpcError>> {
        self.wire.poll_flush(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, response: Response<Resp>) -> Result<(), IpcError> {
        self.in_flight.remove(&response.request_id);
        let outcome = response.message.map_err(|error| Refused { detail: error.detail });
        let packet = Packet::encode(&Answer {
            id: response.request_id,
            outcome,
        })?;
        self.wire.queue.push_back(packet);
        Ok(())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), IpcError>> {
        self.wire.poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), IpcError>> {
        self.wire.poll_flush(cx)
    }
}

/// The client's half: calls leave, answers arrive.
pub struct ClientTransport<Req, Resp> {
    wire: Wire,
    types: PhantomData<fn(Req) -> Resp>,
}

impl<Req, Resp> ClientTransport<Req, Resp> {
    /// Wraps a connected, non-blocking SEQPACKET socket.
    ///
    /// # Errors
    /// When the socket cannot be registered with the runtime.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            wire: Wire::new(socket)?,
            types: PhantomData,
        })
    }
}

impl<Req, Resp: DeserializeOwned> Stream for ClientTransport<Req, Resp> {
    type Item = Result<Response<Resp>, IpcError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(match ready!(self.wire.socket.poll_receive::<Answer<Resp>>(cx)) {
            Err(IpcError::Closed) => None,
            Err(error) => Some(Err(error)),
            Ok((Answer { id, outcome }, _)) => {
                let message = outcome.map_err(|refused| ServerError::new(io::ErrorKind::Other, refused.detail));
                Some(Ok(Response {
                    request_id: id,
                    message,
                }))
            }
        })
    }
}

impl<Req: Serialize, Resp> Sink<ClientMessage<Req>> for ClientTransport<Req, Resp> {
    type Error = IpcError;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), IpcError>> {
        self.wire.poll_flush(cx)
    }

    fn start_send(mut self: Pin<&mut Self>, message: ClientMessage<Req>) -> Result<(), IpcError> {
        let call = match message {
            ClientMessage::Request(Request { context, id, message }) => {
                let left = context.deadline.saturating_duration_since(Instant::now());
                let left = left.clamp(*DEADLINE.start(), *DEADLINE.end());
                let deadline_ms = u32::try_from(left.as_millis()).expect("120 s are a u32 of milliseconds");
                Call::Request {
                    id,
                    deadline_ms,
                    trace: context.trace_context.into(),
                    message,
                }
            }
            ClientMessage::Cancel { request_id, .. } => Call::Cancel { id: request_id },
            // tarpc may add kinds of messages; there is none of them on our wire.
            _ => return Err(IpcError::Protocol("was to be sent a message this wire does not have")),
        };
        self.wire.queue.push_back(Packet::encode(&call)?);
        Ok(())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), IpcError>> {
        self.wire.poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), IpcError>> {
        self.wire.poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::{FutureExt, StreamExt};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use tarpc::server::{BaseChannel, Channel};
    use tarpc::{client, context};
    use tokio::sync::Semaphore;

    use super::*;
    use crate::ipc::PassedFd;

    #[tarpc::service]
    trait Echo {
        async fn echo(text: String, file: PassedFd) -> (String, PassedFd);
        async fn forever();
        async fn traced() -> u128;
    }

    /// `started` gains a permit with each call of `forever`.
    #[derive(Clone)]
    struct Server {
        started: Arc<Semaphore>,
        dropped: Arc<AtomicUsize>,
    }

    impl Default for Server {
        fn default() -> Self {
            Self {
                started: Arc::new(Semaphore::new(0)),
                dropped: Arc::default(),
            }
        }
    }

    impl Server {
        async fn has_started(&self, calls: u32) {
            self.started.acquire_many(calls).await.expect("never closed").forget();
        }
    }

    struct CountsDrop(Arc<AtomicUsize>);

    impl Drop for CountsDrop {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Echo for Server {
        async fn echo(self, _: context::Context, text: String, file: PassedFd) -> (String, PassedFd) {
            (text, file)
        }

        async fn forever(self, _: context::Context) {
            let _counted = CountsDrop(self.dropped.clone());
            self.started.add_permits(1);
            std::future::pending().await
        }

        async fn traced(self, context: context::Context) -> u128 {
            context.trace_context.trace_id.into()
        }
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .expect("a socket pair")
    }

    /// A served socket: the peer's end, and the task that ends with the connection.
    fn serve(server: Server) -> (OwnedFd, tokio::task::JoinHandle<()>) {
        let (ours, theirs) = pair();
        let transport = ServerTransport::new(theirs).expect("registered");
        let channel = BaseChannel::with_defaults(transport);
        let task = tokio::spawn(channel.execute(server.serve()).for_each(|call| async move {
            tokio::spawn(call);
        }));
        (ours, task)
    }

    fn client(socket: OwnedFd) -> EchoClient {
        EchoClient::new(
            client::Config::default(),
            ClientTransport::new(socket).expect("registered"),
        )
        .spawn()
    }

    fn request(id: u64, deadline_ms: u32, message: EchoRequest) -> Packet {
        Packet::encode(&Call::Request {
            id,
            deadline_ms,
            trace: TraceParent::default(),
            message,
        })
        .expect("encoded")
    }

    async fn ends(task: tokio::task::JoinHandle<()>) {
        tokio::time::timeout(Duration::from_secs(10), task)
            .await
            .expect("the server ended the connection")
            .expect("no panic");
    }

    #[tokio::test]
    async fn the_server_knows_what_a_call_is_part_of() {
        let (socket, _server) = serve(Server::default());
        let client = client(socket);
        let mut context = context::current();
        context.trace_context.trace_id = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.into();
        let seen = client.traced(context).await.expect("answered");
        assert_eq!(seen, u128::from(context.trace_context.trace_id));
    }

    #[tokio::test]
    async fn a_call_carries_descriptors_both_ways() {
        let (socket, _task) = serve(Server::default());
        let client = client(socket);
        let (read, write) = nix::unistd::pipe().expect("a pipe");
        let (text, back) = client
            .echo(context::current(), "hello".into(), write.into())
            .await
            .expect("answered");
        assert_eq!(text, "hello");
        nix::unistd::write(&back, b"x").expect("written to what came back");
        assert_eq!(nix::unistd::read(&read, &mut [0; 8]).expect("read"), 1);
    }

    #[tokio::test]
    async fn a_caller_that_gives_up_cancels_its_call() {
        let server = Server::default();
        let (socket, _task) = serve(server.clone());
        let client = client(socket);
        let mut call = Box::pin(client.forever(context::current()));
        tokio::select! {
            _ = &mut call => panic!("the call cannot end"),
            () = server.has_started(1) => {}
        }
        drop(call);
        let (_, write) = nix::unistd::pipe().expect("a pipe");
        client
            .echo(context::current(), String::new(), write.into())
            .await
            .expect("the connection is still good");
        assert_eq!(server.dropped.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_server_that_goes_away_mid_call_is_an_error_for_its_caller() {
        let (ours, theirs) = pair();
        let client = client(ours);
        let call = client.forever(context::current());
        drop(theirs);
        assert!(call.await.is_err());
    }

    #[tokio::test]
    async fn a_client_that_goes_away_mid_call_ends_the_call_and_the_connection() {
        let server = Server::default();
        let (socket, task) = serve(server.clone());
        request(1, 5000, EchoRequest::Forever {})
            .send(socket.as_fd())
            .expect("sent");
        server.has_started(1).await;
        drop(socket);
        ends(task).await;
        assert_eq!(server.dropped.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn deadlines_outside_the_bounds_end_the_connection() {
        for deadline_ms in [0, 999, 120_001, u32::MAX] {
            let (socket, task) = serve(Server::default());
            request(1, deadline_ms, EchoRequest::Forever {})
                .send(socket.as_fd())
                .expect("sent");
            ends(task).await;
        }
    }

    #[tokio::test]
    async fn a_ninth_call_in_flight_ends_the_connection() {
        let server = Server::default();
        let (socket, task) = serve(server.clone());
        for id in 0..8 {
            request(id, 5000, EchoRequest::Forever {})
                .send(socket.as_fd())
                .expect("sent");
        }
        server.has_started(8).await;
        assert!(!task.is_finished(), "eight are allowed");
        request(8, 5000, EchoRequest::Forever {})
            .send(socket.as_fd())
            .expect("sent");
        ends(task).await;
    }

    #[tokio::test]
    async fn an_id_in_flight_used_again_ends_the_connection() {
        let (socket, task) = serve(Server::default());
        for _ in 0..2 {
            request(3, 5000, EchoRequest::Forever {})
                .send(socket.as_fd())
                .expect("sent");
        }
        ends(task).await;
    }

    #[tokio::test]
    async fn garbage_ends_the_connection() {
        for garbage in [&[0xff; 64][..], &[0], &[2, 2, 2]] {
            let (socket, task) = serve(Server::default());
            super::super::fd::send(socket.as_fd(), garbage, &[]).expect("sent");
            ends(task).await;
        }
    }

    #[tokio::test]
    async fn a_slow_reader_gets_every_answer() {
        let (socket, _task) = serve(Server::default());
        let client = client(socket);
        let (_, write) = nix::unistd::pipe().expect("a pipe");
        let file = PassedFd::from(write);
        let big = "x".repeat(50_000);
        let calls: Vec<_> = (0..8)
            .map(|_| {
                client
                    .echo(context::current(), big.clone(), file.clone())
                    .map(|r| r.expect("answered").0.len())
            })
            .collect();
        assert_eq!(futures::future::join_all(calls).await, vec![50_000; 8]);
    }
}
