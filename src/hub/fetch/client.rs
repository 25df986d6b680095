//! Requests to a hub: token, redirects and timeouts.

use std::{
    io::{self, Read},
    time::{Duration, Instant},
};

use fluent_uri::{Uri as Base, UriRef};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::{
    Agent, Body, Timeout,
    http::{HeaderMap, HeaderValue, Response, StatusCode, Uri, header},
};

use super::{
    Error, Problem,
    answer::{Commit, Described, FileName, Listing, text},
    cache::variable,
};

/// Maximum number of redirects of a request.
const REDIRECTS: usize = 10;
/// Maximum bytes of a list of files.
const LISTING: u64 = 16 << 20;
/// Minimum number of bytes that must arrive in each period of the timeout.
const TRICKLE: u64 = 1 << 10;
/// The characters to escape in a part of a URL's path.
const PART: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A client of one hub.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    /// URL without a slash at its end.
    endpoint: String,
    /// The token, which is sent only to the endpoint's origin.
    token: Option<HeaderValue>,
    /// Timeout of requests about files.
    asking: Duration,
    /// Timeout between bytes of a file.
    fetching: Duration,
}

impl Client {
    /// A client with the environment's settings, and the cached token if the environment has none.
    pub(super) fn from_env(cached_token: Option<String>) -> Result<Self, Error> {
        let text = |name| variable(name).map(|value| value.to_string_lossy().trim().to_owned());
        let endpoint = text("HF_ENDPOINT").filter(|endpoint| !endpoint.is_empty());
        let endpoint = endpoint.as_deref().unwrap_or("https://huggingface.co");
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        origin(&endpoint).map_err(|problem| Error::Setting { name: "HF_ENDPOINT", problem })?;
        let token = text("HF_TOKEN").filter(|token| !token.is_empty());
        let token = token.or_else(|| Some(cached_token?.trim().to_owned()));
        let token = token.filter(|token| !token.is_empty()).map(|token| {
            let mut value = Some(token)
                .filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()))
                .and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok())
                .ok_or(Error::Setting {
                    name: "HF_TOKEN",
                    problem: "a token has no spaces, line breaks or other such characters".into(),
                })?;
            value.set_sensitive(true);
            Ok(value)
        });
        let seconds = |name| match text(name) {
            None => Ok(Duration::from_secs(10)),
            Some(text) => {
                let seconds = text.parse().ok().filter(|seconds| *seconds > 0.0);
                seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).ok_or_else(
                    || Error::Setting {
                        name,
                        problem: format!("must be a number of seconds > 0, got {text:?}"),
                    },
                )
            }
        };
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("barber/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .build()
            .new_agent();
        Ok(Self {
            agent,
            endpoint,
            token: token.transpose()?,
            asking: seconds("HF_HUB_ETAG_TIMEOUT")?,
            fetching: seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
        })
    }

    /// Timeout between bytes of a file.
    pub(super) fn fetching(&self) -> Duration {
        self.fetching
    }

    /// Requests the list of files of a model's repository.
    pub(super) fn listing(&self, model: &str, revision: &str) -> Result<Listing, Problem> {
        let revision = utf8_percent_encode(revision, &PART);
        let url = format!("{}/api/models/{model}/revision/{revision}", self.endpoint);
        let answer = self.get(&url, None, self.asking, |_| false)?;
        let mut body = Vec::new();
        let mut reader = Steady::new(answer.into_body().into_reader(), self.asking);
        let read = reader.by_ref().take(LISTING + 1).read_to_end(&mut body);
        read.map_err(|error| Problem::of_reading(&error, self.asking))?;
        if body.len() as u64 > LISTING {
            return Err(Problem::Answer(format!(
                "the hub's list of files is larger than {} MiB",
                LISTING >> 20
            )));
        }
        Listing::parse(&body).map_err(Problem::Answer)
    }

    fn url(&self, model: &str, commit: &Commit, file: &FileName) -> String {
        format!("{}/{model}/resolve/{}/{}", self.endpoint, commit.as_str(), file.as_str())
    }

    /// Requests the description of a file.
    pub(super) fn describe(
        &self,
        model: &str,
        commit: &Commit,
        file: &FileName,
    ) -> Result<Described, Problem> {
        let url = self.url(model, commit, file);
        let answer = self.get(&url, Some("bytes=0-0"), self.asking, Described::is_complete)?;
        Described::parse(answer.headers(), commit).map_err(Problem::Answer)
    }

    /// Requests a file's bytes from an offset; returns the headers and the body.
    pub(super) fn bytes(
        &self,
        model: &str,
        commit: &Commit,
        file: &FileName,
        from: u64,
    ) -> Result<(StatusCode, HeaderMap, impl Read + use<>), Problem> {
        let url = self.url(model, commit, file);
        let answer = self.get(&url, Some(&format!("bytes={from}-")), self.fetching, |_| false)?;
        let (head, body) = answer.into_parts();
        Ok((head.status, head.headers, Steady::new(body.into_reader(), self.fetching)))
    }

    /// Sends a request, and follows redirects until an answer is not a redirect or `enough` is
    /// true.
    fn get(
        &self,
        url: &str,
        range: Option<&str>,
        within: Duration,
        enough: impl Fn(&HeaderMap) -> bool,
    ) -> Result<Response<Body>, Problem> {
        let home = origin(&self.endpoint).map_err(Problem::Answer)?;
        let mut url = url.to_owned();
        let mut token = self.token.as_ref();
        for _ in 0..=REDIRECTS {
            let here = origin(&url).map_err(Problem::Answer)?;
            // The token is not sent again after a redirect to another origin.
            token = token.filter(|_| here == home);
            let mut request = self.agent.get(&url);
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            if let Some(token) = token {
                request = request.header(header::AUTHORIZATION, token);
            }
            let request = request.config();
            let request = request.timeout_resolve(Some(within)).timeout_connect(Some(within));
            let request = request.timeout_recv_response(Some(within));
            let request = request.timeout_per_read(Some(within)).build();
            let answer = request.call().map_err(|error| Problem::of_request(error, within))?;
            let status = answer.status();
            // An empty file has no first byte, so its range is not satisfiable.
            let empty = status == StatusCode::RANGE_NOT_SATISFIABLE;
            if status.is_success() || empty || status.is_redirection() && enough(answer.headers()) {
                return Ok(answer);
            }
            if !status.is_redirection() {
                return Err(Problem::Status(status.as_u16()));
            }
            url = target(&url, answer.headers(), status).map_err(Problem::Answer)?;
        }
        Err(Problem::Answer(format!("the hub redirects more than {REDIRECTS} times")))
    }
}

/// The URL that a redirect leads to.
fn target(from: &str, headers: &HeaderMap, status: StatusCode) -> Result<String, String> {
    let Some(location) = text(headers, "location") else {
        return Err(format!("the hub redirects (status {}) without a Location", status.as_u16()));
    };
    let wrong = || format!("the hub redirects to {location:?}, which is not a URL of HTTP");
    let base = Base::parse(from).map_err(|_| wrong())?;
    let url = UriRef::parse(location).map_err(|_| wrong())?;
    let url = url.resolve_against(&base).map_err(|_| wrong())?.into_string();
    let url = url.split_once('#').map_or(url.as_str(), |(url, _)| url);
    let (scheme, ..) = origin(url).map_err(|_| wrong())?;
    if from.starts_with("https:") && scheme != "https" {
        return Err(format!("the hub redirects to {location:?}, which is not encrypted"));
    }
    Ok(url.to_owned())
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> Result<(String, String, u16), String> {
    let parsed: Option<Uri> = url.parse().ok();
    parsed
        .as_ref()
        .and_then(|uri| {
            let authority = uri.authority()?.as_str();
            let scheme = uri.scheme_str()?.to_ascii_lowercase();
            let usual = match &*scheme {
                "http" => 80,
                "https" => 443,
                _ => return None,
            };
            let host = uri.host().filter(|host| !host.is_empty() && !authority.contains('@'))?;
            Some((scheme, host.to_ascii_lowercase(), uri.port_u16().unwrap_or(usual)))
        })
        .ok_or_else(|| "must be a URL such as https://huggingface.co, without a password".into())
}

/// A body that must keep arriving within the timeout.
struct Steady<R> {
    body: R,
    period: Duration,
    since: Instant,
    arrived: u64,
}

impl<R> Steady<R> {
    fn new(body: R, period: Duration) -> Self {
        Self { body, period, since: Instant::now(), arrived: 0 }
    }
}

impl<R: Read> Read for Steady<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read(buffer)?;
        self.arrived += read as u64;
        if read > 0 && self.since.elapsed() > self.period {
            if self.arrived < TRICKLE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            (self.since, self.arrived) = (Instant::now(), 0);
        }
        Ok(read)
    }
}

impl Problem {
    fn of_request(error: ureq::Error, within: Duration) -> Self {
        match error {
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                Self::Connection(format!("no connection within {} s", within.as_secs_f64()))
            }
            ureq::Error::Timeout(_) => Self::Stalled(within),
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
                Self::Stalled(within)
            }
            error => Self::Connection(error.to_string()),
        }
    }

    pub(super) fn of_reading(error: &io::Error, within: Duration) -> Self {
        let source = error.get_ref().and_then(|source| source.downcast_ref());
        let timeout = matches!(source, Some(ureq::Error::Timeout(_)));
        if timeout || error.kind() == io::ErrorKind::TimedOut {
            Self::Stalled(within)
        } else {
            Self::Connection(error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved() {
        let from = "https://hub/a/b?c";
        let to = |location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("location", HeaderValue::from_str(location).unwrap());
            target(from, &headers, StatusCode::FOUND)
        };
        for (location, expected) in [
            ("/x/y", "https://hub/x/y"),
            ("x", "https://hub/a/x"),
            ("../x", "https://hub/x"),
            ("?q=1", "https://hub/a/b?q=1"),
            ("//other:1/x", "https://other:1/x"),
            ("https://cdn/x#fragment", "https://cdn/x"),
        ] {
            assert_eq!(to(location).as_deref(), Ok(expected));
        }
        for wrong in [
            "file:///etc/passwd",
            "ftp://hub/x",
            "http://",
            "::::",
            "javascript:alert(1)",
            "http://[::1",
            "data:,x",
            "https://user@hub/x",
            "a b",
        ] {
            assert!(to(wrong).unwrap_err().contains("not a URL of HTTP"), "{wrong}");
        }
        assert!(to("http://hub/x").unwrap_err().contains("not encrypted"));
        let none = target(from, &HeaderMap::new(), StatusCode::FOUND).unwrap_err();
        assert!(none.contains("status 302") && none.contains("without a Location"), "{none}");
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let same = |one, other| origin(one).unwrap() == origin(other).unwrap();
        assert!(same("https://hub/a", "https://HUB:443/b"));
        for other in ["http://hub", "https://hub:444", "https://hub.evil", "https://evil"] {
            assert!(!same("https://hub/a", other), "{other}");
        }
        for wrong in ["", "hub", "ftp://hub", "https://user:secret@hub", "not a url", "https://"] {
            assert!(origin(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_trickle_is_a_stall() {
        struct Drip(usize);
        impl Read for Drip {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                std::thread::sleep(Duration::from_millis(2));
                let bytes = self.0.min(buffer.len());
                buffer[..bytes].fill(0);
                Ok(bytes)
            }
        }
        let read = |bytes| {
            let steady = Steady::new(Drip(bytes), Duration::from_millis(50));
            steady.take(1 << 20).read_to_end(&mut Vec::new())
        };
        assert_eq!(read(1).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(read(1 << 15).unwrap(), 1 << 20);
    }
}
