//! HTTP/1.1 as far as the service needs it (RFC 9112): heads of requests in, whole answers out.

use super::MAX_REQUEST;

/// The head of a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Request {
    pub(super) method: String,
    /// Without the query; begins with a slash.
    pub(super) path: String,
    /// The connection stays open after the answer.
    pub(super) keep_alive: bool,
    /// Bytes of body.
    pub(super) body: u64,
    /// `Accept` names JSON.
    pub(super) accepts_json: bool,
    pub(super) forwarded_for: bool,
    pub(super) token: Option<String>,
    /// Name as it is answered, and value.
    pub(super) token_ttl: Option<(&'static str, String)>,
}

/// Names of the headers of tokens; EC2's first clients know only theirs.
pub(super) const TOKEN: &str = "X-metadata-token";
const TOKEN_EC2: &str = "X-aws-ec2-metadata-token";
pub(super) const TOKEN_TTL: &str = "X-metadata-token-ttl-seconds";
const TOKEN_TTL_EC2: &str = "X-aws-ec2-metadata-token-ttl-seconds";

/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// Why a request cannot be answered as it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Status,
    pub(super) reason: &'static str,
}

const fn refuse(status: Status, reason: &'static str) -> Refusal {
    Refusal { status, reason }
}

const MALFORMED: Refusal = refuse(Status::BadRequest, "Malformed request.");

/// Statuses that are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    BadRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    HeadTooLarge,
    NotImplemented,
    InternalError,
    VersionNotSupported,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::Unauthorized => "401 Unauthorized",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeadTooLarge => "431 Request Header Fields Too Large",
            Self::InternalError => "500 Internal Server Error",
            Self::NotImplemented => "501 Not Implemented",
            Self::VersionNotSupported => "505 HTTP Version Not Supported",
        }
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: Status,
    pub(super) json: bool,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: String,
}

impl Answer {
    /// Plain text.
    pub(super) fn text(status: Status, body: impl Into<String>) -> Self {
        Self { status, json: false, headers: Vec::new(), body: body.into() }
    }

    /// The answer as it is sent; without its body to those who asked for the head only.
    pub(super) fn bytes(&self, keep_alive: bool, head_only: bool) -> Vec<u8> {
        let kind = if self.json { "application/json" } else { "text/plain" };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {}\r\nServer: MMDS\r\nConnection: {connection}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n",
            self.status.line(),
            self.body.len()
        );
        for (name, value) in &self.headers {
            head.extend([name, ": ", value, "\r\n"]);
        }
        head.push_str("\r\n");
        if !head_only {
            head.push_str(&self.body);
        }
        head.into_bytes()
    }
}

/// Takes what comes on a connection apart.
#[derive(Debug, Default)]
pub(super) struct Parser {
    head: Vec<u8>,
    /// Bytes of `head` in which its end is not.
    scanned: usize,
    /// Bytes of a body that are still to be thrown away.
    skip: u64,
}

impl Parser {
    /// Bytes that are wanted at most now.
    pub(super) fn wants(&self) -> usize {
        MAX_REQUEST.saturating_sub(self.head.len()).max(1)
    }

    /// Takes bytes that came, not more than [`wants`](Self::wants).
    pub(super) fn push(&mut self, data: &[u8]) {
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(data.len());
        self.skip -= skipped as u64;
        self.head.extend_from_slice(data.get(skipped..).unwrap_or_default());
    }

    /// The next request, if its head has come. After a refusal the connection is of no use.
    pub(super) fn next(&mut self) -> Option<Result<Request, Refusal>> {
        if self.skip > 0 {
            return None;
        }
        // Empty lines before a request mean nothing (RFC 9112, section 2.2).
        let blank = self.head.iter().take_while(|c| matches!(c, b'\r' | b'\n')).count();
        if blank > 0 {
            self.head.drain(..blank);
            self.scanned = 0;
        }
        let from = self.scanned.saturating_sub(3);
        let tail = self.head.get(from..).unwrap_or_default();
        let Some(end) = tail.windows(4).position(|end| end == b"\r\n\r\n") else {
            self.scanned = self.head.len();
            let full = self.head.len() >= MAX_REQUEST;
            return full.then_some(Err(refuse(Status::HeadTooLarge, "The request is too large.")));
        };
        let end = from + end;
        let request = parse(self.head.get(..end).unwrap_or_default());
        self.head.drain(..end + 4);
        self.scanned = 0;
        if let Ok(request) = &request {
            let here = usize::try_from(request.body).unwrap_or(usize::MAX).min(self.head.len());
            self.head.drain(..here);
            self.skip = request.body - here as u64;
        }
        Some(request)
    }
}

fn parse(head: &[u8]) -> Result<Request, Refusal> {
    let head = str::from_utf8(head).map_err(|_| MALFORMED)?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(MALFORMED);
    };
    if method.is_empty() || !method.bytes().all(|c| c.is_ascii_uppercase()) {
        return Err(MALFORMED);
    }
    let keep_alive = match version {
        "HTTP/1.1" => true,
        "HTTP/1.0" => false,
        _ if version.starts_with("HTTP/") => {
            return Err(refuse(Status::VersionNotSupported, "Use HTTP/1.1."));
        }
        _ => return Err(MALFORMED),
    };
    let path = path_of(target).ok_or(refuse(Status::BadRequest, "Invalid URI."))?;
    let mut request = Request { method: method.into(), path, keep_alive, ..Request::default() };
    let mut body = None;
    for (index, line) in lines.enumerate() {
        let (name, value) = line.split_once(':').ok_or(MALFORMED)?;
        let token = |c: u8| c.is_ascii_graphic() && !matches!(c, b'(' | b')' | b',' | b'/' | b';' | b'"');
        if index >= MAX_HEADERS || name.is_empty() || !name.bytes().all(token) {
            return Err(MALFORMED);
        }
        request.header(name, value.trim_matches([' ', '\t']), &mut body)?;
    }
    request.body = body.unwrap_or(0);
    Ok(request)
}

impl Request {
    fn header(&mut self, name: &str, value: &str, body: &mut Option<u64>) -> Result<(), Refusal> {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        if value.bytes().any(|c| c.is_ascii_control() && c != b'\t') {
            return Err(MALFORMED);
        }
        if is("Content-Length") {
            // Digits only, and once: whoever is in between may read it in another way.
            let digits = !value.is_empty() && value.bytes().all(|c| c.is_ascii_digit());
            let len = value.parse().ok().filter(|_| digits && body.is_none()).ok_or(MALFORMED)?;
            *body = Some(len);
        } else if is("Transfer-Encoding") {
            return Err(refuse(Status::NotImplemented, "Transfer codings are not supported."));
        } else if is("Connection") {
            for option in value.split(',').map(str::trim) {
                if option.eq_ignore_ascii_case("close") {
                    self.keep_alive = false;
                } else if option.eq_ignore_ascii_case("keep-alive") {
                    self.keep_alive = true;
                }
            }
        } else if is("Accept") {
            let kinds = value.split(',').map(|kind| kind.split(';').next().unwrap_or_default().trim());
            self.accepts_json |= { kinds }.any(|kind| kind.eq_ignore_ascii_case("application/json"));
        } else if is("X-Forwarded-For") {
            self.forwarded_for = true;
        } else if is(TOKEN) || is(TOKEN_EC2) {
            self.token = Some(value.into());
        } else if is(TOKEN_TTL) {
            self.token_ttl = Some((TOKEN_TTL, value.into()));
        } else if is(TOKEN_TTL_EC2) {
            self.token_ttl = Some((TOKEN_TTL_EC2, value.into()));
        }
        Ok(())
    }
}

/// The path in a request's target: without scheme, host and query, each run of slashes as one, none at the end.
fn path_of(target: &str) -> Option<String> {
    let path = match target.split_once("://") {
        Some(("http", rest)) => rest.find('/').map_or("/", |at| rest.split_at(at).1),
        _ => target,
    };
    let path = path.split(['?', '#']).next()?;
    path.starts_with('/').then_some(())?;
    let mut made = String::with_capacity(path.len());
    for part in path.split('/').filter(|part| !part.is_empty()) {
        made.push('/');
        made.push_str(part);
    }
    Some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Result<Request, Refusal> {
        let mut parser = Parser::default();
        parser.push(text.as_bytes());
        parser.next().expect("a whole request")
    }

    #[test]
    fn a_request_is_read_whatever_pieces_it_comes_in() {
        let text = "PUT /latest/api/token?x HTTP/1.1\r\nHost: a\r\nx-METADATA-token-TTL-seconds: \t60 \r\n\
                    Content-Length: 3\r\naccept: text/plain, Application/JSON;q=0.5\r\n\r\nabcGET //a/ HTTP/1.0\r\n\r\n";
        for size in 1..=text.len() {
            let (mut parser, mut got) = (Parser::default(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                parser.push(piece);
                while let Some(request) = parser.next() {
                    got.push(request.unwrap());
                }
            }
            let [put, get] = &got[..] else { panic!("{got:?}") };
            assert_eq!((put.method.as_str(), put.path.as_str()), ("PUT", "/latest/api/token"));
            assert_eq!(put.token_ttl, Some((TOKEN_TTL, "60".into())));
            assert!(put.keep_alive && put.accepts_json && !put.forwarded_for && put.body == 3);
            assert_eq!((get.method.as_str(), get.path.as_str(), get.keep_alive), ("GET", "/a", false));
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (text, status) in [
            ("GET /\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1 x\r\n\r\n", Status::BadRequest),
            ("get / HTTP/1.1\r\n\r\n", Status::BadRequest),
            ("GET a HTTP/1.1\r\n\r\n", Status::BadRequest),
            ("GET * HTTP/1.1\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/2.0\r\n\r\n", Status::VersionNotSupported),
            ("GET / FTP/1.1\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nno colon\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\n: x\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\na b: x\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\na: \0\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", Status::NotImplemented),
        ] {
            assert_eq!(one(text).unwrap_err().status, status, "{text:?}");
        }
        let mut parser = Parser::default();
        parser.push(b"GET /\xFF HTTP/1.1\r\n\r\n");
        assert_eq!(parser.next(), Some(Err(MALFORMED)));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(one(&many).unwrap_err(), MALFORMED);
    }

    #[test]
    fn a_head_that_never_ends_is_refused_when_it_is_too_large() {
        let mut parser = Parser::default();
        while parser.wants() > 1 {
            assert_eq!(parser.next(), None);
            parser.push(&[b'x'; 512][..parser.wants().min(512)]);
        }
        assert_eq!(parser.next().unwrap().unwrap_err().status, Status::HeadTooLarge);
        assert!(parser.head.len() <= MAX_REQUEST);
    }

    #[test]
    fn the_path_is_found_in_all_forms_of_a_target() {
        for (target, path) in [
            ("/", Some("")),
            ("/a/b", Some("/a/b")),
            ("//a///b//", Some("/a/b")),
            ("/a?b/c", Some("/a")),
            ("http://169.254.169.254/a", Some("/a")),
            ("http://169.254.169.254", Some("")),
            ("a", None),
            ("", None),
            ("*", None),
            ("ftp://x/y", None),
        ] {
            assert_eq!(path_of(target).as_deref(), path, "{target}");
        }
    }
}
