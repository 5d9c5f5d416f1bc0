//! Packing an answer that is kept, and unpacking it for a hit.

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use crun_gateway::account::AccountIds;
use crun_gateway::stored::{Answer, Draft, Keeping};
use crun_gateway::task::{TaskId, read};
use http::StatusCode;
use tokio::time::Instant;

use crate::answer::body;
use crate::timed;

/// Packs an answer with a body of `of` bytes `times` times.
pub fn packs(of: usize, times: usize) -> Duration {
    let answer = answer(of);
    timed(|| {
        for _ in 0..times {
            assert!(black_box(answer.block()).packed().is_some());
        }
    })
}

/// Unpacks one `times` times.
pub fn unpacks(of: usize, times: usize) -> Duration {
    let packed = Answer::from(answer(of).block().packed().unwrap());
    let mut out = Vec::new();
    timed(|| {
        for _ in 0..times {
            out.clear();
            assert!(black_box(&packed).unpack(&mut out));
            assert_eq!(out.len(), of);
        }
    })
}

fn answer(size: usize) -> Answer {
    let task = TaskId::new("5a0e2f17-2f17-43d4-8514-000000000000").unwrap();
    let body = Bytes::from(body(task.as_str(), size));
    let (reading, now) = (read(200, &body, &task), Instant::now());
    let draft = Draft {
        keeping: Some(Keeping::briefly(Duration::from_secs(1))),
        ..Draft::new(StatusCode::OK, body, reading, now, now)
    };
    draft.of(AccountIds::default().listed("music"), &task)
}
