//! File descriptors: each connection takes one, and where they run out nobody gets in, the platform's probes included.
//!
//! So the soft limit is raised to the hard one at start, and where that is not enough for what `limits` allow, they are
//! lowered to what fits: then whoever is too many is told so, and the admin port goes on answering.

use std::fmt;
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Limits;

/// Descriptors that no limit counts: 64 connections each at the admin port and being turned away, listeners, runtimes,
/// files and look-ups of names.
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
    /// As many of each as fit, in proportion.
    fitting: (usize, usize),
}

impl Shortfall {
    /// What is missing when this many descriptors are `available`; `None` when nothing is.
    pub fn of(limits: &Limits, available: u64) -> Option<Self> {
        let (connections, upstream_connections) = (limits.connections, limits.upstream_connections);
        let wanted = (connections + upstream_connections) as u64;
        let room = available - SPARE.min(available / 2);
        if wanted <= room {
            return None;
        }
        let part = |of: usize| {
            let fitting = u128::from(room) * of as u128 / u128::from(wanted);
            usize::try_from(fitting).map_or(of, |fitting| fitting.clamp(1, of))
        };
        Some(Self {
            connections,
            upstream_connections,
            available,
            fitting: (part(connections), part(upstream_connections)),
        })
    }

    /// `limits`, lowered to what fits.
    pub fn fit(&self, limits: &mut Limits) {
        (limits.connections, limits.upstream_connections) = self.fitting;
    }
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
    fn a_shortfall_names_field_and_fix() {
        let said = Shortfall::of(&limits(20_000, 2000), 1024).unwrap().to_string();
        assert_eq!(
            said,
            "limits.connections: 20000 and limits.upstream_connections of 2000 take 22192 file descriptors, and a process \
             may have 1024 here, so that 756 and 75 are let in: raise the hard limit (ulimit -Hn, LimitNOFILE=), or lower \
             them"
        );
    }
}
