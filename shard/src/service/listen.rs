//! Where a shard listens.

use std::{fmt, path::PathBuf, str::FromStr};

use thiserror::Error;

/// A Unix socket or a TCP address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// `unix:/path`. The socket is as private as its folder.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`.
    Tcp(String),
}

/// An address of neither kind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is neither unix:/path nor tcp:HOST:PORT")]
pub struct InvalidAddress(String);

impl FromStr for ListenAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) if address.rsplit_once(':').is_some_and(|(host, _)| !host.is_empty()) => {
                Ok(Self::Tcp(address.to_owned()))
            }
            _ => Err(InvalidAddress(text.to_owned())),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_written() {
        for text in ["unix:/run/lockstep/0.sock", "tcp:127.0.0.1:7000", "tcp:[::1]:0"] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        for text in ["unix:", "/run/0.sock", "tcp:7000", "http://x", ""] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }
}
