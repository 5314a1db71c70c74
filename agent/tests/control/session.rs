//! Credentials: on disk before they are used, one refresh at a time, none lost but where its answer is.

use std::sync::Arc;
use std::time::Duration;

use roost_agent::control::heartbeat;
use roost_agent::control::listing::Listing;
use roost_agent::control::session::RefreshError;

use crate::plane::{Fate, HEARTBEAT, Plane, REFRESH, TOKEN, store};

#[tokio::test]
async fn a_refused_token_is_replaced_and_on_disk_before_it_is_used() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    let first = plane.register(dir.path(), TOKEN).await.expect("registered");
    let session = plane.session(dir.path());
    plane.lock().is_expired = true;
    // What is on disk when the first call with the new token comes.
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    plane.judge({
        let (seen, store) = (seen.clone(), store(dir.path()));
        move |path| {
            let kept = store.load().expect("read").expect("credentials");
            seen.lock()
                .expect("not poisoned")
                .push((path.to_owned(), kept.refresh_token.expose().to_owned()));
            Fate::Answered
        }
    });
    let listing = Listing::under_control_plane();
    let beats = async {
        while !plane.answers(HEARTBEAT).contains(&204) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = heartbeat::run(&session, &listing) => panic!("not deleted"),
        () = beats => {}
    }
    let seen = seen.lock().expect("not poisoned").clone();
    let expected = [
        (HEARTBEAT, "refresh-1"),
        (REFRESH, "refresh-1"),
        (HEARTBEAT, "refresh-2"),
    ];
    assert_eq!(seen, expected.map(|(path, token)| (path.to_owned(), token.to_owned())));
    assert_ne!(*session.credentials(), first);
}

#[tokio::test]
async fn calls_that_are_refused_together_are_one_refresh() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let session = plane.session(dir.path());
    let used = session.credentials();
    let all = futures::future::join_all((0..16).map(|_| session.refresh(&used))).await;
    let current = session.credentials();
    assert!(
        all.into_iter()
            .all(|outcome| Arc::ptr_eq(&outcome.expect("refreshed"), &current))
    );
    assert_eq!(plane.answers(REFRESH), [200]);
}

#[tokio::test]
async fn a_refresh_goes_on_when_its_caller_does_not_wait() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let session = plane.session(dir.path());
    plane.judge(|_| Fate::Slow(Duration::from_millis(200)));
    let used = session.credentials();
    let waited = tokio::time::timeout(Duration::from_millis(100), session.refresh(&used)).await;
    assert!(waited.is_err());
    let next = session.refresh(&used).await.expect("refreshed");
    assert_eq!(next.refresh_token.expose(), "refresh-2");
    assert_eq!(plane.answers(REFRESH), [200]);
}

#[tokio::test]
async fn an_agent_that_ended_between_keeping_and_using_goes_on_with_what_it_kept() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let session = plane.session(dir.path());
    // Its refresh is done, and nothing more of this agent is heard.
    session.refresh(&session.credentials()).await.expect("refreshed");
    drop(session);
    for number in 3..6 {
        let session = plane.session(dir.path());
        session
            .refresh(&session.credentials())
            .await
            .expect("refreshed by the next agent");
        assert_eq!(
            session.credentials().refresh_token.expose(),
            format!("refresh-{number}")
        );
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_could_not_be_kept_is_kept_later_without_another_refresh() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let session = plane.session(dir.path());
    let used = session.credentials();
    let (here, away) = (dir.path().join("credentials"), dir.path().join("away"));
    // The directory goes once the draft is made, and comes back.
    plane.judge({
        let (here, away) = (here.clone(), away.clone());
        move |_| {
            std::fs::rename(&here, &away).expect("renamed");
            Fate::Answered
        }
    });
    let error = session.refresh(&used).await.expect_err("not kept");
    assert!(matches!(error, RefreshError::File(_)), "{error}");
    assert!(
        Arc::ptr_eq(&used, &session.credentials()),
        "what is not on disk is not used"
    );
    std::fs::rename(&away, &here).expect("renamed");
    plane.judge(|_| Fate::Answered);
    assert!(matches!(session.refresh(&used).await, Err(RefreshError::TooSoon)));
    tokio::time::sleep(Duration::from_secs(10)).await;
    let next = session.refresh(&used).await.expect("kept");
    assert_eq!(store(dir.path()).load().expect("read").as_ref(), Some(&*next));
    assert_eq!(plane.answers(REFRESH), [200]);
}

#[tokio::test]
async fn nothing_is_asked_for_where_there_is_no_room_for_it() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let session = plane.session(dir.path());
    std::fs::rename(dir.path().join("credentials"), dir.path().join("away")).expect("renamed");
    std::fs::write(dir.path().join("credentials"), "in the way").expect("written");
    let error = session.refresh(&session.credentials()).await.expect_err("no room");
    assert!(matches!(error, RefreshError::File(_)), "{error}");
    assert!(plane.answers(REFRESH).is_empty());
}

#[tokio::test(start_paused = true)]
async fn credentials_are_replaced_when_most_of_their_life_is_over() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.lock().is_old = true;
    plane.register(dir.path(), TOKEN).await.expect("registered");
    plane.lock().is_old = false;
    let session = plane.session(dir.path());
    let now = roost_agent::sandbox::unix_now();
    session.refresh_if_due(now).await;
    session.refresh_if_due(now).await;
    session.refresh_if_due(now + 4 * 24 * 3600).await;
    assert_eq!(plane.answers(REFRESH), [200]);
    session.refresh_if_due(now + 5 * 24 * 3600).await;
    assert_eq!(plane.answers(REFRESH), [200], "a token that is new cannot be old");
    tokio::time::sleep(Duration::from_secs(301)).await;
    session.refresh_if_due(now + 5 * 24 * 3600).await;
    assert_eq!(plane.answers(REFRESH), [200, 200]);
}
