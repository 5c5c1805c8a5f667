//! Which VLANs a frame gets to, and with which tags.

use super::*;

/// An access port, and trunks with and without a native VLAN.
fn vlans() -> [Vlan; 5] {
    let allowed = |text: &str| text.parse::<VlanSet>().unwrap();
    [
        Vlan::Access(10),
        Vlan::Access(20),
        Vlan::Trunk { allowed: allowed("10,20"), native: None },
        Vlan::Trunk { allowed: allowed("10"), native: Some(20) },
        Vlan::Trunk { allowed: allowed("30"), native: Some(1) },
    ]
}

/// Who gets a frame with `tags` that comes in by port `from`, and the tags it has there.
fn spread(from: usize, tags: &[(u16, u16)]) -> BTreeMap<usize, Vec<(u16, u16)>> {
    let switch = Switch::default();
    let mut ports: Vec<_> = vlans()
        .into_iter()
        .map(|vlan| Machine::at(&switch, PortOptions { vlan, ..PortOptions::default() }))
        .collect();
    ports[from].send(&tagged(MacAddr::BROADCAST, mac(1), tags, b"x"));
    let mut got = BTreeMap::new();
    for (n, port) in ports.iter_mut().enumerate() {
        for bytes in port.all() {
            let mut tags = Vec::new();
            let mut at = 12;
            let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
            while vlan::is_tag(word(at)) {
                tags.push((word(at), word(at + 2)));
                at += 4;
            }
            assert_eq!(&bytes[at..at + 3], [0x88, 0xB5, b'x']);
            assert!(got.insert(n, tags).is_none());
        }
    }
    got
}

#[test]
fn frames_stay_in_their_vlan_and_are_tagged_as_each_port_wants_it() {
    let c = 0x8100;
    assert_eq!(spread(0, &[]), BTreeMap::from([(2, vec![(c, 10)]), (3, vec![(c, 10)])]));
    assert_eq!(spread(1, &[]), BTreeMap::from([(2, vec![(c, 20)]), (3, vec![])]));
    assert_eq!(spread(2, &[(c, 10)]), BTreeMap::from([(0, vec![]), (3, vec![(c, 10)])]));
    assert_eq!(spread(2, &[(c, 20)]), BTreeMap::from([(1, vec![]), (3, vec![])]));
    assert_eq!(spread(3, &[]), BTreeMap::from([(1, vec![]), (2, vec![(c, 20)])]));
    assert_eq!(spread(3, &[(c, 20)]), BTreeMap::from([(1, vec![]), (2, vec![(c, 20)])]));
    assert_eq!(spread(4, &[(c, 30)]), BTreeMap::new());
    for (from, vid) in [(2, 30), (2, 1), (2, 4095), (3, 1), (4, 10)] {
        assert_eq!(spread(from, &[(c, vid)]), BTreeMap::new(), "{from} {vid}");
    }
    assert_eq!(spread(2, &[]), BTreeMap::new());
}

#[test]
fn a_priority_tag_is_no_vlan_and_its_priority_is_kept_where_there_is_a_tag() {
    let c = 0x8100;
    assert_eq!(spread(0, &[(c, 0xE000)]), BTreeMap::from([(2, vec![(c, 0xE00A)]), (3, vec![(c, 0xE00A)])]));
    assert_eq!(spread(2, &[(c, 0xA014)]), BTreeMap::from([(1, vec![]), (3, vec![])]));
}

#[test]
fn an_access_port_sends_no_tags_not_even_of_its_own_vlan() {
    for tags in [&[(0x8100, 10)][..], &[(0x8100, 20)], &[(0x88A8, 10)], &[(0x8100, 10), (0x8100, 20)]] {
        assert_eq!(spread(0, tags), BTreeMap::new());
    }
}

#[test]
fn an_inner_tag_never_becomes_the_outer_one() {
    let c = 0x8100;
    // Through trunks it goes as it is, but not where the outer one would be taken off.
    assert_eq!(spread(2, &[(c, 10), (c, 20)]), BTreeMap::from([(3, vec![(c, 10), (c, 20)])]));
    assert_eq!(spread(2, &[(0x88A8, 10), (c, 20)]), BTreeMap::from([(3, vec![(0x88A8, 10), (c, 20)])]));
    assert_eq!(spread(2, &[(c, 20), (c, 10)]), BTreeMap::new());
    assert_eq!(spread(3, &[(c, 0), (c, 10)]), BTreeMap::from([(2, vec![(c, 20), (c, 10)])]));
    // From an access port with a priority tag around it: it arrives inside the tag of the port's own VLAN.
    assert_eq!(
        spread(0, &[(c, 0), (c, 20)]),
        BTreeMap::from([(2, vec![(c, 10), (c, 20)]), (3, vec![(c, 10), (c, 20)])])
    );
}

#[test]
fn the_same_address_in_two_vlans_is_two() {
    let switch = Switch::default();
    let at = |vlan| Machine::at(&switch, PortOptions { vlan: Vlan::Access(vlan), ..PortOptions::default() });
    let [mut a, mut b, mut c, mut d] = [at(10), at(20), at(10), at(20)];
    a.send(&frame(mac(9), mac(1), b""));
    b.send(&frame(mac(9), mac(1), b""));
    c.all();
    d.all();
    c.send(&frame(mac(1), mac(3), b"c"));
    d.send(&frame(mac(1), mac(4), b"d"));
    assert_eq!(a.all(), [frame(mac(1), mac(3), b"c")]);
    assert_eq!(b.all(), [frame(mac(1), mac(4), b"d")]);
}
