//! [`Engine`]: drives all parts of a NAT. It takes frames of the machine (`packet`), asks the host's sockets, and has frames for the
//! machine.

mod packet;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::context::{Context, Kind, Link, Poll, Ready, Token};
use super::fragment::Reassembly;
use super::icmp::Icmp;
use super::link;
use super::outbox::Outbox;
use super::tcp::Tcp;
use super::udp::Udp;
use super::{Dial, FlowInfo, Forward, NatConfig, NatStats, Protocol};
use crate::{Error, Frame, Offloads, PortStats, Received, Result, Source};

/// How often events are taken from the poll in one step.
const MAX_ROUNDS: usize = 8;

/// What a NAT is while it works.
#[derive(Debug)]
pub(super) struct Engine {
    config: Arc<NatConfig>,
    stats: Arc<NatStats>,
    port: Arc<PortStats>,
    link: Link,
    dial: Box<dyn Dial>,
    poll: Poll,
    out: Outbox,
    tcp: Tcp,
    udp: Udp,
    icmp: Icmp,
    reassembly: Reassembly,
    /// With the ports that the host chose.
    forwards: Vec<Forward>,
    events: Vec<Ready>,
    /// Packets that have to be in one piece.
    scratch: Vec<u8>,
    timer: OwnedFd,
    /// When the timer rings.
    armed: Option<Instant>,
    /// The time of this step; `None` between steps.
    now: Option<Instant>,
    /// A frame was moved since the last flush, so that the next flush says nothing of the source.
    moved: bool,
}

/// All parts at once.
struct Parts<'a> {
    cx: Context<'a>,
    tcp: &'a mut Tcp,
    udp: &'a mut Udp,
    icmp: &'a mut Icmp,
    events: &'a mut Vec<Ready>,
}

impl Engine {
    /// A NAT with nothing going on; listens for the configured forwards. `wake` makes it look for jobs.
    pub(super) fn new(
        config: Arc<NatConfig>,
        dial: Box<dyn Dial>,
        stats: Arc<NatStats>,
        port: Arc<PortStats>,
        wake: &OwnedFd,
    ) -> Result<Self> {
        let io = |error: io::Error| Error::io("prepare to watch the sockets of a NAT")(error);
        let poll = Poll::new().map_err(io)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)
            .map_err(|error| io(error.into()))?;
        let token = |kind| Token { kind, generation: 0, index: 0 };
        poll.add_readable(&timer, token(Kind::Timer)).map_err(io)?;
        poll.add_readable(wake, token(Kind::Wake)).map_err(io)?;
        let mut engine = Self {
            link: Link::default(),
            dial,
            poll,
            out: Outbox::default(),
            tcp: Tcp::new(&config),
            udp: Udp::new(),
            icmp: Icmp::new(),
            reassembly: Reassembly::default(),
            forwards: Vec::new(),
            events: Vec::new(),
            scratch: Vec::new(),
            timer,
            armed: None,
            now: None,
            moved: false,
            config: Arc::clone(&config),
            stats,
            port,
        };
        for forward in &config.forwards {
            engine.add_forward(forward)?;
        }
        Ok(engine)
    }

    /// The time of this step.
    fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(Instant::now)
    }

    fn parts(&mut self) -> Parts<'_> {
        Parts {
            cx: Context {
                now: *self.now.get_or_insert_with(Instant::now),
                config: &self.config,
                link: &mut self.link,
                dial: self.dial.as_mut(),
                poll: &self.poll,
                out: &mut self.out,
                stats: &self.stats,
            },
            tcp: &mut self.tcp,
            udp: &mut self.udp,
            icmp: &mut self.icmp,
            events: &mut self.events,
        }
    }

    /// What makes it worth asking.
    pub(super) fn source(&self) -> Source {
        self.poll.source()
    }

    /// Does what the host's sockets and the time ask for, a bounded amount, and answers what the machine sent. Returns whether
    /// somebody woke it.
    pub(super) fn flush(&mut self) -> bool {
        self.now = None;
        let mut woken = false;
        let mut more = false;
        // What happens between two flushes makes the source ready, and the flush after that is one before which nothing was moved.
        let rounds = if std::mem::take(&mut self.moved) { 0 } else { MAX_ROUNDS };
        for _ in 0..rounds {
            more = self.events(&mut woken) == Poll::MAX_READY;
            if !more {
                break;
            }
        }
        let Parts { mut cx, tcp, udp, icmp, .. } = self.parts();
        let cx = &mut cx;
        if std::mem::take(&mut cx.link.met) {
            tcp.hurry(cx);
        }
        let mut next =
            [tcp.timers(cx), udp.timers(cx), icmp.timers(cx), link::timers(cx)].into_iter().flatten().min();
        more |= tcp.flush(cx);
        let datagrams = udp.pump(cx) | icmp.pump(cx);
        // While frames wait, whoever takes them comes back here.
        if more || (datagrams && cx.out.next_len().is_none()) {
            next = Some(cx.now);
        }
        self.arm(next);
        self.now = None;
        woken
    }

    /// A card was plugged in.
    pub(super) fn opened(&mut self) {
        self.now = None;
        let now = self.now();
        link::introduce(&self.config, &mut self.link, now);
        self.arm(self.link.advertise);
        self.now = None;
    }

    /// Takes events once; returns how many there were.
    fn events(&mut self, woken: &mut bool) -> usize {
        let Parts { mut cx, tcp, udp, icmp, events, .. } = self.parts();
        let cx = &mut cx;
        let mut rang = false;
        if cx.poll.ready(events).is_err() {
            return 0;
        }
        for ready in events.iter().copied() {
            match ready.token.kind {
                Kind::Tcp => tcp.ready(cx, ready),
                Kind::Listener => tcp.knock(ready),
                Kind::Udp | Kind::Forward | Kind::Dns => udp.ready(cx, ready),
                Kind::Icmp => icmp.ready(cx, ready),
                Kind::Timer => rang = true,
                Kind::Wake => *woken = true,
            }
        }
        if rang {
            self.armed = None;
        }
        self.events.len()
    }

    /// Sets the timer, if it would ring too late.
    fn arm(&mut self, next: Option<Instant>) {
        let Some(next) = next.filter(|next| self.armed.is_none_or(|armed| armed > *next)) else { return };
        let now = self.now();
        // Zero would stop it.
        let left = next.saturating_duration_since(now).max(std::time::Duration::from_nanos(1));
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let value = Itimerspec { it_interval: zero, it_value: value };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value) {
            Ok(_) => self.armed = Some(next),
            Err(error) => tracing::warn!(%error, "the timer of a NAT cannot be set"),
        }
    }

    /// Wants to be flushed again soon.
    pub(super) fn again(&mut self) {
        let now = self.now();
        self.arm(Some(now));
        self.now = None;
    }

    /// Length of the next frame for the machine, at most, if the machine lets `receive` be left undone.
    pub(super) fn waiting(&mut self, receive: Offloads) -> Option<usize> {
        self.out.next_len().or_else(|| self.tcp.waiting(receive))
    }

    /// Puts the next frame for the machine into `room`, with no more of it undone than `receive`.
    pub(super) fn receive(&mut self, room: Frame<'_, '_>, receive: Offloads) -> Received {
        let received = match self.out.next_len() {
            Some(len) if len > room.len() => Received::NeedsRoom(len),
            Some(_) => self.out.pop().map_or(Received::Nothing, |(frame, header)| {
                let len = room.write_at(0, &frame);
                self.out.give_back(frame);
                Received::Frame(len, header)
            }),
            None => {
                let Parts { mut cx, tcp, .. } = self.parts();
                tcp.receive(&mut cx, room, receive)
            }
        };
        if let Received::Frame(len, _) = received {
            self.moved = true;
            self.port.received(len);
        }
        received
    }

    /// Drops the frame for which the machine never will have room.
    pub(super) fn drop_next(&mut self) {
        self.port.receive_dropped();
        if let Some((frame, _)) = self.out.pop() {
            self.out.give_back(frame);
        } else {
            let Parts { mut cx, tcp, .. } = self.parts();
            tcp.drop_next(&mut cx);
        }
    }

    /// Forgets the machine: its connections, its flows, its addresses.
    pub(super) fn reset(&mut self) {
        self.now = None;
        let Parts { mut cx, tcp, udp, icmp, .. } = self.parts();
        tcp.reset(&mut cx);
        udp.reset();
        icmp.reset();
        self.out.clear();
        self.reassembly.reset();
        self.link = Link::default();
        self.now = None;
    }

    /// Listens for the machine; returns the forward with the port that the host chose.
    pub(super) fn add_forward(&mut self, forward: &Forward) -> Result<Forward> {
        let Parts { mut cx, tcp, udp, .. } = self.parts();
        let host = match forward.protocol {
            Protocol::Tcp => tcp.listen(&cx, forward)?,
            Protocol::Udp => udp.listen(&mut cx, forward)?,
        };
        let made = Forward { host, ..*forward };
        self.forwards.push(made);
        Ok(made)
    }

    /// Ends listening for the machine.
    pub(super) fn remove_forward(&mut self, protocol: Protocol, host: std::net::SocketAddr) -> Result<()> {
        let at = self.forwards.iter().position(|made| made.protocol == protocol && made.host == host);
        let Some(at) = at else {
            return Err(Error::invalid("forward", host.to_string(), "there is none at this address"));
        };
        self.forwards.remove(at);
        match protocol {
            Protocol::Tcp => self.tcp.unlisten(host),
            Protocol::Udp => self.udp.unlisten(host),
        };
        Ok(())
    }

    /// What it listens at for the machine.
    pub(super) fn forwards(&self) -> Vec<Forward> {
        self.forwards.clone()
    }

    /// All flows.
    pub(super) fn flows(&self) -> Vec<FlowInfo> {
        let now = Instant::now();
        let mut flows = self.tcp.flows(now);
        flows.extend(self.udp.flows(now));
        flows.extend(self.icmp.flows(now));
        flows
    }
}
