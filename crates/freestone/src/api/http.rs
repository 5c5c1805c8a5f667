//! HTTP/1.1 as far as an API of small bodies needs it: from bytes to requests, and from answers to bytes. No sockets here.

use std::fmt::Write as _;

/// Bytes of a request before its body.
pub(crate) const MAX_HEAD: usize = 8 << 10;
/// Fields of a request's head.
const MAX_FIELDS: usize = 64;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    NoContent,
    BadRequest,
    PayloadTooLarge,
    Internal,
    Unavailable,
}

impl Status {
    /// The number and its name.
    pub(crate) fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::NoContent => "204 No Content",
            Self::BadRequest => "400 Bad Request",
            Self::PayloadTooLarge => "413 Payload Too Large",
            Self::Internal => "500 Internal Server Error",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

/// What a client wants done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Put,
    Patch,
    Post,
    Delete,
}

impl Method {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Post => "POST",
            Self::Delete => "DELETE",
        }
    }
}

/// A request as far as its body begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) method: Method,
    /// Without what follows a question mark.
    pub(crate) path: String,
    /// Whether the client goes on after the answer.
    pub(crate) keep_alive: bool,
    /// Whether it waits to be told to send the body.
    pub(crate) wants_continue: bool,
    /// Whether it wants server-sent events.
    pub(crate) event_stream: bool,
    /// Bytes of the head.
    pub(crate) head: usize,
    /// Bytes of the body.
    pub(crate) body: usize,
}

/// What makes the connection useless: it is answered and closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: Status,
    pub(crate) message: String,
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal { status: Status::BadRequest, message: message.into() }
}

/// Reads a head from the beginning of `bytes`, if all of it is there. A body may have `max_body` bytes.
pub(crate) fn parse_head(bytes: &[u8], max_body: usize) -> Result<Option<Head>, Refusal> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let too_long = || bad(format!("The head of the request has more than {MAX_HEAD} bytes."));
    let known = bytes.get(..bytes.len().min(MAX_HEAD)).unwrap_or(bytes);
    let head = match request.parse(known) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) if known.len() == MAX_HEAD => return Err(too_long()),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(bad(format!("The head of the request has more than {MAX_FIELDS} fields.")));
        }
        Err(error) => return Err(bad(format!("This is not a request of HTTP/1.1: {error}"))),
    };
    let method = match request.method.unwrap_or_default() {
        "GET" => Method::Get,
        "PUT" => Method::Put,
        "PATCH" => Method::Patch,
        "POST" => Method::Post,
        "DELETE" => Method::Delete,
        other => return Err(bad(format!("Invalid HTTP method: {other}."))),
    };
    let mut parsed = Head {
        method,
        path: path(request.path.unwrap_or_default())?.to_owned(),
        keep_alive: request.version == Some(1),
        wants_continue: false,
        event_stream: false,
        head,
        body: 0,
    };
    let mut length = None;
    for field in request.headers.iter() {
        take_field(&mut parsed, &mut length, field)?;
    }
    parsed.body = length.unwrap_or(0);
    if parsed.body > max_body {
        let message = format!("The body of {} bytes is larger than the limit of {max_body}.", parsed.body);
        return Err(Refusal { status: Status::PayloadTooLarge, message });
    }
    Ok(Some(parsed))
}

/// The path of a target, which may be a whole address.
fn path(target: &str) -> Result<&str, Refusal> {
    let target = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => target,
    };
    if !target.starts_with('/') {
        return Err(bad(format!("The target {target:?} is not a path.")));
    }
    Ok(target.split_once('?').map_or(target, |(path, _)| path))
}

fn take_field(
    head: &mut Head,
    length: &mut Option<usize>,
    field: &httparse::Header<'_>,
) -> Result<(), Refusal> {
    let value = || {
        let wrong = || bad(format!("The value of {} is not text.", field.name));
        std::str::from_utf8(field.value).map(str::trim).map_err(|_| wrong())
    };
    let has =
        |word: &str| value().map(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word)));
    if field.name.eq_ignore_ascii_case("content-length") {
        let text = value()?;
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let wrong = || bad(format!("Content-Length {text:?} is not a number."));
        let told = if digits { text.parse().ok() } else { None }.ok_or_else(wrong)?;
        if length.is_some_and(|before| before != told) {
            return Err(bad("Content-Length is given twice."));
        }
        *length = Some(told);
    } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
        return Err(bad("Transfer-Encoding is not supported: send the body with Content-Length."));
    } else if field.name.eq_ignore_ascii_case("connection") {
        if has("close")? {
            head.keep_alive = false;
        } else if has("keep-alive")? {
            head.keep_alive = true;
        }
    } else if field.name.eq_ignore_ascii_case("expect") {
        if !has("100-continue")? {
            return Err(bad(format!("Expect {:?} cannot be met.", value()?)));
        }
        head.wants_continue = true;
    } else if field.name.eq_ignore_ascii_case("accept") {
        head.event_stream |= has("text/event-stream")?;
    }
    Ok(())
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: Status,
    /// JSON, or nothing.
    pub(crate) body: String,
    /// Whether the request said something that will mean nothing one day.
    pub(crate) deprecated: bool,
}

impl Response {
    /// The bytes that are sent.
    pub(crate) fn encode(&self, keep_alive: bool, out: &mut Vec<u8>) {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {}\r\nServer: Freestone API\r\nConnection: {connection}\r\n",
            self.status.line()
        );
        if self.deprecated {
            head.push_str("Deprecation: true\r\n");
        }
        // An answer without content has no length either (RFC 9110, 8.6).
        if self.status != Status::NoContent {
            let length = self.body.len();
            // Writing to a string does not fail.
            let _ = write!(head, "Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        head.push_str("\r\n");
        out.extend_from_slice(head.as_bytes());
        if self.status != Status::NoContent {
            out.extend_from_slice(self.body.as_bytes());
        }
    }
}

/// Tells a client to send the body.
pub(crate) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The head of an answer that never ends by itself.
pub(crate) fn stream_head(event_stream: bool) -> String {
    let kind = if event_stream { "text/event-stream" } else { "application/x-ndjson" };
    format!(
        "HTTP/1.1 200 OK\r\nServer: Freestone API\r\nContent-Type: {kind}\r\nCache-Control: no-store\r\n\
         Transfer-Encoding: chunked\r\n\r\n"
    )
}

/// One piece of such an answer.
pub(crate) fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(text: &str) -> Result<Option<Head>, Refusal> {
        parse_head(text.as_bytes(), 100)
    }

    fn refused(text: &str, part: &str) {
        let refusal = head(text).unwrap_err();
        assert_eq!(refusal.status, Status::BadRequest, "{text:?}");
        assert!(refusal.message.contains(part), "{text:?}: {}", refusal.message);
    }

    #[test]
    fn a_request_is_method_path_and_length() {
        let text = "PUT /drives/root?x=1 HTTP/1.1\r\nHost: localhost\r\ncontent-LENGTH: 12\r\n\r\n";
        let parsed = head(text).unwrap().unwrap();
        assert_eq!((parsed.method, parsed.path.as_str(), parsed.body), (Method::Put, "/drives/root", 12));
        assert_eq!(parsed.head, text.len());
        assert!(parsed.keep_alive && !parsed.wants_continue);
    }

    #[test]
    fn every_beginning_of_a_request_waits_for_more() {
        let text = "GET / HTTP/1.1\r\nAccept: */*\r\n\r\n";
        for n in 0..text.len() {
            assert_eq!(head(&text[..n]), Ok(None), "{n}");
        }
    }

    #[test]
    fn a_whole_address_is_as_good_as_a_path() {
        let parsed = head("GET http://localhost/version HTTP/1.1\r\n\r\n").unwrap().unwrap();
        assert_eq!(parsed.path, "/version");
        assert_eq!(head("GET http://localhost HTTP/1.1\r\n\r\n").unwrap().unwrap().path, "/");
        refused("GET version HTTP/1.1\r\n\r\n", "not a path");
    }

    #[test]
    fn a_client_says_whether_it_goes_on() {
        let keeps = |text: &str| head(text).unwrap().unwrap().keep_alive;
        assert!(keeps("GET / HTTP/1.1\r\n\r\n"));
        assert!(!keeps("GET / HTTP/1.1\r\nConnection: foo, Close\r\n\r\n"));
        assert!(!keeps("GET / HTTP/1.0\r\n\r\n"));
        assert!(keeps("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"));
    }

    #[test]
    fn lengths_that_two_readers_could_read_differently_are_refused() {
        refused("PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "twice");
        for wrong in ["-1", "+1", "0x1", "1 2", "", "99999999999999999999999"] {
            refused(&format!("PUT / HTTP/1.1\r\nContent-Length: {wrong}\r\n\r\n"), "not a number");
        }
        refused("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "Content-Length");
    }

    #[test]
    fn too_much_is_refused_as_soon_as_it_is_known() {
        let refusal = head("PUT / HTTP/1.1\r\nContent-Length: 101\r\n\r\n").unwrap_err();
        assert_eq!(refusal.status, Status::PayloadTooLarge);
        refused(&"\r\n".repeat(MAX_HEAD), "8192 bytes");
        refused(&format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_HEAD)), "8192 bytes");
        refused(&format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65)), "64 fields");
    }

    #[test]
    fn what_is_not_http_is_refused() {
        refused("\x16\x03\x01\x02\x00", "not a request");
        refused("GET / HTTP/2.0\r\n\r\n", "not a request");
        refused("BREW / HTTP/1.1\r\n\r\n", "BREW");
        refused("PUT / HTTP/1.1\r\nExpect: wonders\r\n\r\n", "wonders");
        assert!(parse_head(b"GET /\xff\xfe HTTP/1.1\r\n\r\n", 1).is_err());
        assert!(parse_head(b"GET / HTTP/1.1\r\nConnection: \xff\r\n\r\n", 1).is_err());
    }

    #[test]
    fn an_answer_without_content_has_no_length() {
        let mut out = Vec::new();
        Response { status: Status::NoContent, body: String::new(), deprecated: true }.encode(true, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("HTTP/1.1 204 No Content\r\n") && text.ends_with("\r\n\r\n"), "{text}");
        assert!(text.contains("Deprecation: true") && !text.contains("Content-Length"), "{text}");
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_wild_for_the_parser(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            drop(parse_head(&bytes, 51200));
        }

        #[test]
        fn no_fields_are_too_wild_for_the_parser(
            method in "(GET|PUT|[A-Z!~]{0,9})",
            target in "\\PC{0,40}",
            fields in prop::collection::vec(("(?i)(content-length|expect|connection|accept|[a-z-]{1,9})", "\\PC{0,30}"), 0..70),
            cut in 0_usize..4000,
        ) {
            let mut text = format!("{method} {target} HTTP/1.1\r\n");
            for (name, value) in &fields {
                text.push_str(&format!("{name}: {value}\r\n"));
            }
            text.push_str("\r\n");
            let bytes = text.as_bytes();
            let bytes = &bytes[..cut.min(bytes.len())];
            if let Ok(Some(head)) = parse_head(bytes, 51200) {
                prop_assert!(head.head <= bytes.len() && head.body <= 51200);
                prop_assert!(head.path.starts_with('/'));
            }
        }
    }
}
