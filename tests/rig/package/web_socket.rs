//! A WebSocket's client, as far as the proxy is concerned.

use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use roost_tests::roost::{PKI, Sandbox};

/// A TLS client that has upgraded its connection.
pub(super) struct WebSocket {
    client: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl WebSocket {
    /// Connects to a sandbox's port 8080 through the proxy.
    pub(super) fn open(sandbox: &Sandbox) -> Self {
        let pki = |file: &str| format!("{PKI}/{file}");
        let mut client = Command::new("openssl")
            .args([
                "s_client",
                "-quiet",
                "-verify_return_error",
                "-connect",
                "127.0.0.1:50051",
            ])
            .args([
                "-CAfile",
                &pki("ca.pem"),
                "-cert",
                &pki("client.pem"),
                "-key",
                &pki("client-key.pem"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("openssl runs");
        let (to, from) = (
            client.stdin.take().expect("a pipe"),
            client.stdout.take().expect("a pipe"),
        );
        let mut socket = Self { client, to, from };
        let request = format!(
            "GET /proxy/{}/8080/socket HTTP/1.1\r\nHost: rig\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            sandbox.id
        );
        socket.to.write_all(request.as_bytes()).expect("sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            let read = socket.from.read(&mut byte).expect("read");
            assert_eq!(read, 1, "{}", String::from_utf8_lossy(&head));
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        socket
    }

    /// What comes back of a text.
    pub(super) fn echoes(&mut self, text: &str) -> String {
        self.to.write_all(text.as_bytes()).expect("sent");
        let mut back = vec![0; text.len()];
        self.from.read_exact(&mut back).expect("it comes back");
        String::from_utf8(back).expect("as it was")
    }

    /// Its end has been said, and is not what is left of a connection that broke.
    pub(super) fn has_ended_in_order(mut self) {
        let mut rest = Vec::new();
        self.from.read_to_end(&mut rest).expect("an end");
        assert_eq!(rest, b"");
        let mut said = String::new();
        self.client
            .stderr
            .take()
            .expect("a pipe")
            .read_to_string(&mut said)
            .expect("text");
        for word in ["unexpected eof", "errno", "reset"] {
            assert!(!said.contains(word), "{said}");
        }
    }
}

impl Drop for WebSocket {
    fn drop(&mut self) {
        // It may have ended.
        self.client.kill().ok();
        self.client.wait().expect("a child of ours");
    }
}
