//! The control queue (5.1.6.5): commands by which a driver says what it wants to receive, on which queues and in what form.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use freestone_net::{Frame, MacAddr};

use super::filter::{Addresses, MAX_ADDRESSES};
use super::{Shared, feature};
use crate::queue::ChainBuffers;
use crate::{Error, RequestHandler, Result};

/// Classes of commands, and the commands in each.
mod class {
    pub(super) const RX: u8 = 0;
    pub(super) const MAC: u8 = 1;
    pub(super) const VLAN: u8 = 2;
    pub(super) const ANNOUNCE: u8 = 3;
    pub(super) const MQ: u8 = 4;
    pub(super) const GUEST_OFFLOADS: u8 = 5;
}

const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const RX_ALLUNI: u8 = 2;
const RX_NOMULTI: u8 = 3;
const RX_NOUNI: u8 = 4;
const RX_NOBCAST: u8 = 5;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;
const ANNOUNCE_ACK: u8 = 0;
const MQ_VQ_PAIRS_SET: u8 = 0;
const GUEST_OFFLOADS_SET: u8 = 0;

/// The device's answers.
const OK: u8 = 0;
const ERR: u8 = 1;

/// Carries out commands.
#[derive(Debug)]
pub(super) struct Commands {
    shared: Arc<Shared>,
    /// Negotiated features that have what they require.
    features: u64,
}

/// A command is refused: it was not negotiated, there is none such, or its data is wrong.
struct Refused;

impl RequestHandler for Commands {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        if buffers.writable_len() == 0 {
            return Err(Error::ShortRequest { direction: "device-writable", have: 0, want: 1 });
        }
        let mut header = [0; 2];
        buffers.read(&mut header)?;
        let data = Frame::new(buffers.readable());
        let done = self.carry_out(header, data);
        let stats = &self.shared.stats;
        stats.commands.add(1);
        if done.is_err() {
            let [class, command] = header;
            tracing::debug!(class, command, bytes = data.len(), "command of a network driver refused");
            stats.refused.add(1);
        }
        buffers.write(&[if done.is_ok() { OK } else { ERR }])?;
        Ok(1)
    }
}

impl Commands {
    pub(super) fn new(shared: Arc<Shared>, features: u64) -> Self {
        Self { shared, features }
    }

    fn carry_out(&self, [class, command]: [u8; 2], data: Frame<'_, '_>) -> std::result::Result<(), Refused> {
        match (class, command) {
            (class::RX, RX_PROMISC | RX_ALLMULTI) => self.needs(feature::CTRL_RX)?.set_mode(command, data),
            (class::RX, RX_ALLUNI..=RX_NOBCAST) => {
                self.needs(feature::CTRL_RX_EXTRA)?.set_mode(command, data)
            }
            (class::MAC, MAC_TABLE_SET) => self.needs(feature::CTRL_RX)?.set_addresses(data),
            (class::MAC, MAC_ADDR_SET) => self.needs(feature::CTRL_MAC_ADDR)?.set_mac(data),
            (class::VLAN, VLAN_ADD | VLAN_DEL) => self.needs(feature::CTRL_VLAN)?.set_vlan(command, data),
            (class::ANNOUNCE, ANNOUNCE_ACK) => {
                self.needs(feature::GUEST_ANNOUNCE)?.shared.announce.store(false, Ordering::Release);
                Ok(())
            }
            (class::MQ, MQ_VQ_PAIRS_SET) => self.needs(feature::MQ)?.set_pairs(data),
            (class::GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => {
                self.needs(feature::CTRL_GUEST_OFFLOADS)?.set_offloads(data)
            }
            _ => Err(Refused),
        }
    }

    fn needs(&self, feature: u64) -> std::result::Result<&Self, Refused> {
        if self.features & feature != 0 { Ok(self) } else { Err(Refused) }
    }

    fn set_mode(&self, command: u8, data: Frame<'_, '_>) -> std::result::Result<(), Refused> {
        let [on] = all(data)?;
        let on = on != 0;
        self.shared.change_filter(|filter| {
            let mode = match command {
                RX_PROMISC => &mut filter.promiscuous,
                RX_ALLMULTI => &mut filter.all_multicast,
                RX_ALLUNI => &mut filter.all_unicast,
                RX_NOMULTI => &mut filter.no_multicast,
                RX_NOUNI => &mut filter.no_unicast,
                _ => &mut filter.no_broadcast,
            };
            *mode = on;
        });
        Ok(())
    }

    /// Two tables, of stations and of groups. What is kept is copied once.
    fn set_addresses(&self, data: Frame<'_, '_>) -> std::result::Result<(), Refused> {
        let (unicast, rest) = addresses(data)?;
        let (multicast, rest) = addresses(rest)?;
        if !rest.is_empty() {
            return Err(Refused);
        }
        self.shared.change_filter(|filter| (filter.unicast, filter.multicast) = (unicast, multicast));
        Ok(())
    }

    fn set_mac(&self, data: Frame<'_, '_>) -> std::result::Result<(), Refused> {
        let mac = MacAddr(all(data)?);
        if !mac.is_station() {
            return Err(Refused);
        }
        self.shared.change_filter(|filter| filter.mac = mac);
        Ok(())
    }

    fn set_vlan(&self, command: u8, data: Frame<'_, '_>) -> std::result::Result<(), Refused> {
        let id = u16::from_le_bytes(all(data)?);
        let mut there_is = false;
        self.shared.change_filter(|filter| there_is = filter.set_vlan(id, command == VLAN_ADD));
        if there_is { Ok(()) } else { Err(Refused) }
    }

    fn set_pairs(&self, data: Frame<'_, '_>) -> std::result::Result<(), Refused> {
        let pairs = u16::from_le_bytes(all(data)?);
        if !(1..=self.shared.config.pairs).contains(&pairs) {
            return Err(Refused);
        }
        self.shared.port().set_active_pairs(pairs).map_err(|error| self.failed("choose queues", &error))?;
        self.shared.active_pairs.store(pairs, Ordering::Release);
        self.shared.wake_all();
        Ok(())
    }

    fn set_offloads(&self, data: Frame<'_, '_>) -> std::result::Result<(), Refused> {
        let bits = u64::from_le_bytes(all(data)?);
        if bits & !(self.features & feature::GUEST_OFFLOADS) != 0 {
            return Err(Refused);
        }
        let receive = feature::receive(bits);
        self.shared.port().set_receive(receive).map_err(|error| self.failed("change offloads", &error))?;
        self.shared.receive.store(receive.bits(), Ordering::Release);
        Ok(())
    }

    #[cold]
    fn failed(&self, operation: &'static str, error: &freestone_net::Error) -> Refused {
        tracing::warn!(operation, %error, port = ?self.shared.port, "the port does not do what the driver asks for");
        Refused
    }
}

/// The data of a command with exactly `N` bytes.
fn all<const N: usize>(data: Frame<'_, '_>) -> std::result::Result<[u8; N], Refused> {
    data.first().filter(|_| data.len() == N).ok_or(Refused)
}

/// A table of addresses, and what comes after it (5.1.6.5.2).
fn addresses<'a, 'm>(data: Frame<'a, 'm>) -> std::result::Result<(Addresses, Frame<'a, 'm>), Refused> {
    let count = usize::try_from(u32::from_le_bytes(data.first().ok_or(Refused)?)).map_err(|_| Refused)?;
    let data = data.after(size_of::<u32>());
    let bytes =
        count.checked_mul(size_of::<MacAddr>()).filter(|bytes| *bytes <= data.len()).ok_or(Refused)?;
    let mut table = [[0; size_of::<MacAddr>()]; MAX_ADDRESSES];
    data.read_at(0, table.as_flattened_mut());
    let addresses = Addresses {
        table: table.into_iter().take(count).map(MacAddr).collect(),
        overflow: count > MAX_ADDRESSES,
    };
    Ok((addresses, data.after(bytes)))
}
