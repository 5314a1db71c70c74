//! Runs in the place of a VMM and tells on its standard output, which is the serial console, what the cage is like from inside.
//!
//! It takes the VMM's command line. The file given as `--kernel` is its program: one command a line, its words split by spaces,
//! one line of output each.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments[1..] == ["--version"] {
        return println!("roost-cage-probe v0.1 {}", descriptors().expect("listed"));
    }
    let kernel = arguments
        .iter()
        .position(|argument| argument == "--kernel")
        .and_then(|index| arguments.get(index + 1))
        .expect("a kernel");
    let program = fs::read_to_string(kernel).expect("the kernel can be read");
    for line in program.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let outcome = match words[..] {
            ["arguments"] => Ok(arguments[1..].join(" ")),
            ["environment"] => Ok(std::env::vars().map(|(name, _)| name).collect::<Vec<_>>().join(" ")),
            ["descriptors"] => descriptors(),
            ["status"] => status(),
            ["directory"] => std::env::current_dir().map(|path| path.display().to_string()),
            ["read", path] => File::open(path)
                .and_then(|mut file| file.read(&mut [0; 1]))
                .map(|_| "done".into()),
            ["list", path] => fs::read_dir(path).map(|_| "done".into()),
            ["write", path] => done(OpenOptions::new().write(true).open(path)),
            ["create", path] => done(File::create_new(path).and_then(|mut file| file.write_all(b"probe"))),
            ["truncate", path] => done(OpenOptions::new().write(true).truncate(true).open(path)),
            ["mkdir", path] => done(fs::create_dir(path)),
            ["symlink", path] => done(symlink("/etc/passwd", path)),
            ["remove", path] => done(fs::remove_file(path)),
            ["rename", from, to] => done(fs::rename(from, to)),
            ["execute", path] => done(Command::new(path).status()),
            ["connect", path] => done(UnixStream::connect(path)),
            ["tcp", "bind"] => done(TcpListener::bind("127.0.0.1:0")),
            ["tcp", "connect"] => done(TcpStream::connect("127.0.0.1:9")),
            ["signal", pid] => done(
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.parse().expect("a pid")), None)
                    .map_err(io::Error::from),
            ),
            ["flood", mebibytes] => flood(mebibytes.parse().expect("a number")),
            ["log", text] => done(writeln!(io::stderr(), "{text}")),
            ["event", text] => done(fs::write("/proc/self/fd/5", text)),
            ["grow", "console"] => nix::fcntl::fcntl(io::stdout(), nix::fcntl::FcntlArg::F_SETPIPE_SZ(1 << 20))
                .map(|size| size.to_string())
                .map_err(io::Error::from),
            ["burst", kibibytes] => {
                done(io::stdout().write_all(&vec![b'.'; kibibytes.parse::<usize>().expect("a number") << 10]))
            }
            ["memory", mebibytes] => {
                let size = mebibytes.parse::<usize>().expect("a number") << 20;
                Ok(vec![1u8; size].iter().filter(|byte| **byte == 1).count().to_string())
            }
            ["await", path] => {
                while !Path::new(path).exists() {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                Ok("done".into())
            }
            ["call", number, ref arguments @ ..] => call(number, arguments),
            ["thread"] => done(
                std::thread::spawn(|| ())
                    .join()
                    .map_err(|_| io::Error::other("it panicked")),
            ),
            ["threads", number] => threads(number.parse().expect("a number")),
            ["wait"] => loop {
                std::thread::park();
            },
            ["exit", code] => std::process::exit(code.parse().expect("a number")),
            ["abort"] => std::process::abort(),
            _ => panic!("no such command: {line}"),
        };
        match outcome {
            Ok(text) => println!("{line}: {text}"),
            Err(error) => println!("{line}: error {}", error.raw_os_error().unwrap_or(-1)),
        }
    }
}

/// Starts threads that stay.
fn threads(number: u32) -> io::Result<String> {
    for _ in 0..number {
        std::thread::Builder::new().stack_size(64 << 10).spawn(|| {
            loop {
                std::thread::park();
            }
        })?;
    }
    Ok("done".into())
}

/// Makes one system call: numbers, of the call and of its arguments.
fn call(number: &str, arguments: &[&str]) -> io::Result<String> {
    let value = |text: &str| text.parse::<i64>().expect("a number");
    let mut all = [0; 6];
    for (place, argument) in all.iter_mut().zip(arguments) {
        *place = value(argument);
    }
    let [a, b, c, d, e, f] = all;
    // SAFETY: whatever it does to this process, a program of a test wants to see; no pointer is passed that Rust knows of.
    #[allow(unsafe_code, reason = "an attack is made of system calls")]
    let outcome = unsafe { libc::syscall(value(number), a, b, c, d, e, f) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(outcome.to_string())
}

fn done<T>(outcome: io::Result<T>) -> io::Result<String> {
    outcome.map(|_| "done".into())
}

/// Numbers of the open descriptors, without the one that lists them.
fn descriptors() -> io::Result<String> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if !target.starts_with("/proc") {
            numbers.push(entry.file_name().into_string().expect("a number"));
        }
    }
    numbers.sort();
    Ok(numbers.join(" "))
}

/// What the kernel says of this process's privileges.
fn status() -> io::Result<String> {
    let fields = [
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Threads",
        "SigBlk",
    ];
    let text = fs::read_to_string("/proc/self/status")?;
    let lines = text
        .lines()
        .filter(|line| fields.iter().any(|field| line.starts_with(field)));
    Ok(lines.map(|line| line.replace('\t', "")).collect::<Vec<_>>().join(" "))
}

/// Writes to console, log and events as fast as they take it.
fn flood(mebibytes: u32) -> io::Result<String> {
    let block = vec![b'.'; 1 << 20];
    let mut events = OpenOptions::new().write(true).open(Path::new("/proc/self/fd/5"))?;
    for _ in 0..mebibytes {
        io::stdout().write_all(&block)?;
        io::stderr().write_all(&block)?;
        events.write_all(&block)?;
    }
    Ok("done".into())
}
