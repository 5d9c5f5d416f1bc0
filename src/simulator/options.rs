//! The options of the simulated upstream.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use super::steer;

/// Run a strict stand-in for api.crun.ai, for trying things out and for tests.
#[derive(Args, Clone, Debug)]
#[command(after_help = steer::HELP)]
pub struct UpstreamArgs {
    /// Where to listen; the port 0 takes a free one, told on the first line of the output.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8081")]
    pub listen: SocketAddr,
    /// `TaskInfo` queries that an account may make in any sliding second.
    #[arg(long, value_name = "N", default_value_t = 15)]
    pub limit: usize,
    /// How long after its arrival a request is answered.
    #[arg(long, value_name = "DURATION", default_value = "200ms", value_parser = humantime::parse_duration)]
    pub latency: Duration,
    /// How long a task runs, from when it is first seen.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    pub run_time: Duration,
    /// By how much more, at most, a task runs; how much of it is the id's own matter.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    pub run_time_spread: Duration,
    /// The form of a 429: an HTTP status, or a code in the body of an HTTP 200.
    #[arg(long, value_enum, default_value_t = RateLimitForm::Http)]
    pub rate_limit_form: RateLimitForm,
    /// The Retry-After of a 429: none, a number of seconds, or date (an HTTP-date two seconds ahead).
    #[arg(long, value_name = "none|SECONDS|date", default_value = "none")]
    pub retry_after: RetryAfter,
    /// Close connections that are idle for so long [default: never].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub idle_close: Option<Duration>,
    /// Close the connection after every answer, without announcing it.
    #[arg(long)]
    pub close_after_response: bool,
    /// Hold back the opening of a connection for so long: its TLS handshake or, without TLS, its first read.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub open_delay: Option<Duration>,
    /// Hold back only every n-th connection.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub open_delay_every: u64,
    /// The certificate chain, PEM; serves TLS.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Keys that share one account, separated by commas; may be given several times. Any other key is an account.
    #[arg(long, value_name = "KEY,KEY…")]
    pub account_keys: Vec<AccountKeys>,
    /// End when the standard input, a pipe, is closed: with the process that started this one, however that ends.
    #[arg(long)]
    pub end_with_stdin: bool,
}

impl Default for UpstreamArgs {
    /// What the command line gives when nothing is said, but on a free port.
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            limit: 15,
            latency: Duration::from_millis(200),
            run_time: Duration::from_mins(1),
            run_time_spread: Duration::ZERO,
            rate_limit_form: RateLimitForm::Http,
            retry_after: RetryAfter::None,
            idle_close: None,
            close_after_response: false,
            open_delay: None,
            open_delay_every: 1,
            tls_cert: None,
            tls_key: None,
            account_keys: Vec::new(),
            end_with_stdin: false,
        }
    }
}

/// The form of a 429.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RateLimitForm {
    /// HTTP 429.
    Http,
    /// HTTP 200 with code 429 in the body.
    Body,
}

/// The `Retry-After` of a 429.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryAfter {
    /// None.
    None,
    /// A number of seconds.
    Seconds(u64),
    /// An HTTP-date, two seconds ahead.
    Date,
}

impl FromStr for RetryAfter {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "none" => Ok(Self::None),
            "date" => Ok(Self::Date),
            _ => text
                .parse()
                .map(Self::Seconds)
                .context("neither none, nor date, nor a number of seconds"),
        }
    }
}

/// Keys that share one account. Never printed.
#[derive(Clone)]
pub struct AccountKeys(Vec<String>);

impl AccountKeys {
    pub(super) fn contains(&self, key: &str) -> bool {
        self.0.iter().any(|own| own == key)
    }
}

impl FromStr for AccountKeys {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let keys = text.split(',').map(str::trim).filter(|key| !key.is_empty());
        Ok(Self(keys.map(str::to_owned).collect()))
    }
}

impl fmt::Debug for AccountKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AccountKeys({} keys)", self.0.len())
    }
}

impl UpstreamArgs {
    /// The certificate and key files, when TLS is asked for.
    pub(super) fn tls_files(&self) -> anyhow::Result<Option<(&PathBuf, &PathBuf)>> {
        match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => Ok(Some((cert, key))),
            (None, None) => Ok(None),
            _ => bail!("--tls-cert and --tls-key go together"),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: UpstreamArgs,
    }

    #[test]
    fn the_defaults_are_those_of_the_command_line() {
        let told = Line::parse_from(["upstream", "--listen", "127.0.0.1:0"]).args;
        assert_eq!(format!("{told:?}"), format!("{:?}", UpstreamArgs::default()));
    }

    #[test]
    fn account_keys_are_repeatable_and_never_printed() {
        let line = [
            "upstream",
            "--account-keys",
            "k1,k2",
            "--account-keys",
            "k3",
            "--retry-after",
            "7",
        ];
        let args = Line::parse_from(line).args;
        assert!(args.account_keys[0].contains("k2") && args.account_keys[1].contains("k3"));
        assert_eq!(args.retry_after, RetryAfter::Seconds(7));
        assert!(!format!("{args:?}").contains("k1"));
    }
}
