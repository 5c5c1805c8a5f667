//! What a device gets of a machine beyond lines and registers: messages, memory slots, and address space above RAM.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::sync::{Arc, Mutex};

use freestone_testkit::{Script, ScriptedHypervisor};
use freestone_vmm::bus::{Device, Irq, MsiMessage, MsiRoute, Plug, Result, SlotGuard, Wiring};
use freestone_vmm::hypervisor::{DEVICE_SLOTS, Hypervisor};
use freestone_vmm::kvm::Kvm;
use freestone_vmm::loader::FlatMode;
use freestone_vmm::memory::layout::RamRange;
use freestone_vmm::memory::{GuestMem, GuestMemBuilder};
use freestone_vmm::{Machine, MachineBuilder, Payload};

const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x41 };

/// Takes memory of 2 MiB and a message.
#[derive(Clone, Default)]
struct Greedy(Arc<Mutex<Option<(u64, Irq)>>>);

struct Fed {
    _guard: SlotGuard,
    _route: Box<dyn MsiRoute>,
}

impl Plug for Greedy {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let len = 2 << 20;
        let start = wiring.alloc_memory(len, len)?;
        let memory = GuestMemBuilder::with_ranges(vec![RamRange { start, len }]).build().unwrap();
        let guard = wiring.memory_slots().unwrap().map(&memory.regions()[0], false).unwrap();
        let route = wiring.msi().unwrap().route().unwrap();
        route.set(Some(MESSAGE)).unwrap();
        *self.0.lock().unwrap() = Some((start, route.irq()));
        Ok(Box::new(Fed { _guard: guard, _route: route }))
    }
}

impl Device for Fed {
    fn name(&self) -> &str {
        "greedy"
    }
}

/// A machine with the device, the address of its memory, and its interrupt.
fn machine<H: Hypervisor>(hypervisor: &H) -> (Machine<H>, u64, Irq) {
    let greedy = Greedy::default();
    let machine = MachineBuilder::new(hypervisor)
        .memory(GuestMem::anonymous(1 << 20).unwrap())
        .device(greedy.clone())
        .payload(Payload::Flat { bytes: (&[0xf4]).into(), at: 0x1000, mode: FlatMode::Real16 })
        .build()
        .unwrap();
    let (start, irq) = greedy.0.lock().unwrap().take().unwrap();
    (machine, start, irq)
}

#[test]
fn device_memory_and_messages_reach_the_vm_and_leave_it_with_the_device() {
    let hypervisor = ScriptedHypervisor::new(Script::new());
    let (machine, start, irq) = machine(&hypervisor);
    let probe = hypervisor.probe();
    let slot = probe.slots()[1];
    assert_eq!((slot.slot, slot.gpa, slot.len), (DEVICE_SLOTS, start, 2 << 20));
    assert_eq!(start, 1 << 32, "above all RAM and 4 GiB");
    irq.trigger().unwrap();
    assert_eq!(probe.msi_delivered(), [(MESSAGE, 1)]);
    drop(machine);
    assert_eq!((probe.slots().len(), probe.msi_routes().len()), (1, 0));
}

#[test]
fn kvm_takes_the_memory_where_the_machine_puts_it() {
    let test = "kvm_takes_the_memory_where_the_machine_puts_it";
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(reason) => return freestone_testkit::skip(test, &reason.to_string()),
    };
    let (machine, start, irq) = machine(&kvm);
    assert_eq!(start, 1 << 32);
    irq.trigger().unwrap();
    drop(machine);
}
