//! The state machine: what each operation means before a machine is started, while it runs and while it is paused.
//!
//! Operations are carried out one at a time, in the order in which they came; while the engine is at one, the others wait, and
//! only what is known anyway is answered at once. So each meets a state that does not change under it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::engine::{Done, Engine};
use super::fault::Fault;
use super::http::{Response, Status};
use super::mailbox::{Mailbox, Message, Ticket};
use super::metrics::{Counters, Metrics};
use super::mmds::Store;
use super::model::VmState;
use super::operation::Operation;
use super::resources::VmResources;

/// What follows from an answer of the engine.
pub(crate) type Finish = Box<dyn FnOnce(&mut Controller) -> Result<Reply, Fault> + Send>;

/// What a success says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    /// 204.
    Nothing,
    /// 200.
    Json(Value),
}

/// Whether an operation is carried out.
pub(super) enum Outcome {
    /// It is, or it never will be.
    Now(Result<Reply, Fault>),
    /// The engine is at it.
    Later,
}

impl From<Result<(), Fault>> for Outcome {
    fn from(result: Result<(), Fault>) -> Self {
        Self::Now(result.map(|()| Reply::Nothing))
    }
}

/// How an API ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The machine did, with this status of the process and reason.
    Machine(u8, String),
    /// It was asked to before there was a machine.
    Stopped,
    /// The machine of the configuration file could not be started.
    Start(String),
}

/// What the process was told of itself.
#[derive(Debug, Clone)]
pub(crate) struct Instance {
    /// `--id`.
    pub(crate) id: String,
    /// Bytes of JSON that the metadata store holds.
    pub(crate) mmds_limit: usize,
    /// What is known of the process's start, for the metrics.
    pub(crate) startup: Value,
}

/// The state machine.
pub(crate) struct Controller {
    pub(super) engine: Box<dyn Engine>,
    pub(super) instance: Instance,
    pub(super) state: VmState,
    pub(super) vm: VmResources,
    /// Whether something was configured that a restored machine brings itself.
    pub(super) configured: bool,
    pub(super) mmds: Store,
    pub(super) metrics: Metrics,
    counters: Counters,
    mailbox: Arc<Mailbox>,
    /// What the engine is at.
    busy: Option<Pending>,
    waiting: VecDeque<(Ticket, Operation)>,
    /// Events to tell.
    events: Vec<Value>,
    stopping: bool,
    end: Option<End>,
}

/// What is remembered of an operation that the engine is at.
#[derive(Debug, Clone, Copy)]
struct Pending {
    ticket: Ticket,
    name: (&'static str, &'static str),
    deprecated: bool,
}

impl Controller {
    pub(crate) fn new(instance: Instance, engine: Box<dyn Engine>, mailbox: Arc<Mailbox>) -> Self {
        Self {
            engine,
            state: VmState::NotStarted,
            vm: VmResources::default(),
            configured: false,
            mmds: Store::new(instance.mmds_limit),
            metrics: Metrics::new(&instance),
            instance,
            counters: Counters::default(),
            mailbox,
            busy: None,
            waiting: VecDeque::new(),
            events: Vec::new(),
            stopping: false,
            end: None,
        }
    }

    /// Takes a whole configuration and starts its machine. Why that failed may be known only later: see [`End::Start`].
    pub(crate) fn start_with(&mut self, config: VmResources, metadata: Option<Value>) -> Result<(), Fault> {
        if let Some(logger) = &config.logger {
            self.set_logger(logger.clone())?;
        }
        if let Some(metrics) = &config.metrics {
            self.set_metrics(metrics.clone())?;
        }
        self.vm.take_all(config)?;
        if let Some(metadata) = metadata {
            self.put_mmds(metadata)?;
        }
        self.request(Ticket::NOBODY, Operation::InstanceStart);
        match self.end.take() {
            Some(End::Start(message)) => Err(Fault::bad_request(message)),
            end => {
                self.end = end;
                Ok(())
            }
        }
    }

    /// What the guest's metadata is, before anybody asks.
    pub(crate) fn put_mmds(&mut self, contents: Value) -> Result<(), Fault> {
        let contents = self.mmds.put(contents)?;
        self.engine.mmds(contents);
        Ok(())
    }

    /// Carries out what a client asks. `None`: the answer comes out of [`hear`](Self::hear) later.
    pub(crate) fn request(&mut self, ticket: Ticket, operation: Operation) -> Option<Response> {
        if !operation.is_known_anyway() && (self.busy.is_some() || !self.waiting.is_empty()) {
            self.waiting.push_back((ticket, operation));
            return None;
        }
        self.begin(ticket, operation)
    }

    /// The answer to a request that asks for nothing that there is.
    pub(crate) fn refuse(&mut self, fault: &Fault) -> Response {
        self.counters.count(Operation::UNKNOWN, false);
        response(Err(fault.clone()), false)
    }

    /// Takes what other threads told, and gives the answers that are due.
    pub(crate) fn hear(&mut self, messages: VecDeque<Message>) -> Vec<(Ticket, Response)> {
        let mut answers = Vec::new();
        for message in messages {
            match message {
                Message::Finish(ticket, finish) => {
                    let outcome = finish(self);
                    // One operation at a time is with the engine: this is it.
                    if let Some(pending) = self.busy.take_if(|pending| pending.ticket == ticket) {
                        answers.extend(self.end_of(pending, outcome));
                    }
                }
                Message::Event(event) => self.events.push(event),
                Message::Ended(status, reason) => {
                    self.tell(json!({"event": "ended", "status": status, "reason": reason}));
                    self.end.get_or_insert(End::Machine(status, reason));
                }
                Message::Stop => {
                    self.engine.stop();
                    self.stopping = true;
                }
            }
        }
        while !self.stopping
            && self.busy.is_none()
            && let Some((ticket, operation)) = self.waiting.pop_front()
        {
            answers.extend(self.begin(ticket, operation).map(|response| (ticket, response)));
        }
        if self.stopping && self.state == VmState::NotStarted && self.busy.is_none() {
            self.end.get_or_insert(End::Stopped);
        }
        answers
    }

    /// Events since the last time.
    pub(crate) fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// Whether all is over, and how.
    pub(crate) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Writes a line of metrics if it is time. Nobody waits for it.
    pub(crate) fn tick(&mut self) {
        if self.metrics.is_due() && self.state != VmState::NotStarted && self.busy.is_none() {
            self.request(Ticket::NOBODY, Operation::FlushMetrics);
        }
    }

    /// Milliseconds until [`tick`](Self::tick) has something to do.
    pub(crate) fn next_tick(&self) -> Option<u64> {
        self.metrics.due_in().filter(|_| self.state != VmState::NotStarted)
    }

    /// Clients hear of it.
    pub(super) fn tell(&mut self, event: Value) {
        self.events.push(event);
    }

    /// The machine is in this state now.
    pub(super) fn enter(&mut self, state: VmState) {
        if self.state != state {
            self.state = state;
            self.tell(json!({"event": "state", "state": state}));
        }
    }

    /// Counts so far.
    pub(super) fn counts(&self) -> Value {
        self.counters.json()
    }

    fn begin(&mut self, ticket: Ticket, operation: Operation) -> Option<Response> {
        let pending = Pending { ticket, name: operation.name(), deprecated: operation.is_deprecated() };
        match self.carry_out(ticket, operation) {
            Outcome::Now(outcome) => self.end_of(pending, outcome).map(|(_, response)| response),
            Outcome::Later => {
                self.busy = Some(pending);
                None
            }
        }
    }

    /// Counts, logs and answers.
    fn end_of(&mut self, pending: Pending, outcome: Result<Reply, Fault>) -> Option<(Ticket, Response)> {
        let (group, name) = pending.name;
        self.counters.count(pending.name, outcome.is_ok());
        match &outcome {
            Ok(_) => tracing::debug!(group, name, "done"),
            Err(fault) => tracing::error!(group, name, %fault, "refused"),
        }
        if pending.ticket == Ticket::NOBODY {
            if let (Err(fault), "actions") = (outcome, name)
                && group == "put_api_requests"
                && self.state == VmState::NotStarted
            {
                self.end.get_or_insert(End::Start(fault.message));
            }
            return None;
        }
        Some((pending.ticket, response(outcome, pending.deprecated)))
    }

    /// Gives the engine somewhere to answer; `then` makes a reply of a success, on the API's thread.
    pub(super) fn done<T: Send + 'static>(
        &self,
        ticket: Ticket,
        then: impl FnOnce(&mut Self, T) -> Result<Reply, Fault> + Send + 'static,
    ) -> Done<T> {
        let mailbox = Arc::clone(&self.mailbox);
        Done::new(move |outcome: Result<T, Fault>| {
            let finish: Finish = Box::new(move |controller| then(controller, outcome?));
            mailbox.send(Message::Finish(ticket, finish));
        })
    }

    /// The same for what succeeds with nothing to say.
    pub(super) fn done_then(
        &self,
        ticket: Ticket,
        then: impl FnOnce(&mut Self) + Send + 'static,
    ) -> Done<()> {
        self.done(ticket, |controller, ()| {
            then(controller);
            Ok(Reply::Nothing)
        })
    }

    /// The same for what succeeds with a value that is told.
    pub(super) fn done_json<T: Serialize + Send + 'static>(&self, ticket: Ticket) -> Done<T> {
        self.done(ticket, |_, value| to_json(&value))
    }
}

/// A model as JSON.
pub(super) fn to_json(value: &impl Serialize) -> Result<Reply, Fault> {
    let value = serde_json::to_value(value).map_err(|e| Fault::internal(format!("no JSON: {e}")))?;
    Ok(Reply::Json(value))
}

fn response(outcome: Result<Reply, Fault>, deprecated: bool) -> Response {
    match outcome {
        Ok(Reply::Nothing) => Response { status: Status::NoContent, body: String::new(), deprecated },
        Ok(Reply::Json(value)) => Response { status: Status::Ok, body: value.to_string(), deprecated },
        Err(fault) => Response { status: fault.status, body: fault.body(), deprecated },
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("state", &self.state)
            .field("busy", &self.busy)
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}
