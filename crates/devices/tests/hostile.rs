//! Every port of every device, every width, every order of accesses: the device stays on its feet.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
#![expect(dead_code, reason = "the bench serves several tests")]

mod bench;

use std::io;

use bench::Bench;
use freestone_bus::Device;
use freestone_devices::*;
use proptest::prelude::*;

fn everything(bench: &mut Bench) -> Vec<Box<dyn Device>> {
    vec![
        bench.plug(I8042Plug::new()),
        bench.plug(RtcPlug::new()),
        bench.plug(ProgressPlug::new()),
        bench.plug(DebugPlug::new(io::sink())),
        bench.plug(SerialPlug::com1(io::sink(), None)),
        bench.plug(PvPanicPlug::new()),
        bench.plug(PowerPlug::new()),
    ]
}

const WIDTHS: [usize; 10] = [0, 1, 2, 3, 4, 5, 7, 8, 9, 64];

#[test]
fn every_port_and_width_survives_every_pattern() {
    let mut bench = Bench::new();
    let _devices = everything(&mut bench);
    let mut view = bench.pio.view();
    for (first, last) in bench.pio.ranges() {
        for port in first..=last {
            for width in WIDTHS {
                for pattern in [0x00, 0xff, 0x55, 0xaa, 0x80, 0x01, 0xfe] {
                    let inside = width as u64 <= last - port + 1;
                    let mut data = vec![pattern; width];
                    assert_eq!(view.write(port, &data).is_ok(), inside, "write of {width} at {port:#x}");
                    assert_eq!(view.read(port, &mut data).is_ok(), inside, "read of {width} at {port:#x}");
                    assert!(inside || data.iter().all(|b| *b == 0xff), "a refused read gives all ones");
                }
            }
        }
    }
}

#[test]
fn devices_refuse_what_a_careless_bus_would_let_through() {
    let mut bench = Bench::new();
    let _devices = everything(&mut bench);
    for (first, _) in bench.pio.ranges() {
        let device = bench.pio.remove(first).unwrap();
        for offset in [8, 0x7f, 0xff, 0x100, u64::from(u32::MAX), u64::MAX] {
            let mut data = [0xff; 8];
            assert!(device.read(offset, &mut data).is_err());
            assert!(device.write(offset, &data).is_err());
        }
        let mut long = [0xff; 300];
        assert!(device.read(0, &mut long).is_err());
        assert!(device.write(0, &long).is_err());
    }
}

#[test]
fn every_clock_register_survives_every_value_in_every_format() {
    let mut bench = Bench::new();
    let _rtc = bench.plug(RtcPlug::new());
    for format in [0x00, 0x02, 0x04, 0x06, 0x80, 0x82, 0x84, 0x86] {
        for index in 0..=0xff {
            for value in 0..=0xff {
                bench.outb(0x70, 0x0b);
                bench.outb(0x71, format);
                bench.outb(0x70, index);
                bench.outb(0x71, value);
                bench.inb(0x71);
            }
        }
    }
    bench.outb(0x70, 0x0d);
    assert_eq!(bench.inb(0x71), 0x80);
}

proptest! {
    #[test]
    fn any_run_of_accesses_is_survived(
        accesses in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..9)), 0..200)
    ) {
        let mut bench = Bench::new();
        let mut devices = everything(&mut bench);
        let ports: Vec<u64> = bench.pio.ranges().into_iter().flat_map(|(a, b)| a..=b).collect();
        let mut view = bench.pio.view();
        for (port, write, mut data) in accesses {
            let port = *port.get(&ports);
            // Refusals are fine: what is tested is that nothing panics and the devices can be used afterwards.
            let _ = if write { view.write(port, &data) } else { view.read(port, &mut data) };
            bench.manual.run(4);
        }
        for device in &mut devices {
            device.pause().unwrap();
            device.resume().unwrap();
            device.shutdown().unwrap();
        }
        prop_assert_eq!(bench.inb(0x505), 3);
    }
}
