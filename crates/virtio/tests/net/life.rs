//! The port's life: opened, paused, reset, and opened again.

use freestone_net::{MacAddr, Offloads, Setup};
use freestone_virtio::net::{NetConfig, feature};
use freestone_virtio::{Error, Net};

use crate::support::{MAC, Machine, RINGS, TestPort, config, frame, plain};

/// Endpoints that are open, and resets that the port was told of.
fn life(machine: &Machine) -> (usize, usize) {
    let wire = machine.wire();
    (wire.open, wire.resets)
}

#[test]
fn a_port_is_open_while_a_driver_has_the_card_and_forgets_when_it_resets_it() {
    let wanted = feature::MQ | feature::CTRL_VQ | feature::GUEST_CSUM;
    let mut machine = Machine::new(TestPort::new(), config().pairs(2));
    assert_eq!(machine.wire().open, 0);
    machine.start(wanted);
    assert_eq!(machine.wire().open, 2);
    assert_eq!(machine.wire().setups, [Setup { pairs: 2, receive: Offloads::CSUM }]);
    machine.device.pause().unwrap();
    assert_eq!(life(&machine), (0, 1), "the driver's own reset alone");
    machine.device.resume().unwrap();
    assert_eq!(life(&machine), (2, 1));
    machine.driver.reset().unwrap();
    assert_eq!(life(&machine), (0, 2));
    machine.start(0);
    assert_eq!(*machine.wire().setups.last().unwrap(), Setup { pairs: 1, receive: Offloads::empty() });
}

#[test]
fn frames_in_flight_survive_a_pause() {
    for ring in RINGS {
        let mut machine = Machine::started(config(), ring | feature::MRG_RXBUF);
        machine.wire().room = Some(1);
        for n in 0..3 {
            machine.offer(1, &plain(frame(MAC, 60, n)));
        }
        machine.kick(1);
        machine.fill(2, 1000);
        machine.arrive(plain(frame(MAC, 2500, 7)));
        machine.device.pause().unwrap();
        machine.wire().room = None;
        machine.post(0, 2, 1000);
        machine.queues.first_mut().unwrap().publish().unwrap();
        machine.run();
        assert_eq!((machine.sent().len(), machine.received().len()), (1, 0), "nothing moves in a pause");
        machine.device.resume().unwrap();
        machine.run();
        assert_eq!(machine.sent(), [plain(frame(MAC, 60, 1)), plain(frame(MAC, 60, 2))]);
        assert_eq!(machine.frames(), [frame(MAC, 2500, 7)]);
    }
}

#[test]
fn what_the_driver_said_survives_a_pause_and_not_a_reset() {
    let wanted = feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_VLAN | feature::MQ | feature::STATUS;
    let mut machine = Machine::started(config().pairs(2), wanted | feature::GUEST_ANNOUNCE);
    let fresh = machine.handle.filter();
    assert!(machine.command(0, 0, &[1]) && machine.command(2, 0, &[9, 0]) && machine.command(4, 0, &[2, 0]));
    assert!(machine.handle.announce());
    let said = machine.handle.filter();
    assert!(said.promiscuous && said.vlans().eq([9]));
    machine.device.pause().unwrap();
    machine.device.resume().unwrap();
    assert_eq!((machine.handle.filter(), machine.handle.active_pairs()), (said, 2));
    assert!(machine.handle.announcing());
    machine.start(wanted);
    assert_eq!((machine.handle.filter(), machine.handle.active_pairs()), (fresh, 1));
    assert!(!machine.handle.announcing());
}

#[test]
fn the_link_stays_as_the_host_set_it() {
    let mut machine = Machine::started(config(), feature::STATUS);
    machine.handle.set_link(false);
    machine.start(feature::STATUS);
    assert!(!machine.handle.link());
    machine.send(&plain(frame(MAC, 60, 1)));
    assert!(machine.sent().is_empty());
}

#[test]
fn an_impossible_configuration_is_refused() {
    let mut port = TestPort::new();
    port.info.mtu = Some(1500);
    let info = port.info;
    let group = MacAddr([1, 0, 0x5e, 0, 0, 1]);
    let bad: [NetConfig; 9] = [
        config().pairs(0),
        config().pairs(5),
        config().queue_size(2),
        config().queue_size(100),
        config().queue_size(0),
        config().mac(group),
        config().mac(MacAddr::default()),
        config().mtu(67),
        config().mtu(1501),
    ];
    for config in bad {
        let mut port = TestPort::new();
        port.info = info;
        let refused = Net::new(port, config.clone()).unwrap_err();
        assert!(matches!(refused, Error::Config { .. }), "{config:?}");
    }
    let mut port = TestPort::new();
    port.info = info;
    Net::new(port, config().pairs(4).mtu(1500).queue_size(32768)).unwrap();
}
