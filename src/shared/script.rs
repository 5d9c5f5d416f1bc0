//! What a process says to the shared store and what it hears: the words of the one script, `lend.lua`. No I/O.
//!
//! Times are the store's, in µs since 1970 on its own clock; what a process makes of them is `shared::process`'s.

use std::time::Duration;

use redis::{Script, ScriptInvocation, Value, from_redis_value};

/// The script. Its rules are in `shared.rs`.
pub(super) const LEND: &str = include_str!("lend.lua");

/// What is the same in every call of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Constants {
    /// The process, by a random number per start.
    pub(super) who: String,
    /// Queries a second that upstream allows each account.
    pub(super) limit: u32,
    /// The most processes that run at once.
    pub(super) replicas: u32,
    /// 1 s plus the margin.
    pub(super) window: Duration,
}

/// One call.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Call {
    /// The generation seen last; empty before the first.
    pub(super) generation: String,
    /// The server's time seen last, in µs; `None` says hello, and asks for nothing.
    pub(super) named: Option<u64>,
    /// Whether the slice is lent: not by a process that was told to stop.
    pub(super) lends: bool,
    /// The accounts that want a permit.
    pub(super) wants: Vec<Want>,
}

/// An account that wants a permit.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Want {
    pub(super) account: String,
    /// Of the clients that wait here, in tenths.
    pub(super) weight: u32,
    /// Flights with a connection.
    pub(super) flights: usize,
    /// More than one waits, with a connection or without.
    pub(super) is_queue: bool,
    /// Upstream's last 429, where the store does not know of it.
    pub(super) backed: Option<BackedUs>,
}

/// What an upstream 429 does to an account, as a process has it in `Backed`, in µs from now on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct BackedUs {
    /// Until queries may go on, in µs; negative: since when they do.
    pub(super) left_us: i64,
    /// Queries a second, of the limit, that may then be asked.
    pub(super) rate: f64,
    /// The pause that was chosen where upstream did not say for how long.
    pub(super) chosen_us: u64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reply {
    pub(super) generation: String,
    /// The server's time, in µs.
    pub(super) time: u64,
    /// Processes that lend.
    pub(super) alive: u32,
    /// One for each account that wanted a permit; none where the call came too late, or only said hello.
    pub(super) dealt: Vec<Dealt>,
}

/// What an account is dealt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Dealt {
    /// From the call's arrival to the permit's slot.
    pub(super) slot: Option<Duration>,
    /// After how long to ask again.
    pub(super) again: Option<Duration>,
    /// This process's part of what is paid out at this moment, from 0 to 1; `None` where it asked for nothing.
    pub(super) part: Option<f64>,
    pub(super) backed: Option<BackedUs>,
}

impl Call {
    /// The script's invocation on `key`.
    pub(super) fn invoke<'a>(&self, script: &'a Script, key: &str, constants: &Constants) -> ScriptInvocation<'a> {
        let mut invocation = script.prepare_invoke();
        invocation.key(key);
        for word in self.words(constants) {
            invocation.arg(word);
        }
        invocation
    }

    /// The script's ARGV.
    pub(super) fn words(&self, constants: &Constants) -> Vec<String> {
        let mut words = vec![
            constants.who.clone(),
            self.generation.clone(),
            self.named.map(|time| time.to_string()).unwrap_or_default(),
            u8::from(self.lends).to_string(),
            constants.limit.to_string(),
            constants.replicas.to_string(),
            constants.window.as_micros().to_string(),
        ];
        for want in &self.wants {
            let backed = want.backed.filter(|backed| backed.left_us > 0);
            words.extend([
                want.account.clone(),
                want.weight.max(1).to_string(),
                want.flights.to_string(),
                u8::from(want.is_queue).to_string(),
                backed.map_or(0, |backed| backed.left_us).to_string(),
                backed.map_or(0.0, |backed| backed.rate).to_string(),
                backed.map_or(0, |backed| backed.chosen_us).to_string(),
            ]);
        }
        words
    }
}

impl Reply {
    /// Reads what the script returns. `None`: it is nothing that the script says.
    pub(super) fn read(value: Value) -> Option<Self> {
        let words: Vec<String> = from_redis_value(value).ok()?;
        let (head, accounts) = words.split_at_checked(3)?;
        let [generation, time, alive] = head else { return None };
        if generation.is_empty() || accounts.len() % 6 != 0 {
            return None;
        }
        Some(Self {
            generation: generation.clone(),
            time: time.parse().ok()?,
            alive: alive.parse().ok()?,
            dealt: accounts.chunks_exact(6).map(dealt).collect::<Option<_>>()?,
        })
    }
}

fn dealt(words: &[String]) -> Option<Dealt> {
    let [slot, again, part, left, rate, chosen] = words else {
        return None;
    };
    let span = |word: &String| match word.as_str() {
        "" => Some(None),
        micros => Some(Some(Duration::from_micros(micros.parse().ok()?))),
    };
    let part = match part.as_str() {
        "" => None,
        millionths => Some((millionths.parse::<f64>().ok()? / 1e6).clamp(0.0, 1.0)),
    };
    let backed = if left.is_empty() {
        None
    } else {
        Some(BackedUs {
            left_us: left.parse().ok()?,
            rate: rate.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0)?,
            chosen_us: chosen.parse().ok()?,
        })
    };
    Some(Dealt {
        slot: span(slot)?,
        again: span(again)?,
        part,
        backed,
    })
}
