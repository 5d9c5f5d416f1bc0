//! A test's own ear for what is logged on its thread.

use std::fs::File;
use std::sync::{Arc, LazyLock};

use tracing::subscriber::{DefaultGuard, NoSubscriber};
use tracing::{Dispatch, Level};

/// Keeps the process from having a single listener: tracing would ask the thread that comes upon a line first whether anybody
/// listens, for all threads and for good, and another test's says no.
static OTHER_LISTENERS: LazyLock<[Dispatch; 2]> =
    LazyLock::new(|| [(); 2].map(|()| Dispatch::new(NoSubscriber::new())));

/// Has what is logged on this thread at `level` and above written to `log`, for as long as what is given back is there.
pub fn listen(log: File, level: Level) -> DefaultGuard {
    LazyLock::force(&OTHER_LISTENERS);
    let lines = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(Arc::new(log));
    tracing::subscriber::set_default(lines.finish())
}
