//! The outbox with its files: what is kept through crashes, in which order it is delivered, and what goes when it is full.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fastrand::Rng;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A control plane: takes what `answer` says, a tenth of a second after it was asked.
struct Receiver<F> {
    answer: F,
    taken: Mutex<Vec<(String, i64)>>,
    tries: AtomicUsize,
    being_asked: Mutex<HashSet<SandboxId>>,
}

impl<F: Fn(&Event) -> Delivery + Send + Sync + 'static> Receiver<F> {
    fn new(answer: F) -> Arc<Self> {
        Arc::new(Self {
            answer,
            taken: Mutex::default(),
            tries: AtomicUsize::new(0),
            being_asked: Mutex::default(),
        })
    }

    /// Runs until nothing is left in the outbox; what was taken, as sandbox and time.
    async fn empty(self: &Arc<Self>, outbox: &Outbox) -> Vec<(String, i64)> {
        let empty = async {
            while outbox.depth() > 0 {
                sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            never = run(outbox.clone(), self.clone()) => match never {},
            done = timeout(2 * DAY, empty) => done.expect("empty in time"),
        }
        self.taken()
    }

    fn taken(&self) -> Vec<(String, i64)> {
        self.taken.lock().expect("not poisoned").clone()
    }
}

impl<F: Fn(&Event) -> Delivery + Send + Sync + 'static> Deliver for Arc<Receiver<F>> {
    async fn deliver(&self, event: &Event) -> Delivery {
        self.tries.fetch_add(1, Ordering::SeqCst);
        {
            let mut asked = self.being_asked.lock().expect("not poisoned");
            assert!(
                asked.insert(event.sandbox_id.clone()),
                "two events of one sandbox at a time"
            );
            assert!(asked.len() <= 4, "{} at a time", asked.len());
        }
        sleep(Duration::from_millis(100)).await;
        let delivery = (self.answer)(event);
        if delivery == Delivery::Delivered {
            let taken = (event.sandbox_id.to_string(), event.timestamp_unix);
            self.taken.lock().expect("not poisoned").push(taken);
        }
        self.being_asked.lock().expect("not poisoned").remove(&event.sandbox_id);
        delivery
    }
}

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn open(dir: &TempDir) -> Outbox {
    open_with(dir, Limits::default())
}

fn open_with(dir: &TempDir, limits: Limits) -> Outbox {
    Outbox::open(&dir.path().join("outbox"), limits).expect("opened")
}

fn log_of(dir: &TempDir) -> PathBuf {
    dir.path().join("outbox/events.log")
}

/// Opens what a predecessor had, once it has written everything and let go.
async fn reopen(outbox: Outbox, dir: &TempDir) -> Outbox {
    drop(outbox);
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        match Outbox::open(&dir.path().join("outbox"), Limits::default()) {
            Err(OutboxError::InUse { .. }) if std::time::Instant::now() < deadline => tokio::task::yield_now().await,
            outcome => return outcome.expect("opened"),
        }
    }
}

fn event(kind: EventKind, id: &str, at: i64) -> Event {
    Event::new(kind, id.parse().expect("an id"), at)
}

async fn put(outbox: &Outbox, id: &str, at: i64) {
    outbox.put(event(EventKind::AutoPaused, id, at)).await.expect("kept");
}

/// Puts many at a time.
async fn put_all(outbox: &Outbox, events: impl IntoIterator<Item = Event>) {
    let mut puts = JoinSet::new();
    for event in events {
        let outbox = outbox.clone();
        puts.spawn(async move { outbox.put(event).await });
    }
    for outcome in puts.join_all().await {
        outcome.expect("kept");
    }
}

fn kept(outbox: &Outbox) -> Vec<(String, i64)> {
    let state = outbox.shared.state();
    let events = state.backlog.iter();
    events
        .map(|(_, event)| (event.sandbox_id.to_string(), event.timestamp_unix))
        .collect()
}

fn pairs(expected: &[(&str, i64)]) -> Vec<(String, i64)> {
    expected.iter().map(|(id, at)| ((*id).to_owned(), *at)).collect()
}

fn of<'a>(taken: &'a [(String, i64)], id: &'a str) -> Vec<i64> {
    taken
        .iter()
        .filter(|(other, _)| other == id)
        .map(|(_, at)| *at)
        .collect()
}

#[test]
fn events_have_the_control_planes_form() {
    let mut full = event(EventKind::Error, "cl-1", 5);
    full.error = Some("why".into());
    full.host_ip = Some("10.11.0.1".into());
    for (event, json) in [
        (
            full,
            r#"{"event":"sandbox.error","sandbox_id":"cl-1","error":"why","timestamp":5,"host_ip":"10.11.0.1"}"#,
        ),
        (
            event(EventKind::AutoPaused, "cl-1", -1),
            r#"{"event":"sandbox.auto_paused","sandbox_id":"cl-1","timestamp":-1}"#,
        ),
    ] {
        assert_eq!(serde_json::to_string(&event).expect("serialised"), json);
        assert_eq!(serde_json::from_str::<Event>(json).expect("parsed"), event);
    }
    let names = [
        (EventKind::Started, "sandbox.started"),
        (EventKind::Resumed, "sandbox.resumed"),
        (EventKind::Paused, "sandbox.paused"),
        (EventKind::AutoPaused, "sandbox.auto_paused"),
        (EventKind::Stopped, "sandbox.stopped"),
        (EventKind::Failed, "sandbox.failed"),
        (EventKind::Error, "sandbox.error"),
        (EventKind::PauseFailed, "sandbox.pause_failed"),
        (EventKind::ResumeFailed, "sandbox.resume_failed"),
    ];
    for (kind, name) in names {
        assert_eq!(serde_json::to_value(kind).expect("serialised"), name);
    }
}

#[tokio::test]
async fn error_texts_are_escaped_and_cut_and_nothing_larger_than_an_event_is_kept() {
    let dir = dir();
    let outbox = open(&dir);
    for (text, shown) in [
        ("a\x1b[31m\nb".to_owned(), r"a\x1b[31m\nb".to_owned()),
        ("x".repeat(399) + "\0", "x".repeat(399)),
        ("\\".repeat(1000), "\\\\".repeat(200)),
    ] {
        let mut event = event(EventKind::Error, "a", 1);
        event.error = Some(text);
        outbox.put(event).await.expect("kept");
        let state = outbox.shared.state();
        let (_, last) = state.backlog.iter().last().expect("it is there");
        assert_eq!(last.error.as_deref(), Some(shown.as_str()));
    }
    let mut event = event(EventKind::Error, "a", 1);
    event.host_ip = Some("1".repeat(MAX_EVENT));
    assert!(matches!(outbox.put(event).await, Err(OutboxError::TooLarge { .. })));
    assert_eq!(outbox.depth(), 3);
}

#[tokio::test(start_paused = true)]
async fn what_was_put_is_there_after_a_restart_and_what_was_delivered_is_not() {
    let dir = dir();
    let mut outbox = open(&dir);
    put(&outbox, "a", 1).await;
    put(&outbox, "b", 2).await;
    outbox = reopen(outbox, &dir).await;
    assert_eq!(kept(&outbox), pairs(&[("a", 1), ("b", 2)]));
    let receiver = Receiver::new(|_| Delivery::Delivered);
    receiver.empty(&outbox).await;
    outbox = reopen(outbox, &dir).await;
    assert_eq!(kept(&outbox), []);
    put(&outbox, "a", 3).await;
    outbox = reopen(outbox, &dir).await;
    assert_eq!(receiver.empty(&outbox).await, pairs(&[("a", 1), ("b", 2), ("a", 3)]));
}

#[tokio::test(start_paused = true)]
async fn sandboxes_keep_their_order_and_do_not_wait_for_each_other() {
    let dir = dir();
    let outbox = open(&dir);
    let ids: Vec<String> = (0..12).map(|number| format!("s{number}")).collect();
    for at in 0..8 {
        put_all(&outbox, ids.iter().map(|id| event(EventKind::AutoPaused, id, at))).await;
    }
    let random = Mutex::new(Rng::with_seed(1));
    let receiver = Receiver::new(move |event| match event.sandbox_id.as_str() {
        // Not before all the others have been served.
        "s0" => Delivery::Later,
        _ if random.lock().expect("not poisoned").u64(..5) == 0 => Delivery::Later,
        _ => Delivery::Delivered,
    });
    let others_served = async {
        while outbox.depth() > 8 {
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        never = run(outbox.clone(), receiver.clone()) => match never {},
        done = timeout(DAY, others_served) => done.expect("served in time"),
    }
    let taken = receiver.taken();
    for id in &ids[1..] {
        assert_eq!(of(&taken, id), (0..8).collect::<Vec<i64>>(), "{id}");
    }
    let last = Receiver::new(|_| Delivery::Delivered).empty(&outbox).await;
    assert_eq!(of(&last, "s0"), (0..8).collect::<Vec<i64>>());
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_was_away_for_an_hour_gets_everything_in_order_and_was_not_stormed() {
    let dir = dir();
    let outbox = open(&dir);
    let back = Instant::now() + Duration::from_secs(60 * 60);
    let receiver = Receiver::new(move |_| {
        if Instant::now() < back {
            Delivery::Later
        } else {
            Delivery::Delivered
        }
    });
    let away = async {
        for at in 0..60 {
            put_all(
                &outbox,
                (0..10).map(|id| event(EventKind::AutoPaused, &format!("s{id}"), at)),
            )
            .await;
            sleep(Duration::from_secs(50)).await;
        }
    };
    tokio::select! {
        never = run(outbox.clone(), receiver.clone()) => match never {},
        () = away => {},
    }
    assert_eq!((outbox.depth(), outbox.dropped()), (600, 0));
    let tries = receiver.tries.load(Ordering::SeqCst);
    assert!((50..140).contains(&tries), "{tries} tries in an hour");
    let again = Receiver::new(move |_| {
        if Instant::now() < back {
            Delivery::Later
        } else {
            Delivery::Delivered
        }
    });
    let taken = again.empty(&outbox).await;
    for id in 0..10 {
        assert_eq!(of(&taken, &format!("s{id}")), (0..60).collect::<Vec<i64>>());
    }
    assert!(
        Instant::now() < back + Duration::from_secs(120),
        "it took long to notice"
    );
}

#[tokio::test(start_paused = true)]
async fn a_delivery_that_does_not_end_is_given_up() {
    struct Silent(AtomicUsize);
    impl Deliver for Arc<Silent> {
        async fn deliver(&self, _: &Event) -> Delivery {
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                std::future::pending::<()>().await;
            }
            Delivery::Delivered
        }
    }
    let dir = dir();
    let outbox = open(&dir);
    put(&outbox, "a", 1).await;
    let silent = Arc::new(Silent(AtomicUsize::new(0)));
    let delivered = async {
        while outbox.depth() > 0 {
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        never = run(outbox.clone(), silent) => match never {},
        done = timeout(Duration::from_secs(90), delivered) => done.expect("tried again"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_event_is_counted_and_the_next_of_its_sandbox_goes_out() {
    let dir = dir();
    let outbox = open(&dir);
    put(&outbox, "a", 1).await;
    put(&outbox, "a", 2).await;
    let receiver = Receiver::new(|event| match event.timestamp_unix {
        1 => Delivery::Refused("no such host\n".into()),
        _ => Delivery::Delivered,
    });
    assert_eq!(receiver.empty(&outbox).await, pairs(&[("a", 2)]));
    assert_eq!((outbox.refused(), outbox.dropped()), (1, 0));
    assert_eq!(kept(&reopen(outbox, &dir).await), []);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_dropped_loses_nothing_and_another_goes_on() {
    let dir = dir();
    let outbox = open(&dir);
    for at in 0..3 {
        put(&outbox, "a", at).await;
    }
    let receiver = Receiver::new(|_| Delivery::Delivered);
    let stopped = timeout(Duration::from_millis(150), run(outbox.clone(), receiver.clone())).await;
    assert!(stopped.is_err());
    assert_eq!((receiver.taken(), outbox.depth()), (pairs(&[("a", 0)]), 2));
    let again = Receiver::new(|_| Delivery::Delivered);
    assert_eq!(again.empty(&outbox).await, pairs(&[("a", 1), ("a", 2)]));
}

#[tokio::test]
async fn a_put_whose_caller_goes_away_is_kept() {
    let dir = dir();
    let outbox = open(&dir);
    {
        let mut put = std::pin::pin!(outbox.put(event(EventKind::Stopped, "a", 1)));
        // Polled once.
        tokio::select! {
            biased;
            _ = &mut put => {}
            () = std::future::ready(()) => {}
        }
    }
    put(&outbox, "a", 2).await;
    assert_eq!(kept(&reopen(outbox, &dir).await), pairs(&[("a", 1), ("a", 2)]));
}

/// A new directory with this log in it, and with what a predecessor left that was killed while it wrote it anew.
fn with_log(content: &[u8]) -> TempDir {
    let dir = dir();
    fs::create_dir(dir.path().join("outbox")).expect("made");
    fs::write(log_of(&dir), content).expect("written");
    fs::write(
        log_of(&dir).with_extension("new"),
        "71309a33 {\"version\":1}\n5d41402a {\"pu",
    )
    .expect("written");
    dir
}

fn damage(dir: &TempDir) -> Vec<u8> {
    fs::read(log_of(dir).with_extension("damaged")).unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_log_that_ends_at_any_byte_keeps_every_whole_record_and_nothing_else() {
    let source = dir();
    let outbox = open(&source);
    put(&outbox, "a", 1).await;
    put(&outbox, "b", 2).await;
    Receiver::new(|event| match event.sandbox_id.as_str() {
        "a" => Delivery::Delivered,
        _ => Delivery::Refused("so that only a is left to note".into()),
    })
    .empty(&outbox)
    .await;
    put(&outbox, "c", 3).await;
    drop(reopen(outbox, &source).await);
    let log = fs::read(log_of(&source)).expect("read");
    let text = std::str::from_utf8(&log).expect("text");
    // Each kind of record at each of its bytes: the version, what is gone, a put.
    let starts: Vec<usize> = std::iter::once(0)
        .chain(text.match_indices('\n').map(|(end, _)| end + 1))
        .collect();
    let [_, second, .., gone, _, end] = starts[..] else {
        panic!("{} lines", starts.len())
    };
    for end in (0..=second).chain(gone..=end) {
        // What the whole lines before the cut say, read by other means.
        let mut expected = Vec::new();
        let whole = &text[..text[..end].rfind('\n').map_or(0, |last| last + 1)];
        for line in whole.lines() {
            let record: serde_json::Value = serde_json::from_str(&line[9..]).expect("JSON");
            if let Some(put) = record.get("put") {
                let id = put["event"]["sandbox_id"].as_str().expect("an id").to_owned();
                expected.push((
                    put["number"].clone(),
                    id,
                    put["event"]["timestamp"].as_i64().expect("a time"),
                ));
            }
            for gone in record
                .get("gone")
                .and_then(|gone| gone.as_array())
                .into_iter()
                .flatten()
            {
                expected.retain(|(number, ..)| number != gone);
            }
        }
        let mut expected: Vec<_> = expected.into_iter().map(|(_, id, at)| (id, at)).collect();
        let dir = with_log(&log[..end]);
        let mut outbox = open(&dir);
        assert_eq!(kept(&outbox), expected, "cut after {end} bytes");
        assert_eq!(damage(&dir), &log[whole.len()..end], "cut after {end} bytes");
        // It can be used at once.
        put(&outbox, "d", 4).await;
        outbox = reopen(outbox, &dir).await;
        expected.push(("d".into(), 4));
        assert_eq!(kept(&outbox), expected, "cut after {end} bytes");
    }
}

#[tokio::test]
async fn a_damaged_record_costs_no_other() {
    let source = dir();
    let outbox = open(&source);
    for (id, at) in [("a", 1), ("b", 2), ("c", 3)] {
        put(&outbox, id, at).await;
    }
    let log = fs::read(log_of(&source)).expect("read");
    let lines: Vec<&[u8]> = log.split_inclusive(|byte| *byte == b'\n').collect();
    let [version, a, b, c] = lines[..] else {
        panic!("{} lines", lines.len())
    };
    let mut flipped = b.to_vec();
    flipped[40] ^= 1;
    let long = vec![b'x'; 10_000];
    for (content, expected, aside) in [
        (vec![version, a, &flipped, c], vec![("a", 1), ("c", 3)], flipped.clone()),
        (vec![&flipped, a, c], vec![("a", 1), ("c", 3)], flipped.clone()),
        (
            vec![version, a, &long, b"\n", c],
            vec![("a", 1), ("c", 3)],
            [&long[..], b"\n"].concat(),
        ),
        (
            vec![version, a, b, c, &[0; 4096]],
            vec![("a", 1), ("b", 2), ("c", 3)],
            vec![0; 4096],
        ),
        // Not as anybody wrote it.
        (vec![version, b, a, c], vec![("b", 2), ("c", 3)], a.to_vec()),
        (vec![version, a, a], vec![("a", 1)], a.to_vec()),
        (
            vec![version, a, b"00000000 {}\n", b],
            vec![("a", 1), ("b", 2)],
            b"00000000 {}\n".to_vec(),
        ),
    ] {
        let dir = with_log(&content.concat());
        let outbox = open(&dir);
        assert_eq!(kept(&outbox), pairs(&expected));
        assert_eq!(damage(&dir), aside);
        put(&outbox, "d", 4).await;
        let mut expected = pairs(&expected);
        expected.push(("d".into(), 4));
        assert_eq!(kept(&reopen(outbox, &dir).await), expected);
    }
}

#[tokio::test]
async fn a_stored_log_is_read() {
    let stored = include_bytes!("samples/events-1.log");
    let dir = with_log(stored);
    let outbox = Outbox::open(&dir.path().join("outbox"), Limits::default()).expect("opened");
    assert_eq!(
        kept(&outbox),
        pairs(&[("cl-2", 1_754_000_001), ("cl-3", 1_754_000_002)])
    );
    assert!(!log_of(&dir).with_extension("damaged").exists());
}

#[test]
fn a_log_of_another_version_is_left_alone() {
    let json = r#"{"version":2}"#;
    let line = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
    let dir = with_log(line.as_bytes());
    let refused = Outbox::open(&dir.path().join("outbox"), Limits::default());
    assert!(matches!(refused, Err(OutboxError::Version { version: 2, .. })));
    assert_eq!(fs::read(log_of(&dir)).expect("read"), line.as_bytes());
}

#[test]
fn an_outbox_that_cannot_be_had_says_which_file_is_in_the_way() {
    let dir = dir();
    let file = dir.path().join("file");
    fs::write(&file, "").expect("written");
    fs::create_dir_all(dir.path().join("odd/events.log")).expect("a directory where a file should be");
    for (path, named) in [
        (file.join("outbox"), "file/outbox"),
        (dir.path().join("absent/outbox"), "absent/outbox"),
        (file.clone(), "/file"),
        (dir.path().join("odd"), "odd/events.log"),
    ] {
        let error = Outbox::open(&path, Limits::default()).expect_err(named);
        assert!(matches!(error, OutboxError::File(_)), "{error:?}");
        assert!(error.to_string().contains(named), "{error}");
    }
}

#[tokio::test]
async fn a_directory_has_one_outbox_at_a_time() {
    let dir = dir();
    let outbox = open(&dir);
    let clone = outbox.clone();
    drop(outbox);
    let second = Outbox::open(&dir.path().join("outbox"), Limits::default());
    assert!(matches!(second, Err(OutboxError::InUse { .. })));
    put(&clone, "a", 1).await;
    assert_eq!(kept(&reopen(clone, &dir).await), pairs(&[("a", 1)]));
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_is_said_to_the_caller_and_loses_nothing_that_was_kept() {
    let dir = dir();
    let outbox = open(&dir);
    put(&outbox, "a", 1).await;
    outbox.shared.log.lock().expect("not poisoned").fill_disk();
    let error = outbox
        .put(event(EventKind::Stopped, "b", 2))
        .await
        .expect_err("no room");
    let text = Chain(&error).to_string();
    assert!(text.contains("events.log") && text.contains("No space left"), "{text}");
    assert_eq!(kept(&outbox), pairs(&[("a", 1)]));
    // Room again: the log is written anew, because nobody knows what the old one has in it.
    put(&outbox, "c", 3).await;
    outbox.shared.log.lock().expect("not poisoned").fill_disk();
    Receiver::new(|_| Delivery::Delivered).empty(&outbox).await;
    put(&outbox, "d", 4).await;
    assert_eq!(
        kept(&reopen(outbox, &dir).await),
        pairs(&[("d", 4)]),
        "what is gone was forgotten by the disk"
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_outbox_drops_the_least_and_counts_it() {
    use EventKind::{AutoPaused, Stopped};
    let dir = dir();
    let limits = Limits {
        events: 4,
        bytes: 1 << 20,
    };
    let outbox = open_with(&dir, limits);
    let burst = |outbox: &Outbox| outbox.shared.state().burst;
    for (kind, id, at) in [
        (AutoPaused, "a", 1),
        (AutoPaused, "b", 2),
        (Stopped, "b", 3),
        (AutoPaused, "c", 4),
        (AutoPaused, "c", 5),
        (AutoPaused, "c", 6),
    ] {
        outbox.put(event(kind, id, at)).await.expect("kept");
    }
    let left = pairs(&[("b", 3), ("c", 4), ("c", 5), ("c", 6)]);
    assert_eq!(kept(&outbox), left, "b's pause goes first, then the oldest");
    assert_eq!((outbox.dropped(), burst(&outbox)), (2, 2));
    let outbox = reopen(outbox, &dir).await;
    assert_eq!(kept(&outbox), left, "what was dropped came back");
    assert_eq!(outbox.dropped(), 0);
    drop(reopen(outbox, &dir).await);
    // With less room than before.
    let outbox = open_with(&dir, Limits { events: 3, ..limits });
    assert_eq!((kept(&outbox), outbox.dropped()), (left[1..].to_vec(), 1));
    put(&outbox, "d", 7).await;
    assert_eq!((outbox.dropped(), burst(&outbox)), (2, 2));
    Receiver::new(|_| Delivery::Delivered).empty(&outbox).await;
    assert_eq!((outbox.dropped(), burst(&outbox)), (2, 0), "the burst is over");
}

#[tokio::test(start_paused = true)]
async fn the_log_stays_small_whether_events_are_delivered_or_dropped() {
    let dir = dir();
    let limits = Limits {
        events: 10_000,
        bytes: 20_000,
    };
    let outbox = open_with(&dir, limits);
    let bound = 2 * limits.bytes + (64 << 10);
    let batch = |round: i64| (0..100).map(move |id| event(EventKind::AutoPaused, &format!("s{id}"), round));
    for round in 0..20 {
        put_all(&outbox, batch(round)).await;
        // The commit that has answered may be writing the log anew: its lock is free when it has.
        drop(outbox.shared.log.lock().expect("not poisoned"));
        let length = fs::metadata(log_of(&dir)).expect("there").len();
        assert!(length <= bound, "{length} bytes in round {round}");
    }
    assert!(outbox.dropped() > 0);
    assert!(outbox.shared.state().backlog.bytes() <= limits.bytes);
    for round in 0..20 {
        Receiver::new(|_| Delivery::Delivered).empty(&outbox).await;
        put_all(&outbox, batch(round)).await;
        drop(outbox.shared.log.lock().expect("not poisoned"));
        let length = fs::metadata(log_of(&dir)).expect("there").len();
        assert!(length <= bound, "{length} bytes in round {round}");
    }
    let before = kept(&outbox);
    assert_eq!(kept(&reopen(outbox, &dir).await), before);
}

/// A host that loses power: the log has every put that was answered, maybe not all of what is gone, and maybe half of a put that
/// was under way.
fn power_failure(log: &[u8], random: &mut Rng) -> Vec<u8> {
    let lines: Vec<&[u8]> = log.split_inclusive(|byte| *byte == b'\n').collect();
    let synced = 1 + lines
        .iter()
        .rposition(|line| !line[9..].starts_with(b"{\"gone\""))
        .expect("a first line");
    let survive = synced + random.usize(..=lines.len() - synced);
    let mut left = lines[..survive].concat();
    let under_way = log::put_line(1 << 40, &event(EventKind::Stopped, "never-answered", 0));
    left.extend(&under_way[..random.usize(..under_way.len())]);
    left
}

#[tokio::test(start_paused = true)]
async fn whatever_crashes_nothing_that_was_put_is_lost_and_no_sandbox_loses_its_order() {
    for seed in 0..8 {
        let mut random = Rng::with_seed(seed);
        let mut dir = dir();
        let mut outbox = open(&dir);
        let mut put_so_far = BTreeMap::<String, i64>::new();
        let mut taken_so_far = BTreeMap::<String, i64>::new();
        for step in 0..40 {
            for _ in 0..random.u64(..4) {
                let id = format!("s{}", random.u64(..4));
                let at = put_so_far.entry(id.clone()).or_default();
                *at += 1;
                put(&outbox, &id, *at).await;
            }
            // Some time with a receiver of moods.
            let moods = Mutex::new(Rng::with_seed(random.u64(..)));
            let receiver = Receiver::new(move |_| match moods.lock().expect("not poisoned").u64(..4) {
                0 => Delivery::Later,
                _ => Delivery::Delivered,
            });
            let time = Duration::from_millis(random.u64(..3000));
            let stopped = timeout(time, run(outbox.clone(), receiver.clone())).await;
            assert!(stopped.is_err());
            check(
                &receiver.taken(),
                &mut taken_so_far,
                &format!("seed {seed}, step {step}"),
            );
            if random.u64(..3) == 0 {
                let log = {
                    let _between_writes = outbox.shared.log.lock().expect("not poisoned");
                    fs::read(log_of(&dir)).expect("read")
                };
                let crashed = with_log(&power_failure(&log, &mut random));
                outbox = open(&crashed);
                dir = crashed;
            }
        }
        let receiver = Receiver::new(|_| Delivery::Delivered);
        let rest = receiver.empty(&outbox).await;
        check(&rest, &mut taken_so_far, &format!("seed {seed}, at the end"));
        assert_eq!(taken_so_far, put_so_far, "seed {seed}");
    }
}

/// Each sandbox's events rise one by one; they may begin with some that were taken before, and leave none out.
fn check(taken: &[(String, i64)], so_far: &mut BTreeMap<String, i64>, when: &str) {
    let mut last = BTreeMap::new();
    for (id, at) in taken {
        let before = so_far.entry(id.clone()).or_default();
        match last.insert(id, *at) {
            Some(last) => assert_eq!(*at, last + 1, "{id}, {when}"),
            None => assert!(*at <= *before + 1, "{id} went from {before} to {at}, {when}"),
        }
        *before = (*before).max(*at);
    }
}
