//! The filesystem service of a real envd, over TCP.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::time::Duration;

use common::{Envd, PATIENCE, as_user, can_become_another_user};
use connectrpc::client::{CallOptions, ClientConfig, ClientTransport, HttpClient, ServerStream};
use connectrpc::{ConnectError, ErrorCode};
use roost_common::guest::filesystem::watch_dir_response::Event;
use roost_common::guest::filesystem::{
    CreateWatcherRequest, EntryInfo, EventType, FileType, FilesystemClient, FilesystemEvent, GetWatcherEventsRequest,
    ListDirRequest, MakeDirRequest, MoveRequest, RemoveRequest, RemoveWatcherRequest, StatRequest, WatchDirRequest,
    WatchDirResponse, WatchDirResponseView,
};

fn client(envd: &Envd) -> FilesystemClient<HttpClient> {
    let config = ClientConfig::new(format!("http://{}", envd.address).parse().unwrap());
    FilesystemClient::new(HttpClient::plaintext(), config)
}

async fn stat(envd: &Envd, path: &str) -> Result<EntryInfo, ConnectError> {
    let request = StatRequest {
        path: path.to_owned(),
        ..Default::default()
    };
    let answer = client(envd).stat(request).await?.into_owned();
    Ok(answer.entry.into_option().unwrap())
}

async fn make(envd: &Envd, path: &str, options: CallOptions) -> Result<EntryInfo, ConnectError> {
    let request = MakeDirRequest {
        path: path.to_owned(),
        ..Default::default()
    };
    let answer = client(envd).make_dir_with_options(request, options).await?.into_owned();
    Ok(answer.entry.into_option().unwrap())
}

async fn list(envd: &Envd, path: &str, depth: u32) -> Result<Vec<EntryInfo>, ConnectError> {
    let request = ListDirRequest {
        path: path.to_owned(),
        depth,
        ..Default::default()
    };
    Ok(client(envd).list_dir(request).await?.into_owned().entries)
}

async fn move_to(envd: &Envd, source: &str, destination: &str) -> Result<EntryInfo, ConnectError> {
    let request = MoveRequest {
        source: source.to_owned(),
        destination: destination.to_owned(),
        ..Default::default()
    };
    let answer = client(envd).r#move(request).await?.into_owned();
    Ok(answer.entry.into_option().unwrap())
}

async fn remove(envd: &Envd, path: &str, options: CallOptions) -> Result<(), ConnectError> {
    let request = RemoveRequest {
        path: path.to_owned(),
        ..Default::default()
    };
    client(envd).remove_with_options(request, options).await.map(drop)
}

fn code<T: std::fmt::Debug>(result: Result<T, ConnectError>) -> ErrorCode {
    result.unwrap_err().code
}

#[tokio::test]
async fn directories_are_made_listed_moved_and_removed() {
    let envd = Envd::start();
    let home = envd.root.join("home").display().to_string();
    let made = make(&envd, "a/b", CallOptions::default()).await.unwrap();
    assert_eq!(
        (made.name.as_str(), made.path.as_str()),
        ("b", format!("{home}/a/b").as_str())
    );
    assert_eq!(made.r#type.as_known(), Some(FileType::FILE_TYPE_DIRECTORY));
    assert_eq!((made.mode, made.permissions.as_str()), (0o755, "drwxr-xr-x"));
    fs::write(format!("{home}/a/b/file"), "12345").unwrap();
    let names = |entries: Vec<EntryInfo>| entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>();
    assert_eq!(names(list(&envd, "~", 0).await.unwrap()), ["a"]);
    assert_eq!(names(list(&envd, "", 3).await.unwrap()), ["a", "b", "file"]);
    let moved = move_to(&envd, "a/b/file", "new/place/moved").await.unwrap();
    assert_eq!(
        (moved.path.as_str(), moved.size),
        (format!("{home}/new/place/moved").as_str(), 5)
    );
    let found = stat(&envd, "~/new/place/moved").await.unwrap();
    assert_eq!(found, moved);
    assert_eq!(found.owner, stat(&envd, ".").await.unwrap().owner);
    let age = found.modified_time.seconds;
    assert!(age > 1_700_000_000, "{age}");
    // What is not there is removed already.
    for _ in 0..2 {
        remove(&envd, "new", CallOptions::default()).await.unwrap();
    }
    assert_eq!(code(stat(&envd, "new").await), ErrorCode::NotFound);
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_with_its_code() {
    let envd = Envd::start();
    let home = envd.root.join("home");
    fs::write(home.join("file"), "").unwrap();
    fs::create_dir_all(home.join("full/of")).unwrap();
    symlink("loop", home.join("loop")).unwrap();
    let none = CallOptions::default;
    assert_eq!(code(make(&envd, "full", none()).await), ErrorCode::AlreadyExists);
    assert_eq!(code(make(&envd, "file", none()).await), ErrorCode::InvalidArgument);
    assert_eq!(
        code(make(&envd, "file/below", none()).await),
        ErrorCode::InvalidArgument
    );
    assert_eq!(code(list(&envd, "file", 1).await), ErrorCode::InvalidArgument);
    assert_eq!(code(list(&envd, "missing", 1).await), ErrorCode::NotFound);
    assert_eq!(code(list(&envd, "loop", 1).await), ErrorCode::FailedPrecondition);
    assert_eq!(
        code(move_to(&envd, "missing", "made/for/nothing").await),
        ErrorCode::NotFound
    );
    assert!(!home.join("made").exists());
    assert_eq!(
        code(move_to(&envd, "full", "full/of/itself").await),
        ErrorCode::InvalidArgument
    );
    assert_eq!(code(remove(&envd, "/", none()).await), ErrorCode::InvalidArgument);
    assert_eq!(code(stat(&envd, "file/below").await), ErrorCode::NotFound);
    for bad in ["a\0b", "~somebody", &"n".repeat(300), &"a/".repeat(3000)] {
        assert_eq!(code(stat(&envd, bad).await), ErrorCode::InvalidArgument, "{bad:.20}");
        assert_eq!(
            code(make(&envd, bad, none()).await),
            ErrorCode::InvalidArgument,
            "{bad:.20}"
        );
    }
    assert_eq!(
        code(make(&envd, "x", as_user("no-such-user")).await),
        ErrorCode::InvalidArgument
    );
    // Links are told with what they lead to.
    symlink("file", home.join("link")).unwrap();
    let link = stat(&envd, "link").await.unwrap();
    assert_eq!(link.r#type.as_known(), Some(FileType::FILE_TYPE_FILE));
    assert!(link.symlink_target.unwrap().ends_with("/home/file"));
    assert_eq!(stat(&envd, "full/../file").await.unwrap().name, "file");
}

#[tokio::test]
async fn a_call_has_the_rights_of_its_user_and_no_others() {
    if !can_become_another_user() {
        return;
    }
    let envd = Envd::start();
    let at = |name: &str| envd.root.join(name).display().to_string();
    fs::create_dir(at("open")).unwrap();
    fs::set_permissions(at("open"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir(at("closed")).unwrap();
    fs::set_permissions(at("closed"), fs::Permissions::from_mode(0o700)).unwrap();
    let nobody = || as_user("nobody");
    let made = make(&envd, &at("open/a/b"), nobody()).await.unwrap();
    assert_eq!(made.owner, "nobody");
    assert_eq!(fs::metadata(at("open/a")).unwrap().uid(), 65534);
    assert_eq!(
        code(make(&envd, &at("closed/a"), nobody()).await),
        ErrorCode::PermissionDenied
    );
    assert_eq!(
        code(make(&envd, &at("new"), nobody()).await),
        ErrorCode::PermissionDenied
    );
    assert_eq!(
        code(remove(&envd, &at("closed"), nobody()).await),
        ErrorCode::PermissionDenied
    );
    let request = WatchDirRequest {
        path: at("closed"),
        ..Default::default()
    };
    let refused = first(client(&envd).watch_dir_with_options(request, nobody()).await).await;
    assert_eq!(code(refused), ErrorCode::PermissionDenied);
    // The calls of root around it are root's still.
    make(&envd, &at("closed/a"), CallOptions::default()).await.unwrap();
}

type Stream = ServerStream<<HttpClient as ClientTransport>::ResponseBody, WatchDirResponseView<'static>>;

/// The first event of a watch, or why there is none.
async fn first(stream: Result<Stream, ConnectError>) -> Result<Event, ConnectError> {
    let mut stream = stream?;
    let message = stream.message::<WatchDirResponse>().await?.expect("a first message");
    Ok(message.to_owned_message().event.unwrap())
}

async fn watch(envd: &Envd, path: &str, recursive: bool) -> Stream {
    let request = WatchDirRequest {
        path: path.to_owned(),
        recursive,
        include_entry: true,
        ..Default::default()
    };
    let mut stream = client(envd).watch_dir(request).await.unwrap();
    let start = stream.message::<WatchDirResponse>().await.unwrap().unwrap();
    assert!(matches!(start.to_owned_message().event, Some(Event::Start(_))));
    stream
}

async fn change(stream: &mut Stream) -> Option<FilesystemEvent> {
    let message = tokio::time::timeout(PATIENCE, stream.message::<WatchDirResponse>());
    let message = message.await.expect("a change in time").unwrap()?;
    match message.to_owned_message().event {
        Some(Event::Filesystem(event)) => Some(*event),
        other => panic!("{other:?}"),
    }
}

/// Reads until there was this change.
async fn until(stream: &mut Stream, kind: EventType, name: &str) -> FilesystemEvent {
    loop {
        let event = change(stream).await.expect("the watch goes on");
        if event.name == name && event.r#type.as_known() == Some(kind) {
            return event;
        }
    }
}

#[tokio::test]
async fn changes_are_told_also_below_directories_that_are_new() {
    use EventType::{
        EVENT_TYPE_CHMOD as CHMOD, EVENT_TYPE_CREATE as CREATE, EVENT_TYPE_REMOVE as REMOVE,
        EVENT_TYPE_RENAME as RENAME, EVENT_TYPE_WRITE as WRITE,
    };
    let envd = Envd::start();
    let at = |name: &str| envd.root.join("home").join(name);
    fs::create_dir_all(at("old/deep")).unwrap();
    let mut stream = watch(&envd, "~", true).await;
    fs::write(at("old/deep/file"), "x").unwrap();
    let created = until(&mut stream, CREATE, "old/deep/file").await;
    assert_eq!(created.entry.into_option().unwrap().name, "file");
    until(&mut stream, WRITE, "old/deep/file").await;
    fs::set_permissions(at("old/deep/file"), fs::Permissions::from_mode(0o600)).unwrap();
    let entry = until(&mut stream, CHMOD, "old/deep/file")
        .await
        .entry
        .into_option()
        .unwrap();
    assert_eq!(entry.mode, 0o600);
    // Made faster than anybody can watch: each is told all the same.
    fs::create_dir_all(at("new/a/b/c")).unwrap();
    fs::write(at("new/a/b/c/file"), "x").unwrap();
    for name in ["new", "new/a", "new/a/b", "new/a/b/c", "new/a/b/c/file"] {
        until(&mut stream, CREATE, name).await;
    }
    // Within the tree a directory keeps its watches, under its new name.
    fs::rename(at("new"), at("old/moved")).unwrap();
    until(&mut stream, RENAME, "new").await;
    until(&mut stream, CREATE, "old/moved").await;
    fs::write(at("old/moved/a/b/c/file"), "y").unwrap();
    until(&mut stream, WRITE, "old/moved/a/b/c/file").await;
    // Out of it, and back under another name.
    fs::rename(at("old/moved"), envd.root.join("outside")).unwrap();
    let gone = until(&mut stream, RENAME, "old/moved").await;
    assert!(!gone.entry.is_set());
    fs::write(envd.root.join("outside/a/unseen"), "").unwrap();
    fs::rename(envd.root.join("outside"), at("back")).unwrap();
    until(&mut stream, CREATE, "back/a/unseen").await;
    fs::write(at("back/a/unseen"), "z").unwrap();
    until(&mut stream, WRITE, "back/a/unseen").await;
    fs::remove_dir_all(at("back")).unwrap();
    until(&mut stream, REMOVE, "back/a/unseen").await;
    until(&mut stream, REMOVE, "back").await;
    // An upload to a file that is there is a write to it.
    let (status, _) = envd.http(
        "POST",
        "/files?path=old/deep/file",
        &[("content-type", "application/octet-stream")],
        "up",
    );
    assert_eq!(status, 200);
    until(&mut stream, WRITE, "old/deep/file").await;
    // One to a new file is its creation and a write to it; where its bytes were before is told to nobody.
    let (status, _) = envd.http(
        "POST",
        "/files?path=old/uploaded",
        &[("content-type", "application/octet-stream")],
        "up",
    );
    assert_eq!(status, 200);
    let mut told = Vec::new();
    while told
        .last()
        .is_none_or(|(name, kind)| (name, kind) != (&"old/uploaded".to_owned(), &Some(WRITE)))
    {
        let event = change(&mut stream).await.expect("the watch goes on");
        told.push((event.name, event.r#type.as_known()));
    }
    assert!(told.contains(&("old/uploaded".to_owned(), Some(CREATE))), "{told:?}");
    assert!(!told.iter().any(|(name, _)| name.contains('#')), "{told:?}");
    // The end of the directory is the end of the watch.
    fs::remove_dir_all(at("")).unwrap();
    until(&mut stream, REMOVE, ".").await;
    assert_eq!(change(&mut stream).await, None);
    fs::create_dir(at("")).unwrap();
}

#[tokio::test]
async fn a_watch_that_is_not_recursive_tells_of_one_directory() {
    let envd = Envd::start();
    let at = |name: &str| envd.root.join("home").join(name);
    fs::create_dir(at("below")).unwrap();
    let mut stream = watch(&envd, "~", false).await;
    fs::write(at("below/file"), "").unwrap();
    fs::write(at("file"), "").unwrap();
    let event = change(&mut stream).await.unwrap();
    assert_eq!(event.name, "file");
    for (path, expected) in [("file", ErrorCode::InvalidArgument), ("missing", ErrorCode::NotFound)] {
        let request = WatchDirRequest {
            path: path.to_owned(),
            ..Default::default()
        };
        assert_eq!(code(first(client(&envd).watch_dir(request).await).await), expected);
    }
}

#[tokio::test]
async fn a_watcher_keeps_changes_until_they_are_fetched_and_tells_when_some_are_lost() {
    let envd = Envd::start();
    let home = envd.root.join("home");
    let create = CreateWatcherRequest {
        path: "~".to_owned(),
        recursive: true,
        ..Default::default()
    };
    let id = client(&envd)
        .create_watcher(create)
        .await
        .unwrap()
        .into_owned()
        .watcher_id;
    let fetch = || {
        let request = GetWatcherEventsRequest {
            watcher_id: id.clone(),
            ..Default::default()
        };
        let client = client(&envd);
        async move {
            client
                .get_watcher_events(request)
                .await
                .map(|answer| answer.into_owned().events)
        }
    };
    assert_eq!(fetch().await.unwrap(), []);
    fs::write(home.join("file"), "").unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut events = Vec::new();
    while events.is_empty() {
        assert!(std::time::Instant::now() < deadline);
        events = fetch().await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(events[0].name, "file");
    // More than all queues hold: those that were kept come first, then that some are lost.
    let limit: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    if limit > 100_000 {
        // It would take too many files.
        return;
    }
    for number in 0..limit + 4000 {
        let mode = 0o600 + (number as u32 & 1);
        fs::set_permissions(home.join("file"), fs::Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let lost = loop {
        match fetch().await {
            Ok(_) => assert!(std::time::Instant::now() < deadline + PATIENCE, "nothing was lost"),
            Err(error) => break error,
        }
    };
    assert_eq!(
        (lost.code, code(fetch().await)),
        (ErrorCode::DataLoss, ErrorCode::DataLoss)
    );
    let request = RemoveWatcherRequest {
        watcher_id: id.clone(),
        ..Default::default()
    };
    client(&envd).remove_watcher(request.clone()).await.unwrap();
    assert_eq!(
        code(client(&envd).remove_watcher(request).await.map(drop)),
        ErrorCode::NotFound
    );
    assert_eq!(code(fetch().await), ErrorCode::NotFound);
}

#[tokio::test]
async fn a_watch_that_nobody_reads_any_more_is_given_up() {
    let envd = Envd::start();
    let threads = || fs::read_dir(format!("/proc/{}/task", envd.pid())).unwrap().count();
    let before = threads();
    let streams = [watch(&envd, "~", false).await, watch(&envd, "~", true).await];
    assert!(threads() >= before + 2);
    drop(streams);
    common::eventually("its threads end", || threads() <= before + 1).await;
}
