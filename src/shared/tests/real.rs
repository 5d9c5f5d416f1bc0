//! The script in a real server, on a clock that the test sets: word for word what the model says.

use std::cell::{Cell, RefCell};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proptest::test_runner::{Config, TestRunner};
use redis::{Connection, ConnectionLike as _, Value};

use super::super::script::{self, BackedUs, Call, Constants, Reply, Want};
use super::store::{State, lend};
use super::*;

const KEY: &str = "test:budget";

/// A server that ends with the test.
pub(in crate::shared) struct Server {
    child: Child,
    socket: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    pub(in crate::shared) fn start() -> (Self, Connection) {
        let socket = tempfile::tempdir().unwrap();
        let path = socket.path().join("redis");
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--unixsocket"]).arg(&path);
        command.stdout(Stdio::null()).current_dir(socket.path());
        let child = command.spawn().unwrap_or_else(|error| {
            panic!(
                "redis-server cannot be started ({error}): install it, on Debian with `apt-get install redis-server`"
            )
        });
        let server = Self { child, socket };
        let client = redis::Client::open(format!("unix:{}", server.socket.path().join("redis").display())).unwrap();
        for _ in 0..1000 {
            if let Ok(mut connection) = client.get_connection()
                && connection.check_connection()
            {
                return (server, connection);
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
        panic!("redis-server does not answer");
    }
}

/// The script, for which the time is what the second key says.
fn timed() -> redis::Script {
    let text = script::LEND.replace("redis.call('TIME')", "{0, tonumber(KEYS[2])}");
    assert_ne!(text, script::LEND, "the clock is set");
    redis::Script::new(&text)
}

fn constants(who: &str, limit: u32, replicas: u32) -> Constants {
    Constants {
        who: who.to_owned(),
        limit,
        replicas,
        window: Duration::from_millis(1030),
    }
}

fn ask(connection: &mut Connection, script: &redis::Script, now: u64, call: &Call, constants: &Constants) -> Reply {
    let mut invocation = script.prepare_invoke();
    invocation.key(KEY).key(now.to_string());
    for word in call.words(constants) {
        invocation.arg(word);
    }
    Reply::read(invocation.invoke::<Value>(connection).unwrap()).unwrap()
}

#[derive(Clone, Debug)]
struct Step {
    /// How far the clock moves first, in µs.
    moves: i64,
    who: usize,
    /// How old the time named is; `None` says hello.
    names: Option<u64>,
    lends: bool,
    /// Of each account: weight, flights, whether more than one waits, and a pause.
    wants: Vec<(usize, u32, usize, bool, Option<i64>)>,
    forgets: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let moves = prop_oneof![20 => 0..30_000_i64, 2 => 0..300_000_i64, 1 => -5_000..0_i64, 1 => Just(-2_000_000_i64)];
    let names = prop_oneof![12 => (0..1_200_000_u64).prop_map(Some), 1 => Just(None)];
    let pause = prop_oneof![12 => Just(None), 1 => (1..2_000_000_i64).prop_map(Some)];
    let want = (0..3_usize, 1..50_u32, 0..4_usize, any::<bool>(), pause);
    let wants = prop::collection::vec(want, 0..3);
    let forgets = prop::bool::weighted(0.01);
    (moves, 0..4_usize, names, prop::bool::weighted(0.9), wants, forgets).prop_map(
        |(moves, who, names, lends, wants, forgets)| Step {
            moves,
            who,
            names,
            lends,
            wants,
            forgets,
        },
    )
}

#[test]
fn the_script_does_what_its_model_does() {
    let (_server, connection) = Server::start();
    let connection = RefCell::new(connection);
    let info: String = redis::cmd("INFO")
        .arg("server")
        .query(&mut *connection.borrow_mut())
        .unwrap();
    let run = info.split_once("run_id:").unwrap().1.lines().next().unwrap().to_owned();
    let script = timed();
    let steps = prop::collection::vec(step(), 1..120);
    let constants_of = prop::sample::select(vec![(15, 3), (15, 4), (15, 1), (100, 7), (4, 4)]);
    let granted = Cell::new(0);
    TestRunner::new(Config::with_cases(64))
        .run(&(constants_of, steps), |((limit, replicas), steps)| {
            let connection = &mut *connection.borrow_mut();
            let _: () = redis::cmd("FLUSHALL").query(connection).unwrap();
            let (mut state, mut now): (Option<State>, u64) = (None, 1_790_000_000_123_456);
            for step in steps {
                now = now.checked_add_signed(step.moves).unwrap();
                if step.forgets {
                    state = None;
                    let _: () = redis::cmd("DEL").arg(KEY).query(connection).unwrap();
                }
                let constants = constants(&step.who.to_string(), limit, replicas);
                let want =
                    |(account, weight, flights, is_queue, pause): &(usize, u32, usize, bool, Option<i64>)| Want {
                        account: account.to_string(),
                        weight: *weight,
                        flights: *flights,
                        is_queue: *is_queue || *flights > 1,
                        backed: pause.map(|left_us| BackedUs {
                            left_us,
                            rate: 2.5,
                            chosen_us: 1_000_000,
                        }),
                    };
                let call = Call {
                    generation: state.as_ref().map(|state| state.generation.clone()).unwrap_or_default(),
                    named: step.names.map(|age| now - age),
                    lends: step.lends,
                    wants: step.wants.iter().map(want).collect(),
                };
                let expected = lend(&mut state, &run, now as f64, &call, &constants, || {
                    format!("{run}:{now}")
                });
                let reply = ask(connection, &script, now, &call, &constants);
                let slots = reply.dealt.iter().filter(|dealt| dealt.slot.is_some()).count();
                granted.set(granted.get() + slots);
                prop_assert_eq!(reply, expected, "{:?}", call);
            }
            Ok(())
        })
        .unwrap();
    assert!(granted.get() > 100, "permits were dealt: {granted:?}");
}

/// As if each had counted for itself, one from long ago, and neither of where the account as a whole was.
#[test]
fn what_an_older_version_has_kept_keeps_nobody_waiting() {
    const AGED: &str = "
        local account = cmsgpack.unpack(redis.call('HGET', KEYS[1], 'account:music'))
        account.virtual = nil
        for who, want in pairs(account.wants) do
          account.wants[who] = {who == 'old' and 5000 or want[1], want[2], want[3]}
        end
        redis.call('HSET', KEYS[1], 'account:music', cmsgpack.pack(account))";
    let (_server, mut connection) = Server::start();
    let script = timed();
    let (mut now, mut generation) = (1_790_000_000_000_000, String::new());
    let mut is_granted = |connection: &mut Connection, who: &str| {
        now += 35_000;
        let call = Call {
            generation: generation.clone(),
            named: Some(now),
            lends: true,
            wants: vec![Want {
                account: "music".to_owned(),
                weight: 250,
                flights: 2,
                is_queue: true,
                backed: None,
            }],
        };
        let reply = ask(connection, &script, now, &call, &constants(who, 15, 2));
        generation = reply.generation;
        reply.dealt.iter().any(|dealt| dealt.slot.is_some())
    };
    for who in ["old", "new", "old", "new"] {
        is_granted(&mut connection, who);
    }
    let _: Value = redis::cmd("EVAL")
        .arg(AGED)
        .arg(1)
        .arg(KEY)
        .query(&mut connection)
        .unwrap();
    let mut granted = [0, 0];
    for _ in 0..60 {
        for (who, granted) in ["old", "new"].into_iter().zip(&mut granted) {
            *granted += u32::from(is_granted(&mut connection, who));
        }
    }
    assert!(granted.iter().all(|granted| *granted >= 20), "{granted:?}");
}

#[test]
fn replicas_that_are_gone_are_forgotten() {
    let (_server, mut connection) = Server::start();
    let script = timed();
    let now = 1_790_000_000_000_000;
    let mut generation = String::new();
    let mut leases = |who: &str, now: u64| {
        let call = Call {
            generation: generation.clone(),
            named: Some(now),
            lends: true,
            wants: Vec::new(),
        };
        generation = ask(&mut connection, &script, now, &call, &constants(who, 15, 3)).generation;
        let length = redis::cmd("HSTRLEN")
            .arg(KEY)
            .arg("leases")
            .query::<usize>(&mut connection);
        length.unwrap()
    };
    leases("one", now);
    let alone = leases("one", now);
    for replica in 0..100 {
        leases(&format!("another-{replica}"), now);
    }
    assert!(leases("one", now) > 50 * alone);
    assert_eq!(leases("one", now + 2_100_000), alone);
}

#[test]
fn accounts_that_nobody_uses_are_forgotten_and_the_hash_does_not_stay_for_ever() {
    let (_server, mut connection) = Server::start();
    let script = timed();
    let constants = constants("one", 15, 3);
    let mut now = 1_790_000_000_000_000;
    let (mut generation, backed) = (String::new(), Cell::new(None));
    let mut fields = |now: u64, accounts: std::ops::Range<u32>| {
        let want = |account: u32| Want {
            account: account.to_string(),
            weight: 10,
            flights: 1,
            is_queue: false,
            backed: backed.get(),
        };
        let call = Call {
            generation: generation.clone(),
            named: Some(now),
            lends: true,
            wants: accounts.map(want).collect(),
        };
        generation = ask(&mut connection, &script, now, &call, &constants).generation;
        redis::cmd("HLEN").arg(KEY).query::<u32>(&mut connection).unwrap()
    };
    let empty = fields(now, 0..0);
    // Whoever is paused for longer than that is known for as long, and until its rate has recovered.
    let paused = BackedUs {
        left_us: 60_000_000,
        rate: 2.5,
        chosen_us: 1_000_000,
    };
    backed.set(Some(paused));
    fields(now, 1000..1001);
    backed.set(None);
    for account in 0..300 {
        fields(now, account..account + 1);
    }
    let full = fields(now, 0..1);
    assert!(full >= empty + 300, "{full}");
    // Some ten calls a second look at some fifty each.
    for _ in 0..600 {
        now += 110_000;
        fields(now, 0..1);
    }
    let left = fields(now, 0..1);
    assert!(left <= empty + 4, "{left} fields are left of {full}");
    let is_known: bool = redis::cmd("HEXISTS")
        .arg(KEY)
        .arg("account:1000")
        .query(&mut connection)
        .unwrap();
    assert!(is_known, "its rate has yet to recover");
    let ttl: i64 = redis::cmd("PTTL").arg(KEY).query(&mut connection).unwrap();
    assert!((1..=60_000).contains(&ttl), "{ttl}");
}
