//! Which protocol a connection becomes, by the headers of its request.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};

use crate::remote_command::Version;
use crate::server::text;
use crate::websocket::accept_key;

/// Protocols inside SPDY or WebSocket, best first.
const COMMAND_PROTOCOLS: &[(&str, Version)] = &[
    ("v5.channel.k8s.io", Version::V5),
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];
const PORT_FORWARD: &str = "portforward.k8s.io";
const PORT_FORWARD_TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const PORT_FORWARD_CHANNELS: &str = "v4.channel.k8s.io";

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");

/// Why there is none.
#[derive(Debug)]
pub enum Refusal {
    /// Not what upgrades a connection.
    BadRequest(&'static str),
    /// Nothing in common; what we have instead.
    NoProtocol(Vec<&'static str>),
}

impl From<Refusal> for Response<String> {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::BadRequest(reason) => text(StatusCode::BAD_REQUEST, reason),
            Refusal::NoProtocol(ours) => {
                let mut refusal = text(StatusCode::FORBIDDEN, "no protocol in common");
                for name in ours {
                    let name = HeaderValue::from_static(name);
                    refusal.headers_mut().append(ACCEPTED_PROTOCOLS, name);
                }
                refusal
            }
        }
    }
}

/// What a connection becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The client's streams in SPDY.
    Spdy(Version),
    /// WebSocket, streams by number.
    Channels(Version),
    /// SPDY inside WebSocket.
    Tunnel,
}

/// The protocol and the answer that begins it. `is_command`: exec or attach.
///
/// # Errors
/// See [`Refusal`].
pub fn negotiate(
    headers: &HeaderMap,
    is_command: bool,
) -> Result<(Protocol, Response<String>), Refusal> {
    let bad = Refusal::BadRequest;
    if !values(headers, &header::CONNECTION).any(|value| value.eq_ignore_ascii_case("upgrade")) {
        return Err(bad("the request has to upgrade the connection"));
    }
    let upgrade = values(headers, &header::UPGRADE).next().unwrap_or_default();
    if upgrade.eq_ignore_ascii_case("SPDY/3.1") {
        let (name, version) = spdy_protocol(headers, is_command)?;
        let mut response = switching("SPDY/3.1");
        response
            .headers_mut()
            .insert(STREAM_PROTOCOL, HeaderValue::from_static(name));
        return Ok((Protocol::Spdy(version), response));
    }
    if !upgrade.eq_ignore_ascii_case("websocket") {
        return Err(bad("the request has to upgrade to SPDY/3.1 or websocket"));
    }
    if headers
        .get(header::SEC_WEBSOCKET_VERSION)
        .map(HeaderValue::as_bytes)
        != Some(b"13")
    {
        return Err(bad("the version of WebSocket has to be 13"));
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let key = key.ok_or_else(|| bad("Sec-WebSocket-Key is missing"))?;
    let (name, protocol) = websocket_protocol(headers, is_command)?;
    let mut response = switching("websocket");
    let accept = HeaderValue::from_str(&accept_key(key.as_bytes()));
    // Base64 is always a header's value.
    let accept = accept.map_err(|_| bad("Sec-WebSocket-Key"))?;
    response
        .headers_mut()
        .insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if !name.is_empty() {
        let name = HeaderValue::from_static(name);
        response
            .headers_mut()
            .insert(header::SEC_WEBSOCKET_PROTOCOL, name);
    }
    Ok((protocol, response))
}

/// The first of the client's that we have; version 5 is WebSocket's alone.
fn spdy_protocol(
    headers: &HeaderMap,
    is_command: bool,
) -> Result<(&'static str, Version), Refusal> {
    let ours: &[(&str, Version)] = if is_command {
        &COMMAND_PROTOCOLS[1..]
    } else {
        &[(PORT_FORWARD, Version::V4)]
    };
    let mut offered = values(headers, &STREAM_PROTOCOL).peekable();
    if offered.peek().is_none() {
        return Err(Refusal::BadRequest("X-Stream-Protocol-Version is missing"));
    }
    let found = offered.find_map(|name| ours.iter().find(|our| our.0 == name));
    found
        .copied()
        .ok_or_else(|| Refusal::NoProtocol(ours.iter().map(|our| our.0).collect()))
}

fn websocket_protocol(
    headers: &HeaderMap,
    is_command: bool,
) -> Result<(&'static str, Protocol), Refusal> {
    let ours: Vec<(&'static str, Protocol)> = if is_command {
        // Versions 2 and 3 are SPDY's alone.
        COMMAND_PROTOCOLS
            .iter()
            .filter(|(_, version)| !matches!(version, Version::V2 | Version::V3))
            .map(|(name, version)| (*name, Protocol::Channels(*version)))
            .collect()
    } else {
        vec![
            (PORT_FORWARD_TUNNEL, Protocol::Tunnel),
            (PORT_FORWARD_CHANNELS, Protocol::Channels(Version::V4)),
        ]
    };
    let mut offered = values(headers, &header::SEC_WEBSOCKET_PROTOCOL).peekable();
    if offered.peek().is_none() {
        return Ok(("", Protocol::Channels(Version::V1)));
    }
    let found = offered.find_map(|name| ours.iter().find(|our| our.0 == name));
    found
        .copied()
        .ok_or_else(|| Refusal::NoProtocol(Vec::new()))
}

/// The values of a header that may be a list and come more than once.
fn values<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = &'a str> + use<'a> {
    let values = headers.get_all(name).into_iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

fn switching(protocol: &'static str) -> Response<String> {
    let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(protocol));
    response
}
