//! The saved state of a network card: what its driver told it, by the control queue above all.
//!
//! Counters and the buckets of rate limits are not saved: those begin at zero, these full. Frames in flight are with the queues,
//! whose buffers go back to the driver, or with the port, whose network may lose frames at any time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use freestone_bus::{Error, Progress, Source, Work};
use freestone_net::{MacAddr, Offloads};
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::filter::{Addresses, MAX_ADDRESSES, RxFilter};
use super::{Net, NetHandle, Shared, feature, lock};
use crate::device::{ActiveQueue, Worker};

/// What a [`Net`] device remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct NetState {
    /// The address that the card has after a reset.
    first_mac: [u8; 6],
    link_up: bool,
    /// The driver was asked to announce itself, and did not acknowledge that.
    announce: bool,
    active_pairs: u16,
    /// Bits of [`Offloads`] that the driver takes.
    receive: u32,
    /// No driver has chosen features since the last reset.
    fresh: bool,
    filter: FilterState,
}

/// An [`RxFilter`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FilterState {
    mac: [u8; 6],
    by_address: bool,
    by_vlan: bool,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: AddressesState,
    multicast: AddressesState,
    /// The VLANs that the driver wants.
    vlans: Vec<u16>,
}

/// An [`Addresses`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct AddressesState {
    table: Vec<[u8; 6]>,
    overflow: bool,
}

impl Section for NetState {
    const NAME: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}

/// What of a state does not fit, and its value.
type Misfit = (&'static str, u64);

fn check(holds: bool, what: &'static str, value: impl Into<u64>) -> Result<(), Misfit> {
    if holds { Ok(()) } else { Err((what, value.into())) }
}

impl From<&Addresses> for AddressesState {
    fn from(addresses: &Addresses) -> Self {
        Self { table: addresses.table.iter().map(|mac| mac.0).collect(), overflow: addresses.overflow }
    }
}

impl AddressesState {
    fn restore(&self) -> Result<Addresses, Misfit> {
        let len = self.table.len();
        check(len <= MAX_ADDRESSES, "number of addresses in a table", len as u64)?;
        Ok(Addresses { table: self.table.iter().copied().map(MacAddr).collect(), overflow: self.overflow })
    }
}

impl From<&RxFilter> for FilterState {
    fn from(filter: &RxFilter) -> Self {
        Self {
            mac: filter.mac.0,
            by_address: filter.by_address,
            by_vlan: filter.by_vlan,
            promiscuous: filter.promiscuous,
            all_multicast: filter.all_multicast,
            all_unicast: filter.all_unicast,
            no_multicast: filter.no_multicast,
            no_unicast: filter.no_unicast,
            no_broadcast: filter.no_broadcast,
            unicast: (&filter.unicast).into(),
            multicast: (&filter.multicast).into(),
            vlans: filter.vlans().collect(),
        }
    }
}

impl FilterState {
    fn restore(&self) -> Result<RxFilter, Misfit> {
        let mut filter = RxFilter::new(station(self.mac)?);
        filter.by_address = self.by_address;
        filter.by_vlan = self.by_vlan;
        filter.promiscuous = self.promiscuous;
        filter.all_multicast = self.all_multicast;
        filter.all_unicast = self.all_unicast;
        filter.no_multicast = self.no_multicast;
        filter.no_unicast = self.no_unicast;
        filter.no_broadcast = self.no_broadcast;
        filter.unicast = self.unicast.restore()?;
        filter.multicast = self.multicast.restore()?;
        for id in &self.vlans {
            check(filter.set_vlan(*id, true), "VLAN", *id)?;
        }
        Ok(filter)
    }
}

/// An address that a card can have.
fn station(mac: [u8; 6]) -> Result<MacAddr, Misfit> {
    let [a, b, c, d, e, f] = mac;
    let value = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
    check(MacAddr(mac).is_station(), "address", value)?;
    Ok(MacAddr(mac))
}

impl Net {
    pub(super) fn save_state(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        let shared = &self.shared;
        let saved = NetState {
            first_mac: lock(&shared.mac).0,
            link_up: shared.link.load(Ordering::Acquire),
            announce: shared.announce.load(Ordering::Acquire),
            active_pairs: shared.active_pairs.load(Ordering::Acquire),
            receive: shared.receive.load(Ordering::Acquire),
            fresh: self.fresh,
            filter: (&*shared.filter()).into(),
        };
        state.put(&saved).map_err(Error::state("save"))
    }

    pub(super) fn restore_state(
        &mut self,
        features: u64,
        state: &mut Restoring<'_>,
    ) -> freestone_bus::Result<()> {
        let saved = state.take().map_err(Error::state("restore"))?;
        self.set_state(feature::settled(features), &saved).map_err(|(what, value)| Error::BadState {
            device: state.instance().to_owned(),
            what,
            value,
        })
    }

    fn set_state(&mut self, features: u64, saved: &NetState) -> Result<(), Misfit> {
        let shared = &self.shared;
        let most = if features & feature::MQ != 0 { shared.config.pairs } else { 1 };
        let pairs = saved.active_pairs;
        check((1..=most).contains(&pairs), "number of active pairs of queues", pairs)?;
        let receive = Offloads::from_bits(saved.receive).ok_or(("offloads", saved.receive.into()))?;
        let possible = shared.info.receive & feature::receive(features);
        check(
            possible.contains(receive),
            "offloads that the port or the features do not have",
            saved.receive,
        )?;
        let filter = saved.filter.restore()?;
        let first_mac = station(saved.first_mac)?;
        // A card whose address nobody chose keeps that of the saved one, and else shows the chosen one after a reset. Until then
        // its driver goes by the address that it knows.
        if shared.config.mac.or(shared.info.mac).is_none() {
            *lock(&shared.mac) = first_mac;
        }
        shared.link.store(saved.link_up, Ordering::Release);
        shared.active_pairs.store(pairs, Ordering::Release);
        shared.receive.store(receive.bits(), Ordering::Release);
        shared.change_filter(|current| *current = filter);
        self.fresh = saved.fresh;
        shared.announce.store(saved.announce, Ordering::Release);
        self.moved = features & feature::GUEST_ANNOUNCE != 0 && !saved.fresh;
        Ok(())
    }
}

/// Asks the driver of a restored card to announce itself: the machine may be elsewhere now, and the switches on the way are to learn
/// that (5.1.6.5.4). It does so once, when the card works again: until then it is as it was.
#[derive(Debug)]
pub(super) struct Announce(pub(super) Option<Arc<Shared>>);

impl Announce {
    fn ask(&mut self) {
        if let Some(shared) = self.0.take() {
            NetHandle(shared).announce();
        }
    }
}

impl Work for Announce {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn process(&mut self) -> Progress {
        self.ask();
        Progress::Idle
    }
}

impl Worker for Announce {
    fn into_queues(mut self: Box<Self>) -> Vec<ActiveQueue> {
        // It may be stopped before its first step.
        self.ask();
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use freestone_memory::GuestMem;
    use freestone_net::{Endpoint, Port, PortInfo, PortStats, Setup};
    use proptest::prelude::*;

    use super::*;
    use crate::device::{Resources, VirtioDevice};
    use crate::net::NetConfig;
    use crate::state_tests::{body, file, golden, restore, restore_body, save};
    use crate::{DeviceControl, features};

    const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
    const OTHER: MacAddr = MacAddr([0x52, 0x54, 0, 9, 9, 9]);
    const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 0, 0, 1]);

    /// A port that writes down what is asked of it.
    #[derive(Debug, Clone)]
    struct Wall {
        info: PortInfo,
        setups: Arc<Mutex<Vec<Setup>>>,
        active: Arc<Mutex<Vec<u16>>>,
    }

    impl Wall {
        fn new() -> Self {
            let (transmit, receive) = (Offloads::all(), Offloads::all());
            let info = PortInfo { max_pairs: 4, transmit, receive, mtu: None, mac: None };
            Self { info, setups: Arc::default(), active: Arc::default() }
        }
    }

    impl Port for Wall {
        fn info(&self) -> PortInfo {
            self.info
        }

        fn open(&mut self, setup: &Setup) -> freestone_net::Result<Vec<Box<dyn Endpoint>>> {
            self.setups.lock().unwrap().push(*setup);
            Ok(Vec::new())
        }

        fn set_active_pairs(&mut self, pairs: u16) -> freestone_net::Result<()> {
            self.active.lock().unwrap().push(pairs);
            Ok(())
        }

        fn stats(&self) -> Arc<PortStats> {
            Arc::default()
        }
    }

    fn config() -> NetConfig {
        NetConfig::new().pairs(4)
    }

    /// A card with two pairs whose driver has said a lot.
    fn driven() -> Net {
        let mut net = Net::new(Wall::new(), config().mac(MAC)).unwrap();
        net.settle(all(&net));
        let shared = &net.shared;
        shared.change_filter(|filter| {
            filter.mac = OTHER;
            filter.all_multicast = true;
            filter.no_broadcast = true;
            filter.unicast = Addresses { table: vec![MAC], overflow: false };
            filter.multicast = Addresses { table: vec![GROUP; MAX_ADDRESSES], overflow: true };
            filter.set_vlan(4095, true);
        });
        shared.active_pairs.store(3, Ordering::Release);
        shared.receive.store((Offloads::CSUM | Offloads::TSO4).bits(), Ordering::Release);
        shared.link.store(false, Ordering::Release);
        net
    }

    fn all(net: &Net) -> u64 {
        net.info.features | features::VERSION_1
    }

    fn start(net: &mut Net, features: u64) {
        let control = DeviceControl::detached("net");
        let mem = GuestMem::anonymous(4096).unwrap();
        let workers = net.start(Resources { mem, features, queues: Vec::new(), control }).unwrap();
        for mut worker in workers {
            while worker.process() == Progress::More {}
        }
    }

    #[test]
    fn what_the_driver_said_is_restored_and_the_port_hears_it_when_the_card_goes_on() {
        let saved = driven();
        let wall = Wall::new();
        let mut net = Net::new(wall.clone(), config().mac(MAC)).unwrap();
        let features = all(&net);
        restore(&mut net, features, &save(&saved)).unwrap();
        let (was, is) = (saved.handle(), net.handle());
        assert_eq!((is.filter(), is.active_pairs(), is.link()), (was.filter(), 3, false));
        start(&mut net, features);
        let setup = *wall.setups.lock().unwrap().last().unwrap();
        assert_eq!((setup.pairs, setup.receive), (4, Offloads::CSUM | Offloads::TSO4));
        assert_eq!(*wall.active.lock().unwrap(), [3]);
    }

    #[test]
    fn the_driver_is_asked_once_to_announce_itself_if_it_can() {
        let state = save(&driven());
        for (features, asked) in [(u64::MAX, true), (!feature::GUEST_ANNOUNCE, false)] {
            let mut net = Net::new(Wall::new(), config()).unwrap();
            let features = all(&net) & features;
            restore(&mut net, features, &state).unwrap();
            assert!(!net.handle().announcing() && file(&save(&net)) == file(&state), "it is as it was");
            start(&mut net, features);
            assert_eq!(net.handle().announcing(), asked);
            net.shared.announce.store(false, Ordering::Release);
            start(&mut net, features);
            assert!(!net.handle().announcing(), "a pause later it need not");
        }
    }

    #[test]
    fn an_address_that_nobody_chose_is_that_of_the_saved_card_for_good() {
        let state = save(&driven());
        let mut net = Net::new(Wall::new(), config()).unwrap();
        let features = all(&net);
        restore(&mut net, features, &state).unwrap();
        assert_eq!(net.handle().mac(), OTHER);
        net.reset();
        assert_eq!(net.handle().mac(), MAC);
    }

    #[test]
    fn a_chosen_address_is_shown_after_a_reset() {
        let mut net = Net::new(Wall::new(), config().mac(MacAddr([2, 0, 0, 0, 0, 7]))).unwrap();
        let features = all(&net);
        restore(&mut net, features, &save(&driven())).unwrap();
        assert_eq!(net.handle().mac(), OTHER, "its driver goes by the address that it knows");
        net.reset();
        assert_eq!(net.handle().mac(), MacAddr([2, 0, 0, 0, 0, 7]));
    }

    #[test]
    fn a_card_without_a_driver_is_restored_as_one() {
        let saved = Net::new(Wall::new(), config().mac(MAC)).unwrap();
        let mut net = Net::new(Wall::new(), config()).unwrap();
        restore(&mut net, 0, &save(&saved)).unwrap();
        assert!(net.fresh && !net.handle().announcing());
        let features = all(&net);
        start(&mut net, features);
        assert_eq!(net.shared.receive(), Offloads::all(), "the next driver's features count");
    }

    #[test]
    fn the_golden_state_reads_as_ever() {
        let features = all(&driven());
        let saved = driven();
        saved.shared.announce.store(true, Ordering::Release);
        golden("virtio-net-1", &saved, &mut Net::new(Wall::new(), config()).unwrap(), features);
    }

    #[test]
    fn what_does_not_fit_this_card_or_its_port_is_refused() {
        let state = save(&driven());
        let refused = |port: Wall, config: NetConfig, without: u64| {
            let mut net = Net::new(port, config).unwrap();
            let features = all(&net) & !without;
            restore(&mut net, features, &state).unwrap_err().to_string()
        };
        let prefix = "the saved state of device it does not fit: ";
        let message = |text: &str| format!("{prefix}{text}");
        assert_eq!(
            refused(Wall::new(), NetConfig::new().pairs(2), 0),
            message("number of active pairs of queues 0x3")
        );
        assert_eq!(
            refused(Wall::new(), config(), feature::MQ),
            message("number of active pairs of queues 0x3")
        );
        let mut poor = Wall::new();
        poor.info.receive = Offloads::CSUM;
        assert!(refused(poor, config(), 0).starts_with(&message("offloads")));
        assert!(refused(Wall::new(), config(), feature::GUEST_CSUM).starts_with(&message("offloads")));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_state_is_refused_or_gives_a_card_that_works(
            changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..4),
            cut in any::<Option<prop::sample::Index>>(),
            features in any::<u64>(),
        ) {
            let mut body = body(&driven());
            for (at, value) in changes {
                let at = at.index(body.len());
                body[at] = value;
            }
            if let Some(cut) = cut {
                body.truncate(cut.index(body.len()));
            }
            let mut net = Net::new(Wall::new(), config()).unwrap();
            let features = all(&net) & features;
            if restore_body(&mut net, features, "virtio-net", &body).is_ok() {
                start(&mut net, features);
                let filter = net.handle().filter();
                prop_assert!(filter.unicast.table.len() <= MAX_ADDRESSES);
                prop_assert!(filter.mac.is_station());
                net.reset();
            }
        }
    }
}
