//! One client: its bytes in, its requests in order, its bytes out. Nothing here waits.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use serde_json::Value;

use super::fault::Fault;
use super::http::{self, CONTINUE, Head, Method, Refusal, Response};

/// Bytes that wait to be taken by a client before no more is asked of it, or told to it.
const HIGH: usize = 64 << 10;
/// Bytes read at a time.
const PIECE: usize = 16 << 10;

/// A request with its body.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
    pub(super) event_stream: bool,
}

/// What a client of events gets.
#[derive(Debug)]
struct Subscription {
    event_stream: bool,
    dropped: u64,
}

/// A client.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// Which of the connections that this place had.
    pub(super) age: u64,
    /// When it last did something, in turns of the server.
    pub(super) active: u64,
    /// What the server listens to.
    pub(super) interest: EventFlags,
    input: Vec<u8>,
    output: Vec<u8>,
    head: Option<Head>,
    /// Whether a request is being carried out; whether the connection goes on after it.
    in_flight: Option<bool>,
    /// The client sends no more.
    eof: bool,
    /// Nothing more is read: the rest of the output is all.
    closing: bool,
    events: Option<Subscription>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, age: u64) -> Self {
        Self {
            stream,
            age,
            active: 0,
            interest: EventFlags::empty(),
            input: Vec::new(),
            output: Vec::new(),
            head: None,
            in_flight: None,
            eof: false,
            closing: false,
            events: None,
        }
    }

    /// Whether it could go without anybody missing an answer.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.is_none() && self.events.is_none() && self.output.is_empty()
    }

    pub(super) fn is_subscribed(&self) -> bool {
        self.events.is_some()
    }

    fn reads(&self) -> bool {
        !self.eof
            && !self.closing
            && self.in_flight.is_none()
            && self.events.is_none()
            && self.output.len() < HIGH
    }

    /// What to listen to now.
    pub(super) fn wanted(&self) -> EventFlags {
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, self.reads());
        wanted.set(EventFlags::OUT, !self.output.is_empty());
        wanted
    }

    /// Reads and writes what can be. An error means that the client is done with.
    pub(super) fn turn(&mut self, ready: EventFlags) -> io::Result<()> {
        // Both ends are closed: what was sent before may still be there, and a request is a request.
        if ready.intersects(EventFlags::HUP | EventFlags::ERR) && !self.reads() {
            return Err(ErrorKind::BrokenPipe.into());
        }
        self.write()?;
        if self.reads() && ready.intersects(EventFlags::IN | EventFlags::HUP) {
            self.read()?;
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<()> {
        let mut piece = [0; PIECE];
        match (&self.stream).read(&mut piece) {
            Ok(0) => self.eof = true,
            Ok(n) => self.input.extend_from_slice(piece.get(..n).unwrap_or_default()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Writes what the client takes.
    pub(super) fn write(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while let Some(rest) = self.output.get(sent..).filter(|rest| !rest.is_empty()) {
            match (&self.stream).write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => sent += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.output.drain(..sent);
        if self.output.is_empty() {
            self.output.shrink_to(PIECE);
        }
        Ok(())
    }

    /// Whether all is said and nothing can come.
    pub(super) fn is_over(&self) -> bool {
        let silent = self.in_flight.is_none() && self.events.is_none();
        self.output.is_empty() && silent && (self.closing || self.eof)
    }

    /// The next request, if it is all there and nothing is in its way. A refusal is the last thing that the client hears.
    pub(super) fn next(&mut self, max_body: usize) -> Result<Option<Request>, Refusal> {
        if self.closing || self.in_flight.is_some() || self.events.is_some() || self.output.len() >= HIGH {
            return Ok(None);
        }
        if self.head.is_none() {
            if self.input.is_empty() {
                return Ok(None);
            }
            self.head = http::parse_head(&self.input, max_body)?;
            if let Some(head) = &mut self.head
                && head.wants_continue
                && self.input.len() < head.head.saturating_add(head.body)
            {
                self.output.extend_from_slice(CONTINUE);
            }
        }
        let Some(head) = self.head.take_if(|head| self.input.len() >= head.head.saturating_add(head.body))
        else {
            return Ok(None);
        };
        let rest = self.input.split_off(head.head.saturating_add(head.body));
        let mut body = std::mem::replace(&mut self.input, rest);
        body.drain(..head.head);
        self.in_flight = Some(head.keep_alive);
        Ok(Some(Request { method: head.method, path: head.path, body, event_stream: head.event_stream }))
    }

    /// Answers the request that is being carried out.
    pub(super) fn answer(&mut self, response: &Response) {
        let Some(keep_alive) = self.in_flight.take() else { return };
        response.encode(keep_alive, &mut self.output);
        self.closing = !keep_alive;
    }

    /// Answers what is no request, and ends.
    pub(super) fn refuse(&mut self, refusal: Refusal) {
        let fault = Fault { status: refusal.status, message: refusal.message };
        let response = Response { status: fault.status, body: fault.body(), deprecated: false };
        response.encode(false, &mut self.output);
        self.closing = true;
        self.input = Vec::new();
    }

    /// Answers by events, from now on.
    pub(super) fn subscribe(&mut self, event_stream: bool) {
        self.in_flight = None;
        self.events = Some(Subscription { event_stream, dropped: 0 });
        self.output.extend_from_slice(http::stream_head(event_stream).as_bytes());
    }

    /// Tells an event to a client that asked for them, or counts it if the client is too slow. `lost` are those that nobody got.
    pub(super) fn tell(&mut self, event: &Value, lost: u64) {
        let Some(events) = &mut self.events else { return };
        events.dropped += lost;
        let mut event = event.clone();
        if let Value::Object(event) = &mut event
            && events.dropped > 0
        {
            event.insert("dropped".to_owned(), events.dropped.into());
        }
        let text = match (events.event_stream, event.get("event").and_then(Value::as_str)) {
            (true, Some(name)) => format!("event: {name}\ndata: {event}\n\n"),
            (true, None) => format!("data: {event}\n\n"),
            (false, _) => format!("{event}\n"),
        };
        if self.output.len() + text.len() > HIGH {
            events.dropped += 1;
            return;
        }
        events.dropped = 0;
        self.output.extend_from_slice(http::chunk(&text).as_bytes());
    }

    /// The last words: what was asked is not answered any more, and events end.
    pub(super) fn end(&mut self, response: &Response) {
        if self.in_flight.is_some() {
            self.in_flight = Some(false);
            self.answer(response);
        }
        if self.events.take().is_some() {
            self.output.extend_from_slice(http::chunk("").as_bytes());
        }
        drop(self.write());
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
