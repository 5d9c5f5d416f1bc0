//! TLS for clients: the files that configuration names, and whether what they hold can be served.
//!
//! The configuration keeps the paths only: the files are read again whenever their content changes, by the same checks.
//! A certificate that has expired, or is not valid yet, is refused like a damaged one, since every client would refuse it.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor};
use secrecy::zeroize::Zeroizing;
use serde_json::Value;
use tokio_rustls::rustls::crypto::ring::sign::any_supported_type;
use tokio_rustls::rustls::sign::{CertifiedKey, SigningKey};
use tokio_rustls::rustls::{Error, InconsistentKeys, RootCertStore};
use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::Decode as _;

use super::problem::{Problem, Problems, Wrong, wrong};
use super::reader::Reader;
use super::{secret, values};

/// How far the clock of who issues a certificate may be ahead of ours.
const CLOCKS_APART: Duration = Duration::from_mins(1);

const CERT_FILE: &str = "cert_file";
const KEY_FILE: &str = "key_file";
const CLIENT_CA_FILE: &str = "client_ca_file";
const CLIENT_CERTIFICATES: &str = "client_certificates";

/// The files of the clients' edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The server's certificate and its intermediates, PEM.
    pub cert_file: PathBuf,
    /// The certificate's private key, PEM.
    pub key_file: PathBuf,
    /// What is asked of clients; `None` asks for no certificate.
    pub clients: Option<ClientCertificates>,
}

/// The certificates of clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificates {
    /// The roots that vouch for them, PEM.
    pub ca_file: PathBuf,
    /// Whether a client may come without one.
    pub demand: Demand,
}

/// Whether a client may come without a certificate. One that nobody vouches for ends the connection either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// It may not.
    Required,
    /// It may, and is known by its address.
    Optional,
}

/// The words for [`Demand`].
pub(super) const DEMANDS: [(&str, Demand); 2] = [("required", Demand::Required), ("optional", Demand::Optional)];

/// Extra roots for connections of ours: what they are here is what is trusted, whatever becomes of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaFile {
    /// The file, PEM.
    pub path: PathBuf,
    /// The roots in it, at least one.
    pub anchors: Arc<[TrustAnchor<'static>]>,
}

impl Deref for CaFile {
    type Target = [TrustAnchor<'static>];

    fn deref(&self) -> &Self::Target {
        &self.anchors
    }
}

/// What the files hold, checked.
#[derive(Debug)]
pub struct Identity {
    /// The certificate with its intermediates, and the key that belongs to it.
    pub certified: Arc<CertifiedKey>,
    /// Who vouches for clients, when they are asked for certificates.
    pub client_roots: Option<Arc<RootCertStore>>,
    /// When the first of the server's certificates expires.
    pub expires: SystemTime,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Everything that is wrong with them at `now`, each with its field.
    pub fn read(&self, now: SystemTime) -> Result<Identity, Problems> {
        self.identity(now).map_err(|found| {
            found
                .into_iter()
                .map(|(field, wrong)| Problem::new(format!("tls.{field}"), wrong))
                .collect()
        })
    }

    /// Every file that is read.
    pub fn files(&self) -> Vec<PathBuf> {
        let roots = self.clients.iter().map(|clients| &clients.ca_file);
        let own = [&self.cert_file, &self.key_file];
        own.into_iter().chain(roots).cloned().collect()
    }

    fn identity(&self, now: SystemTime) -> Result<Identity, Vec<(&'static str, Wrong)>> {
        let chain = chain(&self.cert_file, now);
        let key = private_key(&self.key_file);
        let roots = self
            .clients
            .as_ref()
            .map(|clients| roots(&clients.ca_file).map(Arc::new))
            .transpose();
        match (chain, key, roots) {
            (Ok((chain, expires)), Ok(key), Ok(client_roots)) => Ok(Identity {
                certified: paired(chain, key).map_err(|found| vec![found])?,
                client_roots,
                expires,
            }),
            (chain, key, roots) => Err(faults(chain.err(), key.err(), roots.err())),
        }
    }
}

/// What is wrong with the files, each with its field.
fn faults(chain: Option<Wrong>, key: Option<Wrong>, roots: Option<Wrong>) -> Vec<(&'static str, Wrong)> {
    let found = [(CERT_FILE, chain), (KEY_FILE, key), (CLIENT_CA_FILE, roots)];
    found
        .into_iter()
        .filter_map(|(field, wrong)| Some((field, wrong?)))
        .collect()
}

/// Reads the section `tls`, and checks the files that it names.
pub(super) fn section(r: &mut Reader<'_>) -> Option<Tls> {
    let cert_file = required(r, CERT_FILE, "/run/secrets/tls/tls.crt");
    let key_file = required(r, KEY_FILE, "/run/secrets/tls/tls.key");
    let ca_file = r.nullable(CLIENT_CA_FILE, |value| renewed(value, "/run/secrets/tls/ca.crt"));
    let demand = r.nullable(CLIENT_CERTIFICATES, |value| values::choice(value, &DEMANDS));
    if demand.is_some() && ca_file.is_none() && r.sound(&["", CLIENT_CA_FILE]) {
        let fix = "name the roots that vouch for clients in tls.client_ca_file, or remove this";
        r.problem(CLIENT_CERTIFICATES, "nobody vouches for clients", fix);
    }
    let (cert_file, key_file) = match (cert_file, key_file) {
        (Some(cert_file), Some(key_file)) => (cert_file, key_file),
        (cert_file, key_file) => {
            // What is named is looked at all the same.
            let chain = cert_file.and_then(|file| chain(&file, SystemTime::now()).err());
            let key = key_file.and_then(|file| private_key(&file).err());
            let roots = ca_file.and_then(|file| roots(&file).err());
            for (field, wrong) in faults(chain, key, roots) {
                r.refuse(field, wrong);
            }
            return None;
        }
    };
    let tls = Tls {
        cert_file,
        key_file,
        clients: ca_file.map(|ca_file| ClientCertificates {
            ca_file,
            demand: demand.unwrap_or(Demand::Required),
        }),
    };
    for (field, wrong) in tls.identity(SystemTime::now()).err().into_iter().flatten() {
        r.refuse(field, wrong);
    }
    Some(tls)
}

fn required(r: &mut Reader<'_>, name: &'static str, example: &str) -> Option<PathBuf> {
    let file = r.nullable(name, |value| renewed(value, example));
    if file.is_none() && r.sound(&["", name]) {
        r.problem(name, "is missing", format!("name a PEM file, e.g. {example:?}"));
    }
    file
}

/// A file that is looked at again and again.
fn renewed(value: &Value, example: &str) -> Result<PathBuf, Wrong> {
    let path = path(value, example)?;
    if !secret::may_be_read_anew(&path) {
        return wrong("is no regular file, and could not be read anew", "name a regular file");
    }
    Ok(path)
}

fn path(value: &Value, example: &str) -> Result<PathBuf, Wrong> {
    values::text(value, example).map(PathBuf::from)
}

/// Reads the extra roots in the file `ca_file`.
pub(super) fn ca_file(r: &mut Reader<'_>) -> Option<CaFile> {
    let running = r.running;
    r.nullable("ca_file", |value| {
        let path = path(value, "/etc/ssl/extra.pem")?;
        if let Some(running) = secret::keeps(running, &path) {
            return secret::kept(running.ca_files().find(|file| file.path == path));
        }
        let anchors = roots(&path)?.roots.into();
        Ok(CaFile { path, anchors })
    })
}

/// The certificates of a PEM file, at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, Wrong> {
    let pem = secret::read_file(file)?;
    match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => wrong("has no certificate in it", "name a PEM file with BEGIN CERTIFICATE"),
        Err(_) => damaged(),
    }
}

fn damaged<T>() -> Result<T, Wrong> {
    wrong("is damaged", "name a PEM file with whole certificates")
}

/// The server's certificates, all valid, and when the first of them expires.
fn chain(file: &Path, now: SystemTime) -> Result<(Vec<CertificateDer<'static>>, SystemTime), Wrong> {
    let chain = certificates(file)?;
    let (mut begins, mut expires) = (UNIX_EPOCH, None::<SystemTime>);
    for certificate in &chain {
        let Ok(certificate) = CertificateInner::<Raw>::from_der(certificate) else {
            return damaged();
        };
        let validity = certificate.tbs_certificate().validity();
        begins = begins.max(UNIX_EPOCH + validity.not_before.to_unix_duration());
        let end = UNIX_EPOCH + validity.not_after.to_unix_duration();
        expires = Some(expires.map_or(end, |first| first.min(end)));
    }
    match expires {
        Some(_) if begins > now + CLOCKS_APART => {
            let what = format!("is valid only from {} on", humantime::format_rfc3339_seconds(begins));
            wrong(what, "put it in place then, or set this machine's clock right")
        }
        Some(end) if end > now => Ok((chain, end)),
        Some(end) => {
            let what = format!("expired on {}", humantime::format_rfc3339_seconds(end));
            wrong(what, "renew it, and put the new certificate and its key in place")
        }
        None => damaged(),
    }
}

fn private_key(file: &Path) -> Result<Arc<dyn SigningKey>, Wrong> {
    const KINDS: &str = "name a PEM file with an RSA (2048 bits or more), ECDSA (P-256, P-384) or Ed25519 key";
    let pem = Zeroizing::new(secret::read_file(file)?);
    let Ok(mut key) = PrivateKeyDer::from_pem_slice(&pem) else {
        let fix = "name a PEM file with BEGIN PRIVATE KEY, not encrypted";
        return wrong("has no private key in it that can be read", fix);
    };
    let signing = any_supported_type(&key).or_else(|_| wrong("is no key of a kind that is known here", KINDS));
    secrecy::zeroize::Zeroize::zeroize(&mut key);
    signing
}

fn roots(file: &Path) -> Result<RootCertStore, Wrong> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        if roots.add(certificate).is_err() {
            return wrong(
                "has a certificate that cannot vouch for others",
                "name the roots' own certificates",
            );
        }
    }
    Ok(roots)
}

fn paired(
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
) -> Result<Arc<CertifiedKey>, (&'static str, Wrong)> {
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(Arc::new(certified)),
        Err(Error::InconsistentKeys(_)) => {
            let wrong = Wrong {
                what: "is not the key of the first certificate in tls.cert_file".into(),
                fix: "name the two that belong together, the server's own certificate before its intermediates".into(),
            };
            Err((KEY_FILE, wrong))
        }
        Err(error) => {
            let wrong = Wrong {
                what: format!("cannot be served ({error})"),
                fix: "name an X.509 certificate of version 3".into(),
            };
            Err((CERT_FILE, wrong))
        }
    }
}
