//! What the rig's tests are made of: a census of everything roost makes on a host, and roost as a person uses it.
//!
//! Every test runs inside [`in_rig`], which compares the census before and after: every end-to-end test is a leak test. Tests run
//! one at a time, because a census is of the whole host.

pub mod census;
pub mod counts;
pub mod disk;
pub mod doctor;
pub mod internet;
pub mod privd;
pub mod random;
pub mod roost;
pub mod saved;
pub mod trace;

use std::io::Write as _;
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use census::Census;

/// Longest time that the kernel, systemd and an emulated machine may take for anything a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Whether tests are to run at full size, by `cargo xtask test --all`.
pub fn is_full_size() -> bool {
    std::env::var_os("ROOST_TESTS_ALL").is_some()
}

/// Prints past libtest, which would keep it to itself until the end, and of a test that passes for ever.
///
/// # Panics
/// When standard error has gone.
pub fn show(line: &str) {
    std::io::stderr()
        .write_all(format!("  {line}\n").as_bytes())
        .expect("written");
}

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a test, then waits until the host is as it was before.
///
/// # Panics
/// When the test does, when something is left, and outside the rig.
pub fn in_rig(test: impl FnOnce()) {
    assert!(
        std::path::Path::new("/rig/settings").exists(),
        "this test needs the rig: run it by `cargo xtask test`, or `cargo xtask rig`"
    );
    // A test that failed has said so; the next one starts from its own census.
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    static WARM: Once = Once::new();
    // privd's static table stays from its first start on, so it is there before the first census.
    WARM.call_once(|| {
        if roost::pids("roost-privd").is_empty() {
            internet::run("systemctl start roost-privd.service");
        }
        eventually("privd's table", || {
            Census::take().lists("nft", "table inet roost").then_some(())
        });
    });
    let before = Census::take();
    test();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = Census::take().differences(&before);
        if left.is_empty() {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "the test left on the host:\n{}",
            left.join("\n")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits for a value to be there.
///
/// # Panics
/// After [`PATIENCE`], saying what was waited for.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = look() {
            return value;
        }
        let waited = began.elapsed();
        assert!(waited < PATIENCE, "waited in vain for {what}");
        // The longer it takes the less often: looking takes processor time from what is waited for.
        std::thread::sleep((Duration::from_millis(20) + waited / 20).min(Duration::from_secs(1)));
    }
}
