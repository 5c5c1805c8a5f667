//! What the networks' tests run in a guest and beside it: small servers and clients whose data is known, so that every byte can
//! be compared, and a source of frames that are wrong.
//!
//! Everything here is bounded: servers end when a file is gone, clients after what they were told to do.

mod client;
mod dns;
mod frames;
mod pattern;
mod pcap;
mod serve;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};

use pattern::{Checker, Pattern};
use serve::Service;

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One program of the tests.
#[derive(Debug, Subcommand)]
pub enum Program {
    /// Serve until a file is gone.
    Serve {
        /// The file; it is looked for each quarter of a second.
        #[arg(long, value_name = "PATH")]
        until_gone: PathBuf,
        /// A name that the name server knows, and an address. May be repeated.
        #[arg(long, value_name = "NAME=ADDR", value_parser = dns::parse_record)]
        record: Vec<(String, IpAddr)>,
        /// KIND@ADDR:PORT. Kinds: http (GET /BYTES/SEED answers that pattern), sink (takes a pattern and says whether it was
        /// right), echo (TCP), udp-echo, dns.
        #[arg(value_name = "SERVICE")]
        services: Vec<Service>,
    },
    /// Write a pattern to standard output.
    Pattern {
        /// How many bytes.
        bytes: u64,
        /// Which pattern.
        seed: u64,
    },
    /// Compare standard input with a pattern.
    Check {
        /// How many bytes.
        bytes: u64,
        /// Which pattern.
        seed: u64,
    },
    /// Send a pattern to a sink, end that direction, and print what the sink says.
    Send {
        /// The sink.
        to: SocketAddr,
        /// How many bytes.
        bytes: u64,
        /// Which pattern.
        seed: u64,
    },
    /// Have an echo server send back patterns, one connection or datagram after another.
    Echo {
        /// TCP or UDP.
        protocol: Protocol,
        /// The server.
        to: SocketAddr,
        /// How many connections or datagrams.
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Bytes of each.
        #[arg(long, default_value_t = 1000)]
        bytes: u64,
    },
    /// Have an echo server send back a pattern, and keep the connection open until a file is gone.
    Hold {
        /// The server.
        to: SocketAddr,
        /// How many bytes.
        #[arg(long, default_value_t = 100_000)]
        bytes: u64,
        /// The file.
        #[arg(long, value_name = "PATH")]
        until_gone: PathBuf,
    },
    /// Try to reach addresses by TCP and UDP, and print for each whether that worked.
    Probe {
        /// Addresses of echo servers.
        #[arg(required = true)]
        to: Vec<SocketAddr>,
    },
    /// Open connections to an echo server and keep all of them open, then use some.
    Flood {
        /// The server.
        to: SocketAddr,
        /// How many.
        #[arg(long, default_value_t = 10_000)]
        connections: u32,
    },
    /// Send frames that are wrong in many ways.
    Garbage {
        /// The network interface.
        interface: String,
        /// How many frames.
        #[arg(long, default_value_t = 20_000)]
        frames: u32,
        /// Which ones.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Read a recording, and say what its TCP segments were like.
    Pcap {
        /// A pcapng file.
        file: PathBuf,
    },
}

/// Runs a program; fails when something is not as it must be.
pub fn run(program: &Program) -> Result<()> {
    match program {
        Program::Serve { until_gone, record, services } => serve::run(until_gone, record, services),
        Program::Pattern { bytes, seed } => {
            let mut pattern = Pattern::new(*seed).take(*bytes);
            std::io::copy(&mut pattern, &mut std::io::stdout().lock()).context("writing the pattern")?;
            std::io::stdout().flush().context("writing the pattern")
        }
        Program::Check { bytes, seed } => {
            let mut checker = Checker::new(*seed);
            checker.read_all(&mut std::io::stdin().lock())?;
            println!("{}", checker.verdict(*bytes));
            if checker.is_right(*bytes) { Ok(()) } else { bail!("the pattern is wrong") }
        }
        Program::Send { to, bytes, seed } => client::send(*to, *bytes, *seed),
        Program::Echo { protocol: Protocol::Tcp, to, count, bytes } => client::echo_tcp(*to, *count, *bytes),
        Program::Echo { protocol: Protocol::Udp, to, count, bytes } => client::echo_udp(*to, *count, *bytes),
        Program::Hold { to, bytes, until_gone } => client::hold(*to, *bytes, until_gone),
        Program::Probe { to } => client::probe(to),
        Program::Flood { to, connections } => client::flood(*to, *connections),
        Program::Garbage { interface, frames, seed } => frames::run(interface, *frames, *seed),
        Program::Pcap { file } => pcap::run(file),
    }
}
