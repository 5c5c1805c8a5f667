//! [`Table`]: which port an address was seen at.
//!
//! A set-associative table of fixed size: an address in a VLAN is one number, its port and the second it was last seen are
//! another, and both are atomics. So a frame is looked up, and its sender refreshed, without a lock; only a new or moved address
//! takes one. The hash is seeded: nobody can choose addresses that push out those of somebody else.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::MacAddr;

/// Places where one address can be.
const WAYS: usize = 8;
const VALID: u64 = 1 << 63;
const PINNED: u64 = 1 << 47;

/// An address in a VLAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    pub(super) fn new(mac: MacAddr, vlan: u16) -> Self {
        let [a, b, c, d, e, f] = mac.0;
        Self(VALID | u64::from(vlan) << 48 | u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    fn mac(self) -> MacAddr {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        MacAddr([a, b, c, d, e, f])
    }

    fn vlan(self) -> u16 {
        let [a, b, ..] = self.0.to_be_bytes();
        u16::from_be_bytes([a & 0xF, b])
    }
}

/// What is known of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Value {
    port: u16,
    /// Does not age or move.
    pinned: bool,
    seen: u32,
}

impl Value {
    fn to_u64(self) -> u64 {
        u64::from(self.port) << 48 | if self.pinned { PINNED } else { 0 } | u64::from(self.seen)
    }

    fn from_u64(value: u64) -> Self {
        let [a, b, .., e, f, g, h] = value.to_be_bytes();
        Self {
            port: u16::from_be_bytes([a, b]),
            pinned: value & PINNED != 0,
            seen: u32::from_be_bytes([e, f, g, h]),
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// 0: empty.
    key: AtomicU64,
    value: AtomicU64,
}

impl Slot {
    fn get(&self, key: Key) -> Option<Value> {
        if self.key.load(Ordering::Acquire) != key.0 {
            return None;
        }
        let value = self.value.load(Ordering::Acquire);
        // The same key before and after: the value is its own. Were it replaced twice meanwhile, a frame would go to a wrong
        // port, where VLAN and isolation are checked again.
        (self.key.load(Ordering::Acquire) == key.0).then(|| Value::from_u64(value))
    }

    /// Only with the lock.
    fn entry(&self) -> Option<(Key, Value)> {
        let key = self.key.load(Ordering::Acquire);
        (key != 0).then(|| (Key(key), Value::from_u64(self.value.load(Ordering::Acquire))))
    }

    /// Only with the lock.
    fn set(&self, key: Key, value: Value) {
        self.key.store(0, Ordering::Release);
        self.value.store(value.to_u64(), Ordering::Release);
        self.key.store(key.0, Ordering::Release);
    }
}

/// What became of an address that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Learned {
    /// It was there.
    Known,
    /// It is new.
    New,
    /// It was at another port.
    Moved,
    /// There is no room: the port has as many as it may, or others that have fewer need theirs.
    NoRoom,
    /// It belongs to another port.
    Foreign,
}

/// An address that was learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) mac: MacAddr,
    pub(super) vlan: u16,
    pub(super) port: u16,
    pub(super) pinned: bool,
    /// Seconds.
    pub(super) age: u32,
}

/// Kept under the lock.
#[derive(Debug, Default)]
struct Held {
    /// Addresses of each port.
    by_port: Vec<usize>,
    /// When the aged were taken out.
    swept: u32,
}

impl Held {
    fn of(&self, port: u16) -> usize {
        self.by_port.get(usize::from(port)).copied().unwrap_or(0)
    }

    fn add(&mut self, port: u16) {
        let port = usize::from(port);
        if self.by_port.len() <= port {
            self.by_port.resize(port + 1, 0);
        }
        if let Some(count) = self.by_port.get_mut(port) {
            *count += 1;
        }
    }

    fn sub(&mut self, port: u16) {
        if let Some(count) = self.by_port.get_mut(usize::from(port)) {
            *count = count.saturating_sub(1);
        }
    }
}

/// See the module. Times are seconds since the switch began.
#[derive(Debug)]
pub(super) struct Table {
    slots: Box<[Slot]>,
    seeds: [u64; 2],
    ageing: u32,
    per_port: usize,
    held: Mutex<Held>,
}

impl Table {
    /// Room for `entries`, rounded up to a power of two, of which each port has at most `per_port`.
    pub(super) fn new(entries: usize, per_port: usize, ageing: u32) -> Self {
        let entries = entries.clamp(WAYS, 1 << 20).next_power_of_two();
        let random = RandomState::new();
        Self {
            slots: (0..entries).map(|_| Slot::default()).collect(),
            seeds: [random.hash_one(0), random.hash_one(1) | 1],
            ageing,
            per_port,
            held: Mutex::default(),
        }
    }

    fn set_of(&self, key: Key) -> &[Slot] {
        let [xor, factor] = self.seeds;
        let product = u128::from(key.0 ^ xor) * u128::from(factor);
        let hash = usize::try_from((product ^ (product >> 64)) & u128::from(u32::MAX)).unwrap_or(0);
        let start = hash % (self.slots.len() / WAYS) * WAYS;
        self.slots.get(start..start + WAYS).unwrap_or_default()
    }

    fn aged(&self, value: Value, now: u32) -> bool {
        !value.pinned && now.saturating_sub(value.seen) > self.ageing
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The port where the address was seen.
    pub(super) fn lookup(&self, key: Key, now: u32) -> Option<u16> {
        let value = self.set_of(key).iter().find_map(|slot| slot.get(key))?;
        (!self.aged(value, now)).then_some(value.port)
    }

    /// The address was seen at `port`.
    pub(super) fn learn(&self, key: Key, port: u16, now: u32) -> Learned {
        if let Some((slot, value)) = self.set_of(key).iter().find_map(|slot| Some((slot, slot.get(key)?))) {
            if value.port == port {
                if value.seen < now {
                    // Fails if somebody else was faster, which is as good.
                    let fresh = Value { seen: now, ..value };
                    let _ = slot.value.compare_exchange(
                        value.to_u64(),
                        fresh.to_u64(),
                        Ordering::AcqRel,
                        Ordering::Relaxed,
                    );
                }
                return Learned::Known;
            }
            if value.pinned {
                return Learned::Foreign;
            }
        }
        self.insert(key, Value { port, pinned: false, seen: now }, now)
    }

    /// The address belongs to `port`, until the port is forgotten. `false` if it belongs to another or there is no room.
    pub(super) fn pin(&self, key: Key, port: u16, now: u32) -> bool {
        let learned = self.insert(key, Value { port, pinned: true, seen: now }, now);
        !matches!(learned, Learned::NoRoom | Learned::Foreign)
    }

    fn insert(&self, key: Key, value: Value, now: u32) -> Learned {
        let mut held = self.lock();
        let set = self.set_of(key);
        if let Some((slot, old)) =
            set.iter().find_map(|slot| slot.entry().filter(|(k, _)| *k == key).map(|(_, v)| (slot, v)))
        {
            if old.pinned && old.port != value.port {
                return Learned::Foreign;
            }
            if old.port != value.port && held.of(value.port) >= self.per_port {
                self.sweep(&mut held, now);
                if held.of(value.port) >= self.per_port {
                    return Learned::NoRoom;
                }
            }
            held.sub(old.port);
            held.add(value.port);
            slot.set(key, value);
            return if old.port == value.port { Learned::Known } else { Learned::Moved };
        }
        if held.of(value.port) >= self.per_port {
            self.sweep(&mut held, now);
            if held.of(value.port) >= self.per_port {
                return Learned::NoRoom;
            }
        }
        let Some(slot) = self.victim(set, &held, value.port, now) else {
            return Learned::NoRoom;
        };
        if let Some((_, old)) = slot.entry() {
            held.sub(old.port);
        }
        held.add(value.port);
        slot.set(key, value);
        Learned::New
    }

    /// Where a new address of `port` goes: an empty or aged place, or that of the port with the most addresses, the one not seen
    /// for longest.
    fn victim<'s>(&self, set: &'s [Slot], held: &Held, port: u16, now: u32) -> Option<&'s Slot> {
        if let Some(free) =
            set.iter().find(|slot| slot.entry().is_none_or(|(_, value)| self.aged(value, now)))
        {
            return Some(free);
        }
        let own = held.of(port);
        set.iter()
            .filter_map(|slot| slot.entry().map(|(_, value)| (slot, value)))
            .filter(|(_, value)| !value.pinned && (value.port == port || held.of(value.port) > own))
            .max_by_key(|(_, value)| (held.of(value.port), now.saturating_sub(value.seen)))
            .map(|(slot, _)| slot)
    }

    /// Takes the aged out, once a second at most: a port at its bound must not make this a habit.
    fn sweep(&self, held: &mut Held, now: u32) {
        if held.swept == now {
            return;
        }
        held.swept = now;
        self.remove(held, |value| self.aged(value, now));
    }

    fn remove(&self, held: &mut Held, which: impl Fn(Value) -> bool) {
        for slot in &self.slots {
            if let Some((_, value)) = slot.entry()
                && which(value)
            {
                slot.key.store(0, Ordering::Release);
                held.sub(value.port);
            }
        }
    }

    /// Forgets all addresses of `port`.
    pub(super) fn forget(&self, port: u16) {
        self.remove(&mut self.lock(), |value| value.port == port);
    }

    /// All addresses that have not aged.
    pub(super) fn entries(&self, now: u32) -> Vec<Entry> {
        let _held = self.lock();
        let live = self.slots.iter().filter_map(Slot::entry).filter(|(_, value)| !self.aged(*value, now));
        live.map(|(key, value)| Entry {
            mac: key.mac(),
            vlan: key.vlan(),
            port: value.port,
            pinned: value.pinned,
            age: now.saturating_sub(value.seen),
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Key {
        let [a, b, c, d] = n.to_be_bytes();
        Key::new(MacAddr([2, 0, a, b, c, d]), 1)
    }

    #[test]
    fn an_address_is_found_where_it_was_seen_last_in_its_vlan() {
        let table = Table::new(4096, 1024, 300);
        let mac = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(table.lookup(Key::new(mac, 5), 0), None);
        assert_eq!(table.learn(Key::new(mac, 5), 3, 0), Learned::New);
        assert_eq!(table.learn(Key::new(mac, 5), 3, 1), Learned::Known);
        assert_eq!(table.learn(Key::new(mac, 4094), 4, 1), Learned::New);
        assert_eq!(table.learn(Key::new(mac, 5), 0xFFFF, 2), Learned::Moved);
        assert_eq!(table.lookup(Key::new(mac, 5), 2), Some(0xFFFF));
        assert_eq!(table.lookup(Key::new(mac, 4094), 2), Some(4));
        assert_eq!(table.lookup(Key::new(mac, 6), 2), None);
        let mut entries = table.entries(7);
        entries.sort_by_key(|entry| entry.vlan);
        assert_eq!(entries[0], Entry { mac, vlan: 5, port: 0xFFFF, pinned: false, age: 5 });
        assert_eq!(entries[1], Entry { mac, vlan: 4094, port: 4, pinned: false, age: 6 });
    }

    #[test]
    fn an_address_ages_unless_it_is_seen_again() {
        let table = Table::new(4096, 1024, 300);
        table.learn(key(1), 1, 10);
        table.learn(key(2), 2, 10);
        table.learn(key(1), 1, 300);
        assert_eq!(table.lookup(key(2), 310), Some(2));
        assert_eq!(table.lookup(key(2), 311), None);
        assert_eq!(table.lookup(key(1), 311), Some(1));
        assert_eq!(table.entries(311).len(), 1);
        assert_eq!(table.lookup(key(1), 601), None);
    }

    #[test]
    fn a_port_with_too_many_addresses_learns_no_more_until_some_age() {
        let table = Table::new(4096, 100, 300);
        let learned = (0..1000).filter(|&n| table.learn(key(n), 1, 0) == Learned::New).count();
        assert_eq!(learned, 100);
        assert_eq!(table.learn(key(5000), 2, 0), Learned::New);
        assert_eq!(table.learn(key(5000), 1, 0), Learned::NoRoom);
        assert_eq!(table.lookup(key(5000), 0), Some(2));
        assert_eq!(table.learn(key(9999), 1, 300), Learned::NoRoom);
        assert_eq!(table.learn(key(9999), 1, 301), Learned::New);
    }

    #[test]
    fn in_a_full_table_a_port_with_few_addresses_takes_the_place_of_one_with_many() {
        let table = Table::new(64, 1000, 300);
        for n in 0..10_000 {
            table.learn(key(n), 1, 0);
        }
        assert_eq!(table.entries(0).len(), 64);
        for n in 0..4 {
            assert_eq!(table.learn(key(20_000 + n), 2, 1), Learned::New);
        }
        for n in 10_000..20_000 {
            table.learn(key(n), 1, 2);
        }
        for n in 0..4 {
            assert_eq!(table.lookup(key(20_000 + n), 2), Some(2));
        }
        assert_eq!(table.entries(2).len(), 64);
    }

    #[test]
    fn a_pinned_address_neither_moves_nor_ages_until_its_port_is_forgotten() {
        let table = Table::new(64, 1000, 300);
        assert!(table.pin(key(1), 1, 0));
        assert_eq!(table.learn(key(1), 2, 0), Learned::Foreign);
        assert!(!table.pin(key(1), 2, 0));
        for n in 10..10_000 {
            table.learn(key(n), 2, 0);
        }
        assert_eq!(table.lookup(key(1), 10_000), Some(1));
        table.forget(1);
        assert_eq!(table.lookup(key(1), 10_000), None);
        assert_eq!(table.learn(key(1), 2, 10_000), Learned::New);
    }
}
