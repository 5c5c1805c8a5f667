//! States that nobody saved: refused, or a device that works somehow, but never a panic.

use super::*;

/// A device, the section of its state, and the ports to poke at.
type Case = (fn() -> Plugged, &'static str, std::ops::Range<u16>);

const CASES: [Case; 9] = [
    (|| Plugged::new(SerialPlug::com1(Screen::default(), None)), "serial", COM1_PORT..COM1_PORT + 8),
    (|| Plugged::new(I8042Plug::new()), "i8042", I8042_PORT..I8042_PORT + 5),
    (|| Plugged::new(RtcPlug::new()), "rtc", RTC_PORT..RTC_PORT + 2),
    (|| Plugged::new(PowerPlug::new()), "power", SLEEP_CONTROL_PORT..RESET_PORT + 1),
    (|| Plugged::new(ProgressPlug::new()), "progress", PROGRESS_PORT..PROGRESS_PORT + 1),
    (|| Plugged::new(PciRootPlug::new()), "pci-config", PCI_CONFIG_PORT + 4..PCI_CONFIG_PORT + 8),
    (|| Plugged::new(I8042Plug::new().keyboard()), "i8042", I8042_PORT..I8042_PORT + 5),
    (|| Plugged::new(VmGenIdPlug::new()), "vmgenid", 0..0),
    (|| Plugged::new(PowerButtonPlug::new()), "power-button", 0..0),
];

fn with_body(section: &str, body: &[u8]) -> Sections {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    let mut section = writer.section(format!("{section}/{NAME}"), 1, false).unwrap();
    section.write_all(body).unwrap();
    section.finish().unwrap();
    load(&writer.finish().unwrap())
}

fn body(device: &mut dyn Device) -> Vec<u8> {
    let file = file(&save(device));
    let mut reader = Reader::new(file.as_slice(), Limits::default()).unwrap();
    reader.next_section().unwrap().unwrap().read_body().unwrap()
}

/// Restores `body`, and if that works has the device do something.
fn survive(case: usize, body: &[u8]) {
    let (make, section, ports) = &CASES[case];
    let mut it = make();
    if it.device.restore(&mut with_body(section, body).of(NAME)).is_ok() {
        it.device.resume().unwrap();
        for round in 0..3_u8 {
            for port in ports.clone() {
                it.bench.inb(port);
                it.bench.outb(port, round.wrapping_mul(0x55));
            }
        }
        it.device.pause().unwrap();
        save(&mut *it.device);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_as_a_state_are_survived(case in 0..CASES.len(), body in prop::collection::vec(any::<u8>(), 0..300)) {
        survive(case, &body);
    }

    #[test]
    fn a_changed_state_is_survived(case in 0..CASES.len(), changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..5)) {
        let mut body = body(&mut *CASES[case].0().device);
        for (at, value) in changes {
            let at = at.index(body.len());
            body[at] = value;
        }
        survive(case, &body);
    }
}

#[test]
fn a_state_that_is_cut_or_has_more_behind_it_is_refused() {
    for (case, (make, section, _)) in CASES.iter().enumerate() {
        let mut body = body(&mut *make().device);
        for len in 0..body.len() {
            let refused = make().device.restore(&mut with_body(section, &body[..len]).of(NAME));
            assert!(refused.is_err(), "{section} of {len} bytes");
        }
        body.push(0);
        assert!(make().device.restore(&mut with_body(section, &body).of(NAME)).is_err(), "{section}");
        survive(case, &body);
    }
}

#[test]
fn a_device_whose_state_is_missing_is_not_restored() {
    for (make, section, _) in &CASES {
        let refused = make().device.restore(&mut State::new().into_sections(header()).of(NAME));
        assert!(refused.is_err(), "{section}");
    }
}

#[test]
fn registers_that_cannot_be_are_refused_by_name() {
    let message = |case: usize, body: &[u8]| {
        let (make, section, _) = &CASES[case];
        make().device.restore(&mut with_body(section, body).of(NAME)).unwrap_err().to_string()
    };
    assert_eq!(
        message(3, &[0xff]),
        "the saved state of device power does not fit: sleep control register 0xff"
    );
    assert_eq!(
        message(5, &[0x83, 0x80, 0x80, 0x80, 0x08]),
        "the saved state of device PCI root does not fit: address port 0x80000003"
    );
}
