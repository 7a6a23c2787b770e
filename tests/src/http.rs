//! As much of HTTP/1.1 as a registry needs, on blocking sockets. Both ends are tests: malformed input
//! panics.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// A request, as a server gets it.
#[derive(Debug, Clone)]
pub struct Request {
    /// "GET".
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// What follows "?", empty if nothing.
    pub query: String,
    /// Names in lower case.
    headers: Vec<(String, String)>,
}

impl Request {
    /// Reads the next request of a connection; `None` when the client has closed it.
    pub fn read(stream: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split_whitespace();
        let (Some(method), Some(target)) = (words.next(), words.next()) else {
            panic!("not a request: {line:?}");
        };
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let headers = read_headers(stream)?;
        let request = Self {
            method: method.into(),
            path: path.into(),
            query: query.into(),
            headers,
        };
        // A body is nothing that the tests look at.
        let length = request.header("content-length").unwrap_or("0");
        let length = length.parse().expect("a length is a number");
        io::copy(&mut stream.take(length), &mut io::sink())?;
        Ok(Some(request))
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }
}

/// A response, as a client gets it.
#[derive(Debug)]
pub struct Response {
    /// 200.
    pub status: u16,
    headers: Vec<(String, String)>,
    /// All of it.
    pub body: Vec<u8>,
}

impl Response {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }
}

/// Sends one request to "HOST:PORT" and reads the answer. `target`: path and query.
pub fn request(
    host: &str,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Response> {
    let mut stream = TcpStream::connect(host)?;
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;

    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| io::Error::other(format!("not a response: {line:?}")))?;
    let headers = read_headers(&mut stream)?;
    let mut body = Vec::new();
    stream.read_to_end(&mut body)?;
    if find(&headers, "transfer-encoding") == Some("chunked") {
        body = unchunked(&body);
    }
    Ok(Response {
        status,
        headers,
        body,
    })
}

/// Value of an Authorization header, RFC 7617.
pub fn basic(user: &str, password: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("Basic ");
    for bytes in format!("{user}:{password}").as_bytes().chunks(3) {
        let mut group = [0; 4];
        group[1..=bytes.len()].copy_from_slice(bytes);
        let bits = u32::from_be_bytes(group);
        for digit in 0..4 {
            text.push(if digit <= bytes.len() {
                char::from(DIGITS[(bits >> (18 - 6 * digit)) as usize & 63])
            } else {
                '='
            });
        }
    }
    text
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    loop {
        let mut line = String::new();
        body.read_line(&mut line).expect("memory can be read");
        let length = usize::from_str_radix(line.trim(), 16).expect("a chunk's length");
        if length == 0 {
            return whole;
        }
        whole.extend_from_slice(&body[..length]);
        body = &body[length + 2..];
    }
}

fn read_headers(stream: &mut impl BufRead) -> io::Result<Vec<(String, String)>> {
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(':') else {
            return Ok(headers);
        };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let header = headers.iter().find(|(key, _)| key == name)?;
    Some(&header.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_authorization() {
        // The example of RFC 7617, and the other two lengths of padding.
        assert_eq!(
            basic("Aladdin", "open sesame"),
            "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
        );
        assert_eq!(basic("a", "b"), "Basic YTpi");
        assert_eq!(basic("ab", "cd"), "Basic YWI6Y2Q=");
    }
}
