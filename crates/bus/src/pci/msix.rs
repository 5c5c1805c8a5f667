//! [`Msix`]: message-signalled interrupts of a function (PCI 3.0, section 6.8.2).

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::{Access, AccessError, Error, IoDevice, Irq, IrqTarget, MsiMessage, MsiRoute, MsiSource, Result};

/// Most vectors of a function.
const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry.
const ENTRY_LEN: u64 = 16;
/// Bit of the vector control: the vector is masked.
const VECTOR_MASKED: u32 = 1;

/// The vectors of a function: what a driver has to say about them, and their interrupts. Clones are handles to the same ones.
///
/// As an [`IoDevice`] it is the table, followed by the pending bits from [`pending_offset`](Self::pending_offset) on. Accesses
/// are aligned and have 4 or 8 bytes.
///
/// A vector is open while MSI-X is enabled and neither the function nor the vector is masked. The interrupt of an open vector
/// delivers its message; that of another sets its pending bit, and the message is delivered when the vector opens. Triggering
/// takes no lock. Host routes are made when a vector first opens and kept until the last handle is dropped.
///
/// Without a [`MsiSource`], or when it has no more routes, a vector never opens.
#[derive(Clone)]
pub struct Msix(Arc<Inner>);

struct Inner {
    source: Option<Arc<dyn MsiSource>>,
    vectors: Box<[Vector]>,
    /// A bit for each vector, set while its interrupt waits.
    pending: Box<[AtomicU64]>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Vector {
    /// Triggers are delivered. Only while `route` is set.
    open: AtomicBool,
    route: OnceLock<Route>,
}

struct Route {
    route: Box<dyn MsiRoute>,
    irq: Irq,
}

/// What the driver wrote.
struct Table {
    enabled: bool,
    masked: bool,
    entries: Box<[Entry]>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Address (low, high), data, vector control.
    words: [u32; 4],
    /// The message that the route has now.
    routed: Option<MsiMessage>,
}

impl Entry {
    fn message(&self) -> MsiMessage {
        let [low, high, data, _] = self.words;
        MsiMessage { address: u64::from(high) << 32 | u64::from(low), data }
    }

    fn is_masked(&self) -> bool {
        let [.., control] = self.words;
        control & VECTOR_MASKED != 0
    }
}

impl Msix {
    /// `count` vectors, 1 to 2048, all masked, that deliver by routes of `source`.
    ///
    /// # Errors
    /// [`Error::PciConfig`] if `count` is out of range.
    pub fn new(count: u16, source: Option<Arc<dyn MsiSource>>) -> Result<Self> {
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(Error::PciConfig { what: "number of MSI-X vectors", value: count.into() });
        }
        let entry = Entry { words: [0, 0, 0, VECTOR_MASKED], routed: None };
        let entries = vec![entry; count.into()].into();
        Ok(Self(Arc::new(Inner {
            source,
            vectors: (0..count).map(|_| Vector::default()).collect(),
            pending: (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            table: Mutex::new(Table { enabled: false, masked: false, entries }),
        })))
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        u16::try_from(self.0.vectors.len()).unwrap_or(MAX_VECTORS)
    }

    /// Bytes of table and pending bits together.
    pub fn block_len(&self) -> u64 {
        self.pending_offset() + 8 * self.0.pending.len() as u64
    }

    /// Offset of the pending bits behind the start of the table.
    pub fn pending_offset(&self) -> u64 {
        ENTRY_LEN * u64::from(self.count())
    }

    /// The interrupt of `vector`. That of a vector which does not exist is never heard.
    pub fn irq(&self, vector: u16) -> Irq {
        Irq::new(VectorIrq { msix: self.clone(), vector })
    }

    /// Triggers `vector`: as [`irq`](Self::irq), for owners that choose the vector each time.
    ///
    /// # Errors
    /// Whatever the host says when the message cannot be delivered.
    pub fn trigger(&self, vector: u16) -> io::Result<()> {
        self.0.trigger(vector.into())
    }

    /// Enable and function mask of the message control register, as the driver wrote them.
    pub fn set_control(&self, enabled: bool, masked: bool) {
        let mut table = self.0.lock();
        if (table.enabled, table.masked) == (enabled, masked) {
            return;
        }
        (table.enabled, table.masked) = (enabled, masked);
        for index in 0..self.0.vectors.len() {
            self.0.refresh(&mut table, index);
        }
    }

    /// Whether the driver has enabled MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.0.lock().enabled
    }

    /// The table, as the driver wrote it.
    pub(super) fn entries(&self) -> Vec<[u32; 4]> {
        self.0.lock().entries.iter().map(|entry| entry.words).collect()
    }

    /// The pending bits.
    pub(super) fn pending(&self) -> Vec<u64> {
        self.0.pending.iter().map(|word| word.load(Ordering::SeqCst)).collect()
    }

    /// Writes table and pending bits. What is too much is dropped.
    pub(super) fn put_table(&self, entries: &[[u32; 4]], pending: &[u64]) {
        for (at, word) in (0..).step_by(4).zip(entries.iter().flatten()) {
            self.0.write_word(at, *word);
        }
        for (to, from) in self.0.pending.iter().zip(pending) {
            to.store(*from, Ordering::SeqCst);
        }
    }

    /// Forgets the interrupts that wait, as a reset of the device does.
    pub fn clear_pending(&self) {
        for word in &self.0.pending {
            word.store(0, Ordering::SeqCst);
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trigger(&self, index: usize) -> io::Result<()> {
        let Some(vector) = self.vectors.get(index) else { return Ok(()) };
        if vector.open.load(Ordering::SeqCst) {
            return vector.deliver();
        }
        let Some((word, bit)) = self.pending_bit(index) else { return Ok(()) };
        word.fetch_or(bit, Ordering::SeqCst);
        // The vector may have opened after it was looked at and before the bit was set. One of the two sides finds the bit.
        if vector.open.load(Ordering::SeqCst) && word.fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
            return vector.deliver();
        }
        Ok(())
    }

    fn pending_bit(&self, index: usize) -> Option<(&AtomicU64, u64)> {
        Some((self.pending.get(index / 64)?, 1 << (index % 64)))
    }

    /// Opens or closes a vector after the table changed.
    fn refresh(&self, table: &mut Table, index: usize) {
        let active = table.enabled && !table.masked;
        let (Some(vector), Some(entry)) = (self.vectors.get(index), table.entries.get_mut(index)) else {
            return;
        };
        if !active || entry.is_masked() {
            // The route keeps its message: a trigger that is under way is delivered, as one sent just before would be.
            vector.open.store(false, Ordering::SeqCst);
            return;
        }
        let message = entry.message();
        if entry.routed != Some(message) {
            if let Err(error) = self.set_route(vector, message) {
                tracing::debug!(vector = index, %error, "an interrupt vector has no route");
                entry.routed = None;
                vector.open.store(false, Ordering::SeqCst);
                return;
            }
            entry.routed = Some(message);
        }
        vector.open.store(true, Ordering::SeqCst);
        let waited = self.pending_bit(index);
        let waited = waited.is_some_and(|(word, bit)| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0);
        if waited && let Err(error) = vector.deliver() {
            tracing::warn!(vector = index, %error, "cannot interrupt the guest");
        }
    }

    fn set_route(&self, vector: &Vector, message: MsiMessage) -> io::Result<()> {
        let route = match vector.route.get() {
            Some(route) => route,
            None => {
                let source = self.source.as_ref();
                let route = source.ok_or(io::ErrorKind::Unsupported)?.route()?;
                vector.route.get_or_init(|| Route { irq: route.irq(), route })
            }
        };
        route.route.set(Some(message))
    }

    fn pending_word(&self, offset: u64) -> u32 {
        let words = usize::try_from(offset / 8).ok().and_then(|index| self.pending.get(index));
        let value = words.map_or(0, |word| word.load(Ordering::SeqCst));
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        u32::from_le_bytes(if offset.is_multiple_of(8) { [a, b, c, d] } else { [e, f, g, h] })
    }

    fn read_word(&self, offset: u64) -> u32 {
        let pending_offset = ENTRY_LEN * self.vectors.len() as u64;
        match offset.checked_sub(pending_offset) {
            Some(offset) => self.pending_word(offset),
            None => {
                let mut table = self.lock();
                word_of(&mut table, offset).map_or(0, |(_, word)| *word)
            }
        }
    }

    fn write_word(&self, offset: u64, value: u32) {
        let mut table = self.lock();
        // Pending bits cannot be written.
        let Some((index, word)) = word_of(&mut table, offset) else { return };
        // The other bits of the vector control are reserved.
        let value = if offset % ENTRY_LEN == 12 { value & VECTOR_MASKED } else { value };
        if *word != value {
            *word = value;
            self.refresh(&mut table, index);
        }
    }
}

/// The 32-bit word at `offset` of the table and the vector that it is about.
fn word_of(table: &mut Table, offset: u64) -> Option<(usize, &mut u32)> {
    let index = usize::try_from(offset / ENTRY_LEN).ok()?;
    let word = usize::try_from(offset % ENTRY_LEN / 4).ok()?;
    Some((index, table.entries.get_mut(index)?.words.get_mut(word)?))
}

impl Vector {
    fn deliver(&self) -> io::Result<()> {
        self.route.get().map_or(Ok(()), |route| route.irq.trigger())
    }
}

impl IoDevice for Msix {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        check(offset, data.len(), self.block_len())?;
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            word.copy_from_slice(&self.0.read_word(at).to_le_bytes());
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        check(offset, data.len(), self.block_len())?;
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            if let Ok(word) = word.try_into() {
                self.0.write_word(at, u32::from_le_bytes(word));
            }
        }
        Ok(())
    }
}

/// Only aligned accesses of 32 or 64 bits are defined (6.8.2).
fn check(offset: u64, len: usize, end: u64) -> Access {
    if !matches!(len, 4 | 8) || !offset.is_multiple_of(len as u64) {
        return Err(AccessError::Width);
    }
    if offset >= end { Err(AccessError::NoRegister) } else { Ok(()) }
}

struct VectorIrq {
    msix: Msix,
    vector: u16,
}

impl IrqTarget for VectorIrq {
    fn trigger(&self) -> io::Result<()> {
        self.msix.trigger(self.vector)
    }
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.0.lock();
        let open = self.0.vectors.iter().filter(|v| v.open.load(Ordering::Relaxed)).count();
        f.debug_struct("Msix")
            .field("vectors", &self.0.vectors.len())
            .field("open", &open)
            .field("enabled", &table.enabled)
            .field("masked", &table.masked)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Remembers what was delivered; has as many routes as it is told.
    #[derive(Default)]
    struct Source {
        delivered: Arc<Mutex<Vec<MsiMessage>>>,
        routes: AtomicUsize,
        most: Option<usize>,
    }

    struct TestRoute {
        message: Arc<Mutex<Option<MsiMessage>>>,
        delivered: Arc<Mutex<Vec<MsiMessage>>>,
    }

    impl MsiSource for Source {
        fn route(&self) -> io::Result<Box<dyn MsiRoute>> {
            if self.routes.fetch_add(1, Ordering::SeqCst) >= self.most.unwrap_or(usize::MAX) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            Ok(Box::new(TestRoute { message: Arc::default(), delivered: Arc::clone(&self.delivered) }))
        }
    }

    impl MsiRoute for TestRoute {
        fn irq(&self) -> Irq {
            let (message, delivered) = (Arc::clone(&self.message), Arc::clone(&self.delivered));
            Irq::from_fn(move || delivered.lock().unwrap().extend(*message.lock().unwrap()))
        }
        fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
            *self.message.lock().unwrap() = message;
            Ok(())
        }
    }

    const MESSAGE: MsiMessage = MsiMessage { address: 0x1_fee0_1000, data: 0x41 };

    fn msix(count: u16) -> (Msix, Arc<Source>) {
        let source = Arc::new(Source::default());
        (Msix::new(count, Some(source.clone())).unwrap(), source)
    }

    fn write(msix: &Msix, offset: u64, value: u32) {
        msix.write(offset, &value.to_le_bytes()).unwrap();
    }

    fn read(msix: &Msix, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        msix.read(offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn set_message(msix: &Msix, vector: u64) {
        write(msix, vector * 16, 0xfee0_1000);
        write(msix, vector * 16 + 4, 1);
        write(msix, vector * 16 + 8, 0x41);
    }

    fn delivered(source: &Source) -> usize {
        source.delivered.lock().unwrap().len()
    }

    #[test]
    fn an_open_vector_delivers_its_message() {
        let (msix, source) = msix(3);
        set_message(&msix, 2);
        write(&msix, 2 * 16 + 12, 0);
        msix.set_control(true, false);
        msix.irq(2).trigger().unwrap();
        assert_eq!(*source.delivered.lock().unwrap(), [MESSAGE]);
        assert!(msix.irq(2).eventfd().is_none(), "nobody can go round the mask");
    }

    #[test]
    fn routes_are_made_only_for_vectors_that_open() {
        let (msix, source) = msix(64);
        set_message(&msix, 1);
        msix.set_control(true, false);
        assert_eq!(source.routes.load(Ordering::SeqCst), 0);
        for _ in 0..3 {
            write(&msix, 16 + 12, 0);
            write(&msix, 16 + 12, 1);
        }
        assert_eq!(source.routes.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_closed_vector_pends_and_delivers_once_when_it_opens() {
        let closings: [fn(&Msix, bool); 3] = [
            |msix, closed| write(msix, 12, closed.into()),
            |msix, closed| msix.set_control(true, closed),
            |msix, closed| msix.set_control(!closed, false),
        ];
        for close in closings {
            let (msix, source) = msix(1);
            set_message(&msix, 0);
            write(&msix, 12, 0);
            msix.set_control(true, false);
            close(&msix, true);
            msix.irq(0).trigger().unwrap();
            msix.irq(0).trigger().unwrap();
            assert_eq!((read(&msix, msix.pending_offset()), delivered(&source)), (1, 0));
            close(&msix, false);
            assert_eq!((read(&msix, msix.pending_offset()), delivered(&source)), (0, 1));
        }
    }

    #[test]
    fn each_vector_has_its_own_pending_bit() {
        let (msix, _) = msix(130);
        for vector in [0, 33, 64, 129] {
            msix.trigger(vector).unwrap();
        }
        let at = msix.pending_offset();
        let words: Vec<_> = (0..6).map(|n| read(&msix, at + 4 * n)).collect();
        assert_eq!(words, [1, 2, 1, 0, 2, 0]);
        write(&msix, at, 0);
        assert_eq!(read(&msix, at), 1, "pending bits are read-only");
        msix.clear_pending();
        assert_eq!(read(&msix, at), 0);
    }

    #[test]
    fn a_message_that_changes_behind_the_mask_is_the_one_delivered() {
        let (msix, source) = msix(1);
        set_message(&msix, 0);
        write(&msix, 12, 0);
        msix.set_control(true, false);
        write(&msix, 12, 1);
        msix.trigger(0).unwrap();
        write(&msix, 8, 0x99);
        write(&msix, 12, 0);
        assert_eq!(*source.delivered.lock().unwrap(), [MsiMessage { data: 0x99, ..MESSAGE }]);
    }

    #[test]
    fn vectors_without_a_route_pend_and_break_nothing() {
        let starved = Arc::new(Source { most: Some(0), ..Source::default() });
        for source in [None, Some(starved as Arc<dyn MsiSource>)] {
            let msix = Msix::new(1, source).unwrap();
            set_message(&msix, 0);
            write(&msix, 12, 0);
            msix.set_control(true, false);
            msix.trigger(0).unwrap();
            assert_eq!(read(&msix, msix.pending_offset()), 1);
        }
    }

    #[test]
    fn the_table_reads_as_written_but_for_reserved_bits() {
        let (msix, _) = msix(2);
        assert_eq!((read(&msix, 12), read(&msix, 28)), (1, 1), "masked at first");
        msix.write(16, &0x1122_3344_5566_7788u64.to_le_bytes()).unwrap();
        assert_eq!((read(&msix, 16), read(&msix, 20)), (0x5566_7788, 0x1122_3344));
        let mut data = [0; 8];
        msix.read(16, &mut data).unwrap();
        assert_eq!(u64::from_le_bytes(data), 0x1122_3344_5566_7788);
        write(&msix, 28, 0xffff_fffe);
        assert_eq!(read(&msix, 28), 0);
    }

    #[test]
    fn odd_accesses_and_vectors_that_do_not_exist_do_nothing() {
        let (msix, _) = msix(2);
        for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (0, 3), (0, 16), (0, 0)] {
            assert_eq!(msix.write(offset, &vec![0; len]), Err(AccessError::Width));
            assert_eq!(msix.read(offset, &mut vec![0; len]), Err(AccessError::Width));
        }
        assert_eq!(msix.write(msix.block_len(), &[0; 4]), Err(AccessError::NoRegister));
        assert_eq!(msix.read(u64::MAX - 3, &mut [0; 4]), Err(AccessError::NoRegister));
        for vector in [2, 64, u16::MAX] {
            msix.trigger(vector).unwrap();
        }
        assert_eq!(read(&msix, msix.pending_offset()), 0);
        assert!(Msix::new(0, None).is_err() && Msix::new(2049, None).is_err());
        assert!(Msix::new(2048, None).is_ok());
    }

    #[test]
    fn no_interrupt_is_lost_while_a_vector_opens_and_closes() {
        let (msix, source) = msix(1);
        set_message(&msix, 0);
        msix.set_control(true, false);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    write(&msix, 12, 0);
                    write(&msix, 12, 1);
                }
                write(&msix, 12, 0);
            });
            for _ in 0..2000 {
                let before = delivered(&source);
                msix.trigger(0).unwrap();
                while delivered(&source) == before {
                    std::hint::spin_loop();
                }
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert_eq!(delivered(&source), 2000);
    }
}
