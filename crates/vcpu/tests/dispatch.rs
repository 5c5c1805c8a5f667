//! From an exit to the device and back.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};

use freestone_bus::{Access, AccessError, Bus, IoDeviceMut};
use freestone_hypervisor::{Hypervisor, InstructionBytes, SystemEvent, Vcpu, Vm};
use freestone_testkit::{Op, Probe, Record, Script, ScriptedHypervisor, ScriptedVcpu};
use freestone_vcpu::{Dispatcher, Error, Step, StopReason};

/// Keeps what is written, and answers reads with a number that grows; has no register at 3 and takes no 8-byte access.
#[derive(Default)]
struct Device {
    writes: Vec<(u64, Vec<u8>)>,
    reads: u8,
}

impl IoDeviceMut for Device {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        match (offset, data.len()) {
            (3, _) => Err(AccessError::NoRegister),
            (_, 8) => Err(AccessError::Width),
            _ => {
                self.reads += 1;
                data.fill(self.reads);
                Ok(())
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        self.writes.push((offset, data.to_vec()));
        Ok(())
    }
}

const PORT: u16 = 0x100;
const GPA: u64 = 0xd000_0000;

struct Bench {
    vcpu: ScriptedVcpu,
    dispatcher: Dispatcher,
    pio: Arc<Mutex<Device>>,
    mmio: Arc<Mutex<Device>>,
    probe: Probe,
}

impl Bench {
    fn new(script: Script) -> Self {
        let (pio, mmio) = (Arc::<Mutex<Device>>::default(), Arc::<Mutex<Device>>::default());
        let (pio_bus, mmio_bus) = (Bus::new(), Bus::new());
        pio_bus.insert(PORT.into(), 0x10, pio.clone()).unwrap();
        mmio_bus.insert(GPA, 0x1000, mmio.clone()).unwrap();
        let hypervisor = ScriptedHypervisor::new(script);
        let vcpu = hypervisor.create_vm().unwrap().create_vcpu(0).unwrap();
        let dispatcher = Dispatcher::new(pio_bus.view(), mmio_bus.view());
        Self { vcpu, dispatcher, pio, mmio, probe: hypervisor.probe() }
    }

    fn step(&mut self) -> Step {
        self.dispatcher.step(&mut self.vcpu).unwrap()
    }

    /// Steps until the guest does not go on.
    fn run(&mut self) -> Step {
        loop {
            match self.step() {
                Step::Continue => {}
                other => return other,
            }
        }
    }
}

#[test]
fn port_writes_and_reads_reach_the_device_at_the_port() {
    let script = Script::new().pio_write(PORT + 2, 2, &[1, 2]).expect_pio(PORT, 4, &[1; 4]).halt();
    let mut bench = Bench::new(script);
    assert_eq!(bench.run(), Step::Halted);
    assert_eq!(bench.pio.lock().unwrap().writes, [(2, vec![1, 2])]);
    assert!(bench.mmio.lock().unwrap().writes.is_empty());
}

#[test]
fn memory_mapped_writes_and_reads_reach_the_device_at_the_address() {
    let mut bench =
        Bench::new(Script::new().mmio_write32(GPA + 8, 0x0403_0201).expect_mmio(GPA + 4, &[1; 2]).halt());
    assert_eq!(bench.run(), Step::Halted);
    assert_eq!(bench.mmio.lock().unwrap().writes, [(8, vec![1, 2, 3, 4])]);
}

#[test]
fn string_writes_are_split_by_the_width_of_one_access_and_stay_on_their_port() {
    for (size, accesses) in [(1, 12), (2, 6), (4, 3)] {
        let data: Vec<u8> = (0..12).collect();
        let mut bench = Bench::new(Script::new().pio_write(PORT + 1, size, &data).halt());
        assert_eq!(bench.step(), Step::Continue);
        let writes = bench.pio.lock().unwrap().writes.clone();
        assert_eq!(writes.len(), accesses);
        assert!(writes.iter().all(|(offset, d)| *offset == 1 && d.len() == usize::from(size)));
        assert_eq!(writes.concat_data(), data);
    }
}

trait ConcatData {
    fn concat_data(&self) -> Vec<u8>;
}

impl ConcatData for Vec<(u64, Vec<u8>)> {
    fn concat_data(&self) -> Vec<u8> {
        self.iter().flat_map(|(_, d)| d.clone()).collect()
    }
}

#[test]
fn string_reads_are_split_by_the_width_of_one_access() {
    let script = Script::new().expect_pio(PORT, 1, &[1, 2, 3]).expect_pio(PORT, 2, &[4, 4, 5, 5]).halt();
    assert_eq!(Bench::new(script).run(), Step::Halted);
}

#[test]
fn reads_that_nothing_answers_are_all_ones_and_counted_by_reason() {
    let ones = [0xff; 4];
    let script = Script::new()
        .expect_pio(0x80, 4, &ones)
        .expect_mmio(GPA + 0x1000, &ones)
        .expect_pio(PORT + 3, 1, &ones[..1])
        .expect_mmio(GPA, &[0xff; 8])
        .mmio_write(0x10, &[0])
        .halt();
    let mut bench = Bench::new(script);
    assert_eq!(bench.run(), Step::Halted);
    let refused = bench.dispatcher.refused();
    assert_eq!((refused.unclaimed, refused.no_register, refused.width, refused.other), (3, 1, 1, 0));
    assert_eq!(refused.total(), 5);
}

#[test]
fn every_refused_access_of_a_string_instruction_is_counted() {
    let mut bench = Bench::new(Script::new().pio_read(0x80, 1, 7).halt());
    assert_eq!(bench.run(), Step::Halted);
    assert_eq!(bench.dispatcher.refused().unclaimed, 7);
}

#[test]
fn an_access_width_of_zero_does_not_hang_or_panic() {
    let mut bench = Bench::new(Script::new().pio_write(PORT, 0, &[1, 2]).pio_write(PORT, 0, &[]).halt());
    assert_eq!(bench.run(), Step::Halted);
}

#[test]
fn an_unknown_hypercall_returns_enosys_and_the_guest_goes_on() {
    let mut bench = Bench::new(Script::new().op(Op::Hypercall { number: 99, args: [0; 6] }).halt());
    assert_eq!(bench.run(), Step::Halted);
    let ret = (-1000i64).cast_unsigned();
    assert_eq!(bench.probe.records(0), [Record::Hypercall { number: 99, ret }]);
}

#[test]
fn an_end_of_interrupt_is_nobodys_business_and_the_guest_goes_on() {
    assert_eq!(Bench::new(Script::new().op(Op::IoapicEoi { vector: 33 })).step(), Step::Continue);
}

#[test]
fn a_signal_is_told_apart_from_a_halt() {
    let mut bench = Bench::new(Script::new().op(Op::Interrupted).halt());
    assert_eq!((bench.step(), bench.step()), (Step::Interrupted, Step::Halted));
}

#[test]
fn what_a_guest_cannot_go_on_after_stops_it_with_its_reason() {
    let instruction = InstructionBytes::new(&[0x0f, 0xc7]);
    let cases = [
        (Op::Shutdown, StopReason::Shutdown),
        (Op::SystemEvent(SystemEvent::Reset), StopReason::SystemEvent(SystemEvent::Reset)),
        (
            Op::InternalError { suberror: 1, instruction },
            StopReason::InternalError { suberror: 1, instruction },
        ),
        (
            Op::FailEntry { reason: 0x8000_0021, cpu: 3 },
            StopReason::FailEntry { reason: 0x8000_0021, cpu: 3 },
        ),
        (Op::Debug { pc: 0x1000, exception: 1 }, StopReason::Debug { pc: 0x1000, exception: 1 }),
        (Op::Unhandled { reason: 42 }, StopReason::Unhandled { reason: 42 }),
    ];
    for (op, reason) in cases {
        assert_eq!(Bench::new(Script::new().op(op)).step(), Step::Stop(reason));
    }
}

#[test]
fn reasons_read_as_sentences_with_their_values() {
    let instruction = InstructionBytes::new(&[0x0f, 0xc7]);
    let text = StopReason::InternalError { suberror: 1, instruction }.to_string();
    assert_eq!(
        text,
        "internal error 1 of the hypervisor (an instruction cannot be emulated) at instruction [0f c7]"
    );
    assert_eq!(StopReason::Shutdown.to_string(), "triple fault");
    let text = StopReason::FailEntry { reason: 0x21, cpu: 3 }.to_string();
    assert!(text.contains("0x21") && text.contains("CPU 3"));
}

#[test]
fn power_off_and_reset_are_no_crash_and_everything_else_is() {
    assert!(!StopReason::SystemEvent(SystemEvent::Shutdown).is_crash());
    assert!(!StopReason::SystemEvent(SystemEvent::Reset).is_crash());
    assert!(StopReason::SystemEvent(SystemEvent::Crash).is_crash());
    assert!(StopReason::Shutdown.is_crash());
    assert!(StopReason::Unhandled { reason: 1 }.is_crash());
}

#[test]
fn a_failing_hypervisor_is_an_error_and_not_a_stop() {
    let mut bench = Bench::new(Script::new().op(Op::Fail("KVM_RUN")));
    let error = bench.dispatcher.step(&mut bench.vcpu).unwrap_err();
    assert!(matches!(error, Error::Hypervisor { op: "run the vCPU", .. }));
}

#[test]
fn the_dispatcher_takes_a_vcpu_behind_a_trait_object_too() {
    let mut bench = Bench::new(Script::new().out8(PORT, 7).halt());
    let vcpu: &mut dyn Vcpu = &mut bench.vcpu;
    assert_eq!(bench.dispatcher.step(vcpu).unwrap(), Step::Continue);
    assert_eq!(bench.pio.lock().unwrap().writes, [(0, vec![7])]);
}

#[test]
fn a_device_that_comes_later_is_found() {
    let pio = Bus::new();
    let vm = ScriptedHypervisor::new(Script::new().pio_read(5, 1, 1).pio_read(5, 1, 1)).create_vm().unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut dispatcher = Dispatcher::new(pio.view(), Bus::new().view());
    assert_eq!(dispatcher.step(&mut vcpu).unwrap(), Step::Continue);
    pio.insert(5, 1, Arc::new(Mutex::new(Device::default()))).unwrap();
    assert_eq!(dispatcher.step(&mut vcpu).unwrap(), Step::Continue);
    assert_eq!(dispatcher.refused().unclaimed, 1);
}
