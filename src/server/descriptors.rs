//! File descriptors: each connection takes one, and where they run out nobody gets in, the platform's probes included.
//!
//! So the soft limit is raised to the hard one at start, and where that is not enough for what `limits` allow, they are
//! lowered to what fits, then and when they change: whoever is too many is told so, and the admin port goes on answering.

use std::fmt;
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Limits;

/// Descriptors that no limit counts: 64 for connections at the admin port, as many for those being turned away, and the rest
/// for listeners, runtimes, files and look-ups of names. Where there is less to spare, fewer are turned away with a word.
const SPARE: u64 = 192;

/// Raises the soft limit to the hard one; says how many descriptors this process may now have.
///
/// # Errors
/// When the system does not tell, or does not allow it.
pub fn raise() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// How many descriptors [`raise`] can get.
///
/// # Errors
/// When the system does not tell.
pub fn hard_limit() -> io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.1)
}

/// Fewer descriptors than `limits` need. Says so, with field and fix.
#[derive(Debug, PartialEq, Eq)]
pub struct Shortfall {
    connections: usize,
    upstream_connections: usize,
    available: u64,
    /// As many of each as fit.
    fitting: (usize, usize),
}

impl Shortfall {
    /// What is missing when this many descriptors are `available`; `None` when nothing is. Upstream connections get their
    /// part in proportion.
    pub fn of(limits: &Limits, available: u64) -> Option<Self> {
        let most = limits.upstream_connections;
        let wanted = (limits.connections + most) as u64;
        let room = room(available);
        (wanted > room).then(|| {
            let part = u128::from(room) * most as u128 / u128::from(wanted);
            let upstream = usize::try_from(part).map_or(most, |part| part.clamp(1, most));
            Self::beside(limits, upstream, available)
        })
    }

    /// How many clients' connections there is room for where `upstream` connections are allowed whatever `limits` say, as
    /// long as the process runs.
    pub fn of_clients(limits: &Limits, upstream: usize, available: u64) -> Option<Self> {
        let wanted = (limits.connections + upstream) as u64;
        (wanted > room(available)).then(|| Self::beside(limits, upstream, available))
    }

    fn beside(limits: &Limits, upstream: usize, available: u64) -> Self {
        let connections = limits.connections;
        let left = usize::try_from(room(available)).map_or(connections, |room| room.saturating_sub(upstream));
        Self {
            connections,
            upstream_connections: limits.upstream_connections,
            available,
            fitting: (left.clamp(1, connections), upstream),
        }
    }

    /// `limits`, lowered to what fits.
    pub fn fit(&self, limits: &mut Limits) {
        (limits.connections, limits.upstream_connections) = self.fitting;
    }
}

/// How many connections may be told at once why they are not let in, without taking the descriptors that connections to
/// upstream need.
pub fn most_turned_away(available: u64) -> usize {
    usize::try_from(spare(available) / 3).unwrap_or(usize::MAX)
}

/// Descriptors for what `limits` count.
fn room(available: u64) -> u64 {
    available - spare(available)
}

fn spare(available: u64) -> u64 {
    SPARE.min(available / 2)
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            connections,
            upstream_connections,
            available,
            fitting: (clients, upstream),
        } = self;
        let wanted = (connections + upstream_connections) as u64 + SPARE;
        write!(
            f,
            "limits.connections: {connections} and limits.upstream_connections of {upstream_connections} take {wanted} \
             file descriptors, and a process may have {available} here, so that {clients} and {upstream} are let in: \
             raise the hard limit (ulimit -Hn, LimitNOFILE=), or lower them"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn limits(connections: usize, upstream_connections: usize) -> Limits {
        Limits {
            connections,
            upstream_connections,
            ..Config::default().limits
        }
    }

    #[test]
    fn what_fits_is_left_alone() {
        assert_eq!(Shortfall::of(&limits(20_000, 2000), 22_192), None);
        assert_eq!(Shortfall::of(&limits(1, 1), 4), None);
    }

    #[test]
    fn what_does_not_fit_is_lowered_in_proportion() {
        for available in [0, 1, 2, 40, 256, 1024, 22_191] {
            let mut limits = limits(20_000, 2000);
            let shortfall = Shortfall::of(&limits, available).unwrap();
            shortfall.fit(&mut limits);
            let (clients, upstream) = (limits.connections, limits.upstream_connections);
            assert!(clients >= 1 && upstream >= 1);
            assert!(
                (clients + upstream) as u64 <= available.max(2),
                "{available}: {clients} {upstream}"
            );
            if available > 256 {
                assert!((clients + upstream) as u64 + SPARE <= available);
                assert!(
                    clients / upstream >= 9 && clients / upstream <= 11,
                    "{available}: {clients} {upstream}"
                );
            }
        }
    }

    #[test]
    fn in_a_running_process_clients_get_what_upstream_connections_leave() {
        let fitting = |connections| {
            let mut limits = limits(connections, 200);
            Shortfall::of_clients(&limits, 134, 1000).map(|shortfall| {
                shortfall.fit(&mut limits);
                (limits.connections, limits.upstream_connections)
            })
        };
        assert_eq!(fitting(674), None);
        assert_eq!(fitting(675), Some((674, 134)));
        assert_eq!(fitting(100_000), Some((674, 134)));
    }

    #[test]
    fn a_third_of_what_is_spare_is_for_those_turned_away() {
        let cases = [0, 5, 6, 64, 128, 383, 384, 1 << 20, u64::MAX];
        assert_eq!(cases.map(most_turned_away), [0, 0, 1, 10, 21, 63, 64, 64, 64]);
    }

    #[test]
    fn a_shortfall_names_field_and_fix() {
        let said = Shortfall::of(&limits(20_000, 2000), 1024).unwrap().to_string();
        assert_eq!(
            said,
            "limits.connections: 20000 and limits.upstream_connections of 2000 take 22192 file descriptors, and a process \
             may have 1024 here, so that 757 and 75 are let in: raise the hard limit (ulimit -Hn, LimitNOFILE=), or lower \
             them"
        );
    }
}
