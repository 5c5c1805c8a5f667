//! `freestone net` and `freestone ctl SOCKET net`: what is asked of a running machine's network, and how it is told.

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::show;
use crate::control::{Request, Target};
use crate::disk::positive;
use crate::size;

/// Flows that are listed if not more are asked for.
const FLOWS: u32 = 40;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples, for a machine that was started by
`freestone run --kernel vmlinuz --disk root.img --net user,hostfwd=tcp::2222-:22 --control vm.ctl`:
  freestone net vm.ctl
  freestone net vm.ctl flows
  freestone net vm.ctl forward add tcp:127.0.0.1:8080-:80
  freestone net vm.ctl forward remove tcp:127.0.0.1:8080
  freestone net vm.ctl link net0 off
  freestone net vm.ctl limit net0 --rx-bandwidth 10M

Exit status: 0 the machine did it, 1 it did not or could not be reached, 2 wrong usage.")]
pub(crate) struct Net {
    /// The machine: its name, or the socket that `freestone run --control` was given.
    #[arg(value_name = "MACHINE")]
    pub(crate) target: Target,

    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    what: Option<What>,
}

impl Net {
    pub(crate) fn what(&self) -> What {
        self.what.clone().unwrap_or(What::Show)
    }
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum What {
    /// Show the network cards, what they are plugged into, and what went through. This is the default.
    Show,
    /// Show the forwards of user networks, with the ports that the host chose.
    Forwards,
    /// Show the connections and datagram flows through user networks, the busiest first.
    Flows {
        /// Only those of this card.
        #[arg(long, value_name = "ID")]
        nic: Option<String>,
        /// List this many at most.
        #[arg(long, value_name = "N", default_value_t = FLOWS)]
        limit: u32,
    },
    /// Show all counters: of the cards, of what they are plugged into, and of the NAT.
    Counters,
    /// Add or remove a forward of a user network.
    Forward {
        #[command(subcommand)]
        what: ForwardWhat,
    },
    /// Pull the cable of a card, or plug it in again.
    Link {
        /// The card: net0, net1 and so on, or the id that it was given.
        nic: String,
        state: LinkState,
    },
    /// Limit what goes through a card; without options there is no limit any more.
    Limit {
        /// The card.
        nic: String,
        #[command(flatten)]
        limits: Limits,
    },
    /// Have the guest tell its neighbours where it is.
    Announce {
        /// The card.
        nic: String,
    },
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ForwardWhat {
    /// Lead a port of the host to the guest.
    Add {
        /// As for hostfwd=: tcp::8080-:80, udp:127.0.0.1:5353-:53. Port 0 of the host lets it choose one.
        forward: String,
        /// The card, if several have user networks.
        #[arg(long, value_name = "ID")]
        nic: Option<String>,
    },
    /// Do so no more. Connections that are made go on.
    Remove {
        /// The forward as it was added, or its host side alone: tcp::8080.
        forward: String,
        /// The card, if several have user networks.
        #[arg(long, value_name = "ID")]
        nic: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LinkState {
    /// Plugged in.
    On,
    /// Pulled.
    Off,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Limits {
    /// Bytes a second that the guest receives.
    #[arg(long, value_name = "SIZE", value_parser = size::parse_rate)]
    rx_bandwidth: Option<u64>,
    /// Frames a second that the guest receives.
    #[arg(long, value_name = "N", value_parser = positive)]
    rx_iops: Option<u64>,
    /// Bytes a second that the guest sends.
    #[arg(long, value_name = "SIZE", value_parser = size::parse_rate)]
    tx_bandwidth: Option<u64>,
    /// Frames a second that the guest sends.
    #[arg(long, value_name = "N", value_parser = positive)]
    tx_iops: Option<u64>,
}

impl What {
    /// What the machine is asked.
    pub(crate) fn request(&self) -> Request {
        match self.clone() {
            Self::Show | Self::Forwards | Self::Counters => Request::Net,
            Self::Flows { nic, limit } => Request::NetFlows { nic, limit: Some(limit) },
            Self::Forward { what: ForwardWhat::Add { forward, nic } } => {
                Request::NetForwardAdd { nic, forward }
            }
            Self::Forward { what: ForwardWhat::Remove { forward, nic } } => {
                Request::NetForwardRemove { nic, forward }
            }
            Self::Link { nic, state } => Request::NetLink { nic, up: state == LinkState::On },
            Self::Limit { nic, limits } => Request::NetLimit {
                nic,
                rx_bandwidth: limits.rx_bandwidth,
                rx_iops: limits.rx_iops,
                tx_bandwidth: limits.tx_bandwidth,
                tx_iops: limits.tx_iops,
            },
            Self::Announce { nic } => Request::NetAnnounce { nic },
        }
    }

    /// The part of the answer that was asked for.
    pub(crate) fn view(&self, answer: Value) -> Value {
        let of_each = |keys: &[&str]| {
            let nics = show::list(&answer, "nics").map(|nic| {
                let pick = |key: &&str| ((*key).to_owned(), nic.pointer(&format!("/{key}")).cloned());
                let picked = keys.iter().map(pick).filter_map(|(key, value)| {
                    let key = key.rsplit('/').next()?.to_owned();
                    Some((key, value?))
                });
                Value::Object(picked.collect())
            });
            json!({ "nics": nics.collect::<Vec<_>>() })
        };
        match self {
            Self::Forwards => of_each(&["id", "user/forwards", "user/guest_forwards"]),
            Self::Counters => of_each(&["id", "card", "port", "user/nat"]),
            _ => answer,
        }
    }

    /// The view for people.
    pub(crate) fn describe(&self, view: &Value) -> String {
        let text = |key: &str| view.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
        match self {
            Self::Show => show::nics(view),
            Self::Forwards => show::forwards(view),
            Self::Flows { .. } => show::flows(view),
            Self::Counters => show::counters(view),
            Self::Forward { what: ForwardWhat::Add { .. } } => {
                format!("{} forwards {}", text("nic"), text("forward"))
            }
            Self::Forward { what: ForwardWhat::Remove { .. } } => {
                format!("{} forwards {} no more", text("nic"), text("forward"))
            }
            Self::Link { nic, state: LinkState::On } => format!("the cable of {nic} is in"),
            Self::Link { nic, state: LinkState::Off } => format!("the cable of {nic} is pulled"),
            Self::Limit { nic, .. } => format!("{nic} {}", show::limits(view)),
            Self::Announce { nic } => match view.get("told").and_then(Value::as_bool) {
                Some(true) => format!("the guest was told to announce itself by {nic}"),
                _ => format!("the guest's driver does not know how to announce itself by {nic}"),
            },
        }
    }
}
