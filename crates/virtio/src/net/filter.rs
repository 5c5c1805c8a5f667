//! [`RxFilter`]: which frames a driver wants (5.1.6.5.1 to 5.1.6.5.3).

use freestone_net::MacAddr;

/// Most addresses of each kind that are remembered; with more, all of that kind are taken.
pub const MAX_ADDRESSES: usize = 64;
/// The type of a frame with a VLAN tag (802.1Q).
const VLAN_TAG: [u8; 2] = [0x81, 0x00];
/// Bytes of a frame that decide: the Ethernet header and a tag.
pub(super) const DECIDES: usize = 18;

/// Which frames a driver wants: what it said by the commands of the control queue.
///
/// A driver without `VIRTIO_NET_F_CTRL_RX` gets the frames of all addresses, one without `VIRTIO_NET_F_CTRL_VLAN` those of all
/// VLANs. Promiscuous mode lets everything through. "No multicast" counts more than "all multicast", and so with unicast.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RxFilter {
    /// The card's address.
    pub mac: MacAddr,
    /// The driver filters by address.
    pub by_address: bool,
    /// The driver filters by VLAN.
    pub by_vlan: bool,
    /// Every frame.
    pub promiscuous: bool,
    /// Frames to any group.
    pub all_multicast: bool,
    /// Frames to any station.
    pub all_unicast: bool,
    /// No frames to groups.
    pub no_multicast: bool,
    /// No frames to stations.
    pub no_unicast: bool,
    /// No frames to everybody.
    pub no_broadcast: bool,
    /// Stations besides the card itself.
    pub unicast: Addresses,
    /// Groups.
    pub multicast: Addresses,
    /// A bit for each VLAN.
    vlans: [u64; 64],
}

/// Addresses of one kind in a [`RxFilter`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Addresses {
    /// The addresses, at most [`MAX_ADDRESSES`].
    pub table: Vec<MacAddr>,
    /// There are more than are remembered: all of the kind are taken.
    pub overflow: bool,
}

impl Addresses {
    fn contain(&self, mac: MacAddr) -> bool {
        self.overflow || self.table.contains(&mac)
    }
}

impl RxFilter {
    /// The filter of a card that was just reset.
    pub(super) fn new(mac: MacAddr) -> Self {
        Self {
            mac,
            by_address: false,
            by_vlan: false,
            promiscuous: false,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: [0; 64],
        }
    }

    /// The VLANs that the driver wants, in order.
    pub fn vlans(&self) -> impl Iterator<Item = u16> + '_ {
        (0..4096).filter(|id| self.has_vlan(*id))
    }

    fn has_vlan(&self, id: u16) -> bool {
        self.vlans.get(usize::from(id / 64)).is_some_and(|bits| bits >> (id % 64) & 1 != 0)
    }

    /// Adds or removes a VLAN; whether there is one of this number.
    pub(super) fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let Some(bits) = self.vlans.get_mut(usize::from(id / 64)) else { return false };
        let bit = 1 << (id % 64);
        *bits = if wanted { *bits | bit } else { *bits & !bit };
        true
    }

    /// Whether every frame passes, whatever is in it.
    pub(super) fn passes_all(&self) -> bool {
        self.promiscuous || !self.by_address && !self.by_vlan
    }

    /// Whether a frame that begins with `start` is wanted. Of a frame that is shorter, the rest is zero.
    pub(super) fn accepts(&self, start: &[u8; DECIDES]) -> bool {
        self.passes_all() || self.accepts_vlan(start) && self.accepts_address(start)
    }

    /// Frames without a tag, and those whose tag says a priority alone, are of no VLAN. Of several tags the first counts.
    fn accepts_vlan(&self, start: &[u8; DECIDES]) -> bool {
        let [.., t0, t1, v0, v1, _, _] = start;
        let id = u16::from_be_bytes([*v0, *v1]) & 0xfff;
        !self.by_vlan || [*t0, *t1] != VLAN_TAG || id == 0 || self.has_vlan(id)
    }

    fn accepts_address(&self, start: &[u8; DECIDES]) -> bool {
        let [a, b, c, d, e, f, ..] = *start;
        let to = MacAddr([a, b, c, d, e, f]);
        if !self.by_address {
            return true;
        }
        if to.is_broadcast() {
            !self.no_broadcast
        } else if to.is_multicast() {
            !self.no_multicast && (self.all_multicast || self.multicast.contain(to))
        } else {
            !self.no_unicast && (to == self.mac || self.all_unicast || self.unicast.contain(to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
    const OTHER: MacAddr = MacAddr([0x52, 0x54, 0, 9, 9, 9]);
    const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 0, 0, 1]);

    fn filter() -> RxFilter {
        RxFilter { by_address: true, by_vlan: true, ..RxFilter::new(MAC) }
    }

    fn to(mac: MacAddr) -> [u8; DECIDES] {
        let mut start = [0; DECIDES];
        start[..6].copy_from_slice(&mac.0);
        start[12..14].copy_from_slice(&[8, 0]);
        start
    }

    fn tagged(id: u16) -> [u8; DECIDES] {
        let mut start = to(MAC);
        start[12..14].copy_from_slice(&VLAN_TAG);
        start[14..16].copy_from_slice(&id.to_be_bytes());
        start
    }

    /// Whether frames to the card, another station, a group and everybody are accepted.
    fn accepted(filter: &RxFilter) -> [bool; 4] {
        [MAC, OTHER, GROUP, MacAddr::BROADCAST].map(|mac| filter.accepts(&to(mac)))
    }

    #[test]
    fn before_any_command_a_card_takes_what_is_for_it_and_for_everybody() {
        assert_eq!(accepted(&filter()), [true, false, false, true]);
    }

    #[test]
    fn a_driver_that_cannot_filter_gets_everything() {
        let filter = RxFilter::new(MAC);
        assert_eq!(accepted(&filter), [true; 4]);
        assert!(filter.accepts(&tagged(5)));
    }

    #[test]
    fn each_mode_lets_its_kind_through_or_not() {
        let base = filter();
        assert_eq!(accepted(&RxFilter { promiscuous: true, ..base.clone() }), [true; 4]);
        assert_eq!(accepted(&RxFilter { all_multicast: true, ..base.clone() }), [true, false, true, true]);
        assert_eq!(accepted(&RxFilter { all_unicast: true, ..base.clone() }), [true, true, false, true]);
        assert_eq!(accepted(&RxFilter { no_broadcast: true, ..base.clone() }), [true, false, false, false]);
        let none =
            RxFilter { no_multicast: true, all_multicast: true, no_unicast: true, all_unicast: true, ..base };
        assert_eq!(accepted(&none), [false, false, false, true]);
    }

    #[test]
    fn addresses_in_the_tables_are_wanted_and_too_many_mean_all() {
        let table = |mac, overflow| Addresses { table: vec![mac], overflow };
        let base = filter();
        let some = RxFilter { unicast: table(OTHER, false), multicast: table(GROUP, false), ..base.clone() };
        assert_eq!(accepted(&some), [true; 4]);
        let many = RxFilter { unicast: table(MAC, true), multicast: table(MacAddr([3; 6]), true), ..base };
        assert_eq!(accepted(&many), [true; 4]);
    }

    #[test]
    fn of_tagged_frames_only_those_of_wanted_vlans_pass() {
        let mut filter = filter();
        assert!(!filter.accepts(&tagged(5)) && filter.accepts(&tagged(0xe000)));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        assert!(filter.accepts(&tagged(5)) && filter.accepts(&tagged(0x6005)) && !filter.accepts(&tagged(6)));
        assert_eq!(filter.vlans().collect::<Vec<_>>(), [5, 4095]);
        assert!(filter.set_vlan(5, false) && !filter.accepts(&tagged(5)));
        filter.promiscuous = true;
        assert!(filter.accepts(&tagged(6)));
    }
}
