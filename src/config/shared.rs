//! Replicas that share each account's budget, answers and flights: how many there may be, and the store through which they do.
//!
//! Credentials never stand in the URL, which is printed and logged, but in files or environment variables that
//! configuration names.

use std::num::NonZeroU32;
use std::time::Duration;

use bytesize::{MIB, TIB};
use serde_json::Value;

use super::problem::{Wrong, wrong};
use super::reader::Reader;
use super::{CaFile, Key, secret, tls, values};

/// How replicas share budgets, answers and flights.
#[derive(Clone, Debug, PartialEq)]
pub struct Shared {
    /// The most processes that ever run at once; each owns `budget.limit` ÷ this, rounded down.
    pub max_replicas: NonZeroU32,
    /// Valkey or Redis; without one each replica spends its own part, and no more.
    pub store: Option<Store>,
}

/// The shared store.
#[derive(Clone, Debug, PartialEq)]
pub struct Store {
    /// Where it is.
    pub url: StoreUrl,
    /// What the names of its keys begin with.
    pub prefix: String,
    /// The most memory, in bytes, that the store may use for one more answer to be kept there; 0 shares the budget alone.
    pub max_bytes: u64,
    /// The name to log in with; the store's default user without one.
    pub username: Option<String>,
    /// The password.
    pub password: Option<Key>,
    /// The sentinels' password.
    pub sentinel_password: Option<Key>,
    /// Extra roots.
    pub ca_file: Option<CaFile>,
    /// DNS, TCP, TLS and log-in together.
    pub connect_timeout: Duration,
    /// A call without a reply for so long is given up.
    pub timeout: Duration,
}

/// `redis://host:port/db`, `rediss://…` over TLS; with `+sentinel` the sentinels' addresses and the service's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUrl {
    /// Over TLS.
    pub is_tls: bool,
    /// Host and port of the store, or of each sentinel.
    pub addresses: Vec<(String, u16)>,
    /// Whose primary the sentinels are asked for.
    pub service: Option<String>,
    /// The number of the database.
    pub db: i64,
}

const EXAMPLE: &str = "redis://valkey:6379";
const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

impl std::fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sentinel = if self.service.is_some() { "+sentinel" } else { "" };
        let scheme = if self.is_tls { "rediss" } else { "redis" };
        let addresses: Vec<_> = self.addresses.iter().map(written).collect();
        write!(f, "{scheme}{sentinel}://{}", addresses.join(","))?;
        if let Some(service) = &self.service {
            write!(f, "/{service}")?;
        }
        if self.db != 0 {
            write!(f, "/{}", self.db)
        } else {
            Ok(())
        }
    }
}

fn written((host, port): &(String, u16)) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Reads the section `shared`.
pub(super) fn section(r: &mut Reader<'_>) -> Option<Shared> {
    let max_replicas = r.nullable("max_replicas", |value| {
        let number = values::whole(value, &(1..=1000))?;
        Ok(u32::try_from(number).ok().and_then(NonZeroU32::new))
    });
    if max_replicas.is_none() && r.sound(&["", "max_replicas"]) {
        let fix = "write the highest number of processes that ever run at once";
        r.problem("max_replicas", "is missing", fix);
    }
    let url = r.nullable("url", url);
    let prefix = r.value("prefix", "crun-gateway:".to_owned(), prefix);
    let max_bytes = r.bytes("max_bytes", 256 * MIB, 0..=16 * TIB);
    let username = r.nullable("username", |value| values::text(value, "default").map(str::to_owned));
    let password = secret::optional(r, "password");
    let sentinel_password = secret::optional(r, "sentinel_password");
    let ca_file = tls::ca_file(r);
    let second = Duration::from_secs(1);
    let connect_timeout = r.duration("connect_timeout", second, Duration::from_millis(10)..=second * 60);
    let timeout = r.duration("timeout", second / 5, Duration::from_millis(10)..=second);
    let store = url.map(|url| Store {
        url,
        prefix,
        max_bytes,
        username,
        password,
        sentinel_password,
        ca_file,
        connect_timeout,
        timeout,
    });
    Some(Shared {
        max_replicas: max_replicas??,
        store,
    })
}

fn prefix(value: &Value) -> Result<String, Wrong> {
    let prefix = values::text(value, "crun-gateway:")?;
    if prefix.is_empty() || prefix.len() > 64 || !prefix.bytes().all(|b| b.is_ascii_graphic() && b != b'{' && b != b'}')
    {
        let fix = r#"use 1 to 64 visible characters, e.g. "crun-gateway:""#;
        return wrong("is not fit to begin a key's name", fix);
    }
    Ok(prefix.to_owned())
}

fn url(value: &Value) -> Result<StoreUrl, Wrong> {
    const SCHEMES: [(&str, bool, bool); 4] = [
        ("redis", false, false),
        ("rediss", true, false),
        ("redis+sentinel", false, true),
        ("rediss+sentinel", true, true),
    ];
    const FIX: &str = "write redis://host:port, rediss://… for TLS, or redis+sentinel://host:port,host:port/service";
    let text = values::text(value, EXAMPLE)?;
    let Some((scheme, rest)) = text.split_once("://") else {
        return wrong("is not a URL", FIX);
    };
    let Some((_, is_tls, has_sentinels)) = SCHEMES.into_iter().find(|(name, ..)| *name == scheme) else {
        return wrong("has a scheme that is none of redis, rediss and +sentinel", FIX);
    };
    if rest.contains('@') {
        let fix = "remove them, and name them in shared.username and shared.password";
        return wrong("has a user name or a password", fix);
    }
    if rest.contains(['?', '#']) {
        return wrong("has a query or a fragment", FIX);
    }
    let mut parts = rest.trim_end_matches('/').split('/');
    let hosts = parts.next().unwrap_or_default();
    let port = if has_sentinels { SENTINEL_PORT } else { PORT };
    let addresses: Option<Vec<_>> = hosts.split(',').map(|address| self::address(address, port)).collect();
    let Some(addresses) = addresses.filter(|addresses| has_sentinels || addresses.len() == 1) else {
        return wrong("has no valid host and port", FIX);
    };
    let service = if has_sentinels {
        let Some(service) = parts.next().filter(|name| !name.is_empty()) else {
            return wrong("does not name the service that the sentinels watch", FIX);
        };
        Some(service.to_owned())
    } else {
        None
    };
    let db = match parts.next() {
        None => Some(0),
        Some(number) => number.parse().ok().filter(|number| (0..=1000).contains(number)),
    };
    let (Some(db), None) = (db, parts.next()) else {
        return wrong("has a path that is no number of a database", FIX);
    };
    Ok(StoreUrl {
        is_tls,
        addresses,
        service,
        db,
    })
}

fn address(text: &str, port: u16) -> Option<(String, u16)> {
    let authority = text.parse().ok()?;
    let (host, named) = values::host_and_port(&authority)?;
    Some((host.to_owned(), named.unwrap_or(port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_named_by_scheme_host_and_database() {
        for (text, written) in [
            ("redis://valkey", "redis://valkey:6379"),
            ("redis://10.0.0.1:7000/", "redis://10.0.0.1:7000"),
            ("rediss://cache.example:6380/2", "rediss://cache.example:6380/2"),
            ("redis://[::1]:7000", "redis://[::1]:7000"),
            (
                "redis+sentinel://a,b:26380/main",
                "redis+sentinel://a:26379,b:26380/main",
            ),
            ("rediss+sentinel://a/main/3", "rediss+sentinel://a:26379/main/3"),
        ] {
            assert_eq!(url(&text.into()).unwrap().to_string(), written);
            assert_eq!(url(&written.into()).unwrap().to_string(), written);
        }
        for bad in [
            "valkey:6379",
            "http://valkey",
            "redis://",
            "redis://:pw@valkey",
            "redis://a,b",
            "redis://a:0",
            "redis://a:",
            "redis://a/b",
            "redis://a/0/1",
            "redis://a?x=1",
            "redis+sentinel://a",
        ] {
            assert!(url(&bad.into()).is_err(), "{bad}");
        }
    }
}
