//! What the demo shows: figures that are redrawn in place in a terminal, one line a time elsewhere, and a summary.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::Deserialize;

use super::fleet::{Size, Tallied};

/// The queries a second that upstream allows an account.
pub(super) const LIMIT: usize = 15;

/// What upstream counted, of all that `/__stats` tells.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Counted {
    pub(super) requests: u64,
    pub(super) violations: u64,
    pub(super) highest_in_any_second: usize,
}

/// Both sides of the gateway, at one moment.
#[derive(Clone, Debug)]
pub(super) struct Figures {
    /// Since the first client set to work.
    pub(super) elapsed: Duration,
    pub(super) clients: Tallied,
    pub(super) upstream: Counted,
}

impl Figures {
    /// Whether the demo shows what it is to show.
    pub(super) fn are_good(&self) -> bool {
        self.clients.polls > 0 && self.clients.errors == 0 && self.upstream.violations == 0
    }

    fn polls_per_second(&self) -> f64 {
        per_second(self.clients.polls, self.elapsed)
    }

    /// The share of polls that cost no call upstream, in percent.
    fn saved(&self) -> f64 {
        let polls = as_f64(self.clients.polls);
        if polls == 0.0 {
            return 0.0;
        }
        (100.0 * (1.0 - as_f64(self.upstream.requests) / polls)).max(0.0)
    }

    fn line(&self) -> String {
        format!(
            "{:>3} s  polls {}  upstream calls {}  saved {:.1} %  tasks ended {}  highest in a second {}  violations {}  errors {}",
            self.elapsed.as_secs(),
            self.clients.polls,
            self.upstream.requests,
            self.saved(),
            self.clients.ended,
            self.upstream.highest_in_any_second,
            self.upstream.violations,
            self.clients.errors,
        )
    }

    fn block(&self) -> Vec<String> {
        let Self { clients, upstream, .. } = self;
        let calls = per_second(upstream.requests, self.elapsed);
        vec![
            format!("  {:>3} s", self.elapsed.as_secs()),
            format!(
                "  polls served            {:>7}   {:.1}/s",
                clients.polls,
                self.polls_per_second()
            ),
            format!("  upstream calls spent    {:>7}   {calls:.1}/s", upstream.requests),
            format!("  saved                   {:>7.1} %", self.saved()),
            format!("  tasks ended             {:>7}", clients.ended),
            format!(
                "  highest in any second   {:>7}   of {LIMIT}",
                upstream.highest_in_any_second
            ),
            format!("  violations              {:>7}", upstream.violations),
            format!("  client errors           {:>7}", clients.errors),
        ]
    }

    /// What it all came to.
    pub(super) fn summary(&self) -> Vec<String> {
        let Self { clients, upstream, .. } = self;
        let direct = per_second(clients.polls + clients.errors, self.elapsed);
        let mut lines = vec![
            format!(
                "{} polls answered in {:.0} s, {} errors, {} tasks ended; the slowest answer took {:.1} s.",
                clients.polls,
                self.elapsed.as_secs_f64(),
                clients.errors,
                clients.ended,
                clients.slowest.as_secs_f64(),
            ),
            format!(
                "Through the gateway they cost {} upstream calls ({:.1} % saved), at most {} in any second, {} violations.",
                upstream.requests,
                self.saved(),
                upstream.highest_in_any_second,
                upstream.violations,
            ),
            format!(
                "The same polls direct would have needed {direct:.1} calls/s = {:.1}x the limit of {LIMIT}/s.",
                direct / as_f64(LIMIT as u64),
            ),
        ];
        lines.extend(clients.first_errors.iter().map(|error| format!("  error: {error}")));
        lines.push(if self.are_good() {
            "The limit held, and every client got its answers.".to_owned()
        } else {
            "FAILED: see above.".to_owned()
        });
        lines
    }
}

fn per_second(count: u64, elapsed: Duration) -> f64 {
    as_f64(count) / elapsed.as_secs_f64().max(0.001)
}

fn as_f64(count: u64) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

/// The output.
pub(super) struct Board {
    out: io::Stdout,
    in_place: bool,
    /// Lines to go up before the next drawing.
    drawn: usize,
}

impl Board {
    pub(super) fn new() -> Self {
        let out = io::stdout();
        Self {
            in_place: out.is_terminal(),
            out,
            drawn: 0,
        }
    }

    /// How often to draw.
    pub(super) fn period(&self) -> Duration {
        if self.in_place {
            Duration::from_millis(500)
        } else {
            Duration::from_secs(1)
        }
    }

    pub(super) fn introduce(&mut self, size: Size) -> io::Result<()> {
        let Size {
            clients,
            tasks,
            watchers,
        } = size;
        self.write(&[
            format!(
                "{clients} clients poll {tasks} tasks, {watchers} clients each, every 1 to 2 s; upstream allows {LIMIT} queries a second.",
            ),
            String::new(),
        ])
    }

    pub(super) fn draw(&mut self, figures: &Figures) -> io::Result<()> {
        if !self.in_place {
            return self.write(&[figures.line()]);
        }
        let block = figures.block();
        if self.drawn > 0 {
            // Up to where the last drawing began, and clear from there.
            write!(self.out, "\x1b[{}A\x1b[J", self.drawn)?;
        }
        self.drawn = block.len();
        self.write(&block)
    }

    pub(super) fn summarise(&mut self, figures: &Figures) -> io::Result<()> {
        self.write(&[String::new()])?;
        self.write(&figures.summary())
    }

    fn write(&mut self, lines: &[String]) -> io::Result<()> {
        for line in lines {
            writeln!(self.out, "{line}")?;
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(polls: u64, errors: u64, requests: u64, violations: u64) -> Figures {
        Figures {
            elapsed: Duration::from_secs(10),
            clients: Tallied {
                polls,
                errors,
                ..Tallied::default()
            },
            upstream: Counted {
                requests,
                violations,
                highest_in_any_second: 15,
            },
        }
    }

    #[test]
    fn it_is_good_only_when_all_were_served_within_the_limit() {
        assert!(figures(1500, 0, 150, 0).are_good());
        assert!(!figures(1500, 1, 150, 0).are_good());
        assert!(!figures(1500, 0, 150, 1).are_good());
        assert!(!figures(0, 0, 0, 0).are_good());
    }

    #[test]
    fn the_summary_tells_what_polling_direct_would_have_needed() {
        let summary = figures(1500, 0, 150, 0).summary().join("\n");
        assert!(summary.contains("150.0 calls/s = 10.0x the limit of 15/s"), "{summary}");
        assert!(summary.contains("90.0 % saved"), "{summary}");
    }
}
