//! Reading what an answer says: bodies of the size of a song's, of a long one's, and of one that echoes what was sent.

use std::hint::black_box;
use std::time::Duration;

use crun_gateway::task::{Class, TaskId, read};

use crate::answer::body;
use crate::timed;

/// Reads a body of `of` bytes `times` times.
pub fn run(of: usize, times: usize) -> Duration {
    let task = TaskId::new("5a0e2f17-2f17-43d4-8514-000000000000").unwrap();
    let body = body(task.as_str(), of);
    timed(|| {
        for _ in 0..times {
            let reading = read(200, black_box(&body), &task);
            assert_eq!(reading.class, Class::Terminal);
        }
    })
}
