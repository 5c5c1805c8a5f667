//! Message-signalled interrupts: routes from numbers (GSIs) to messages in KVM's table, and an irqfd for each.
//!
//! KVM takes the table whole, by `KVM_SET_GSI_ROUTING`, and until the first time it has one of its own. So nothing is told
//! to KVM before the first message is set, and from then on each table also has the routes of the pins, as KVM's own.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{Irq, IrqTarget, MsiMessage, MsiRoute, MsiSource};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::io_error;
use crate::irq::PINS;

/// Pins of one 8259 PIC.
const PIC_PINS: u32 = 8;
/// Lines that the two PICs have beside the I/O APIC.
const PIC_LINES: u32 = 2 * PIC_PINS;

/// Addresses of interrupt messages (Intel SDM Vol. 3A, 11.11.1): `FEEx_xxxx`. A write to any other is none.
const MESSAGE_ADDRESS: u64 = 0xFEE0_0000;
const MESSAGE_ADDRESS_MASK: u64 = !0xF_FFFF;

/// The routes of one VM. It holds the VM's descriptor, not the VM: nothing here touches guest memory.
pub(crate) struct KvmMsi {
    vm: Arc<VmFd>,
    /// Entries that KVM takes in one table, those of the pins with them; numbers of routes are below it as well.
    limit: usize,
    routes: Mutex<Routes>,
}

#[derive(Default)]
struct Routes {
    /// The message of every route that exists, by its GSI.
    messages: BTreeMap<u32, Option<MsiMessage>>,
    /// The messages of the table that KVM has.
    told: BTreeMap<u32, MsiMessage>,
}

impl Routes {
    /// Makes a route with the first free number from [`PINS`] on.
    fn add(&mut self, limit: usize) -> Option<u32> {
        if self.messages.len() >= limit.saturating_sub(pin_routes().count()) {
            return None;
        }
        // The numbers in use are sorted: the first that is not the next one leaves a gap before it.
        let gsi = (PINS..).zip(self.messages.keys()).find(|(free, used)| free != *used).map(|(free, _)| free);
        let gsi = gsi
            .or_else(|| self.messages.last_key_value().map_or(Some(PINS), |(last, _)| last.checked_add(1)));
        self.messages.insert(gsi?, None);
        gsi
    }

    /// The messages as they would be with that of `gsi` changed; `None` if KVM's table is like that already.
    fn with(&self, gsi: u32, message: Option<MsiMessage>) -> Option<BTreeMap<u32, MsiMessage>> {
        if self.told.get(&gsi).copied() == message {
            return None;
        }
        let others = self.messages.iter().filter(|&(&other, _)| other != gsi);
        let set = others.filter_map(|(&other, message)| Some((other, (*message)?)));
        Some(set.chain(message.map(|message| (gsi, message))).collect())
    }
}

impl KvmMsi {
    /// `None` if this KVM has no routes: `limit`, the entries of its table, is 0.
    pub(crate) fn new(vm: &Arc<VmFd>, limit: usize) -> Option<Arc<Self>> {
        let limit = limit.min(KVM_MAX_IRQ_ROUTES);
        (limit > 0).then(|| Arc::new(Self { vm: vm.clone(), limit, routes: Mutex::default() }))
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives KVM a table of the pins' routes and these.
    fn tell(&self, messages: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        let entries: Vec<_> = pin_routes().chain(messages.iter().map(message_route)).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::StorageFull)?;
        self.vm.set_gsi_routing(&table).map_err(io_error)
    }
}

/// The routes of the pins as KVM makes them: each line leads to the pin of its number on the I/O APIC, and the first 16 to
/// the PICs as well.
fn pin_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pin = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let pics = (0..PIC_LINES).map(move |gsi| {
        let chip = if gsi < PIC_PINS { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        pin(gsi, chip, gsi % PIC_PINS)
    });
    (0..PINS).map(move |gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)).chain(pics)
}

fn message_route((&gsi, message): (&u32, &MsiMessage)) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: u32::try_from(message.address & u64::from(u32::MAX)).unwrap_or_default(),
        address_hi: u32::try_from(message.address >> 32).unwrap_or_default(),
        data: message.data,
        ..Default::default()
    };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}

/// The handle that devices are given.
pub(crate) struct KvmMsiSource(pub(crate) Arc<KvmMsi>);

impl MsiSource for KvmMsiSource {
    fn route(&self) -> io::Result<Box<dyn MsiRoute>> {
        let fd = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let irq = Irq::new(MsiFd(Arc::clone(&fd)));
        let Some(gsi) = self.0.routes().add(self.0.limit) else {
            let text = format!("all {} routes of interrupts that this KVM has are in use", self.0.limit);
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        };
        Ok(Box::new(KvmMsiRoute { msi: Arc::clone(&self.0), gsi, fd, irq, bound: Mutex::new(false) }))
    }
}

/// The eventfd of a route: all that an [`Irq`] holds, so that one that outlives its route is harmless.
struct MsiFd(Arc<EventFd>);

impl IrqTarget for MsiFd {
    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }

    fn eventfd(&self) -> Option<&EventFd> {
        Some(&self.0)
    }
}

struct KvmMsiRoute {
    msi: Arc<KvmMsi>,
    gsi: u32,
    fd: Arc<EventFd>,
    irq: Irq,
    /// Whether KVM listens to the eventfd: from the first message on. Locked before the table.
    bound: Mutex<bool>,
}

impl KvmMsiRoute {
    /// Makes KVM listen to the eventfd. What was triggered before is lost, as it is by a route without a message.
    fn bind(&self) -> io::Result<()> {
        match self.fd.read() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        self.msi.vm.register_irqfd(&self.fd, self.gsi).map_err(io_error)
    }
}

impl MsiRoute for KvmMsiRoute {
    fn irq(&self) -> Irq {
        self.irq.clone()
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        if let Some(MsiMessage { address, .. }) = message
            && address & MESSAGE_ADDRESS_MASK != MESSAGE_ADDRESS
        {
            let text = format!("a write to {address:#x} is no interrupt message");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if message.is_none() && !*bound {
            return Ok(());
        }
        let mut routes = self.msi.routes();
        // A table with the new message first, then the irqfd: until then nothing can trigger what may have been left under
        // this number by a route before.
        if let Some(messages) = routes.with(self.gsi, message) {
            self.msi.tell(&messages)?;
            routes.told = messages;
        }
        if !*bound {
            // If it fails, the entry stays in KVM's table, where nothing can trigger it.
            self.bind()?;
            *bound = true;
        }
        routes.messages.insert(self.gsi, message);
        Ok(())
    }
}

impl Drop for KvmMsiRoute {
    fn drop(&mut self) {
        if *self.bound.get_mut().unwrap_or_else(PoisonError::into_inner) {
            // It can only fail if it is not bound; there would be nobody to tell.
            let _ = self.msi.vm.unregister_irqfd(&self.fd, self.gsi);
        }
        // The entry leaves KVM's table with the next one. Until then nothing can trigger it.
        self.msi.routes().messages.remove(&self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: MsiMessage = MsiMessage { address: 0xFEE0_1000, data: 0x41 };

    #[test]
    fn routes_get_the_first_free_number_after_the_pins() {
        let mut routes = Routes::default();
        let made: Vec<_> = (0..4).map(|_| routes.add(4096).unwrap()).collect();
        assert_eq!(made, [24, 25, 26, 27]);
        routes.messages.remove(&25);
        routes.messages.remove(&24);
        assert_eq!([routes.add(4096), routes.add(4096), routes.add(4096)], [Some(24), Some(25), Some(28)]);
    }

    #[test]
    fn pins_take_their_share_of_the_table() {
        let mut routes = Routes::default();
        let made = (0..100).map_while(|_| routes.add(45)).count();
        assert_eq!(made, 5, "40 of 45 entries are those of the pins");
        assert_eq!(Routes::default().add(40), None);
    }

    #[test]
    fn table_that_kvm_has_already_is_not_told_again() {
        let mut routes = Routes::default();
        let [a, b] = [(); 2].map(|()| routes.add(4096).unwrap());
        let first = routes.with(a, Some(MESSAGE)).unwrap();
        assert_eq!(first, BTreeMap::from([(a, MESSAGE)]));
        routes.told = first;
        routes.messages.insert(a, Some(MESSAGE));
        assert_eq!(routes.with(a, Some(MESSAGE)), None);
        assert_eq!(routes.with(b, None), None);
        assert_eq!(routes.with(b, Some(MESSAGE)).unwrap().len(), 2);
        assert!(routes.with(a, None).unwrap().is_empty());
    }

    #[test]
    fn pins_have_the_routes_that_kvm_gives_them() {
        let routes: Vec<_> = pin_routes().collect();
        let of = |gsi: u32| {
            let entries = routes.iter().filter(|entry| entry.gsi == gsi);
            // SAFETY: all entries are of the kind that has a chip and a pin.
            let pins = entries.map(|entry| unsafe { entry.u.irqchip });
            pins.map(|pin| (pin.irqchip, pin.pin)).collect::<Vec<_>>()
        };
        assert_eq!(of(5), [(KVM_IRQCHIP_IOAPIC, 5), (KVM_IRQCHIP_PIC_MASTER, 5)]);
        assert_eq!(of(8), [(KVM_IRQCHIP_IOAPIC, 8), (KVM_IRQCHIP_PIC_SLAVE, 0)]);
        assert_eq!(of(23), [(KVM_IRQCHIP_IOAPIC, 23)]);
        assert_eq!(routes.len(), 40);
    }

    #[test]
    fn kvm_is_told_nothing_before_the_first_message_and_a_refusal_changes_nothing() {
        let test = "kvm_is_told_nothing_before_the_first_message_and_a_refusal_changes_nothing";
        if let Some(reason) = freestone_testkit::dev_kvm_usable().err() {
            return freestone_testkit::skip(test, &reason);
        }
        // Without an interrupt controller KVM refuses every table and every irqfd.
        let vm = Arc::new(kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap());
        let msi = KvmMsi::new(&vm, 4096).unwrap();
        let source = KvmMsiSource(Arc::clone(&msi));
        let [route, other] = [source.route().unwrap(), source.route().unwrap()];
        route.irq().trigger().unwrap();
        route.set(None).unwrap();
        drop(other);
        route.set(Some(MESSAGE)).unwrap_err();
        assert_eq!(msi.routes().messages, BTreeMap::from([(24, None)]));
        assert!(msi.routes().told.is_empty());
        route.set(None).unwrap();
    }
}
