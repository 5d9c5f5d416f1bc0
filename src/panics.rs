//! What a panic ends, and what goes on.
//!
//! A panic is a bug, or tokio's answer where the process may have no thread more: [`spawn_blocking`] panics then. Neither
//! may end more than the work at hand, and least of all a task that nobody would start again. That it happened is counted
//! and logged where all panics come by, in `log`'s hook.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

/// How long a task that panicked rests, twice as long each time: what it ran into may last, and its lines fill the log.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Runs `work`; a panic in it gives `None`.
///
/// Nothing that work changes here is left half done by a panic: locks cover single steps.
pub fn contain<T, W: Future<Output = T>>(work: W) -> impl Future<Output = Option<T>> + use<T, W> {
    AssertUnwindSafe(work).catch_unwind().map(Result::ok)
}

/// Does `work`, which does not wait; a panic in it gives `None`.
pub fn contain_now<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

/// Does what goes on for as long as the process, named `task` in the log: after a panic it is begun anew, with a pause.
/// Ends when `work` does.
///
/// Cancel safe, as far as `work` is.
pub async fn supervise(task: &'static str, mut work: impl AsyncFnMut()) {
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = Instant::now();
        if contain(async { work().await }).await.is_some() {
            return;
        }
        if begun.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        tracing::warn!(task, ?pause, "a task panicked: it is begun anew after a pause");
        sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

/// Does `work` on a thread where it may take its time.
///
/// Cancel safe: what has begun is done to its end; dropped before a thread was free, it takes none.
///
/// # Errors
/// When it panics, or no thread can be had: then it may be done all the same, as soon as there is one.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    match contain(async { AbortOnDropHandle::new(spawn_blocking(work)).await }).await {
        Some(done) => Ok(done?),
        None => Err(io::Error::new(io::ErrorKind::WouldBlock, "no thread can be had")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_work_and_nothing_else() {
        assert_eq!(contain(async { 1 }).await, Some(1));
        assert_eq!(contain(async { panic!("a bug, planted") }).await, None::<()>);
        assert_eq!(contain_now(|| 1), Some(1));
        assert_eq!(contain_now(|| panic!("a bug, planted")), None::<()>);
        assert_eq!(blocking(|| 1).await.unwrap(), 1);
        let panicked = blocking::<()>(|| panic!("a bug, planted")).await;
        assert_eq!(panicked.unwrap_err().kind(), io::ErrorKind::Other);
    }

    #[test]
    fn what_is_given_up_before_a_thread_is_free_is_not_done() {
        let one_thread = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        one_thread.block_on(async {
            let (goes_on, held_up) = mpsc::channel::<()>();
            let mut first = Box::pin(blocking(move || held_up.recv()));
            assert!((&mut first).now_or_never().is_none());
            let kept = Arc::new(());
            let work = Arc::clone(&kept);
            assert!(
                blocking(move || panic!("it is done: {work:?}"))
                    .now_or_never()
                    .is_none()
            );
            drop(goes_on);
            assert!(first.await.unwrap().is_err());
            blocking(|| ()).await.unwrap();
            assert!(Arc::into_inner(kept).is_some());
        });
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_begun_anew_after_a_pause_that_grows_while_it_goes_on() {
        let start = Instant::now();
        let mut begun = Vec::new();
        supervise("planted", async || {
            begun.push(start.elapsed().as_secs());
            match begun.len() {
                ..=8 => panic!("a bug, planted"),
                9 => sleep(LONGEST_PAUSE + FIRST_PAUSE).await,
                _ => return,
            }
            panic!("a bug, planted");
        })
        .await;
        assert_eq!(begun, [0, 1, 3, 7, 15, 31, 61, 91, 121, 121 + 31 + 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_is_not_begun_anew() {
        let mut begun = 0;
        supervise("planted", async || begun += 1).await;
        assert_eq!(begun, 1);
    }
}
