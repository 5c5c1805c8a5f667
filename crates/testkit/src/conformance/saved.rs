//! Checks of save and restore: the device goes on in another machine where it was, at any point of its life; and no state, however
//! damaged, does harm.

use freestone_bus::Device;
use freestone_snapshot::{Arch, Header, Limits, Reader, Sections, State, Writer};

use super::life::{POINTS, bring_up_with};
use super::traffic::{ARENA, Outcome, Shape, is_still, kick_all, undisturbed_by};
use super::{Bench, MEMORY, Make, ensure, lifecycle};
use crate::driver::{Arena, DriverTransport, VirtioDriver, status};
use crate::hostile::{Hostile, Source};
use crate::{Error, Result, TestWiring};

/// What is done to each byte of a state: bits that are flipped, all of them and one of these sets.
const FLIPS: [u8; 4] = [0x01, 0x04, 0x20, 0x80];
/// States that are nonsense from the first byte to the last.
const NONSENSE: u64 = 8;

/// The state of the device of a bench, which is paused.
pub(super) fn save<T: DriverTransport>(bench: &mut Bench<T>) -> Result<State> {
    let name = bench.device.name().to_owned();
    let mut state = State::new();
    lifecycle(bench, "save", |device| device.save(&mut state.of(&name)))?;
    Ok(state)
}

fn header() -> Result<Header> {
    Header::new(Arch::host(), "testkit").map_err(snapshot_error)
}

fn snapshot_error(source: freestone_snapshot::Error) -> Error {
    Error::Lifecycle {
        device: "under test".to_owned(),
        op: "pass through a snapshot",
        source: freestone_bus::Error::state("read or write")(source),
    }
}

/// A section: name, version, whether it is optional, body.
type Body = (String, u32, bool, Vec<u8>);

/// What is in a state, as a snapshot has it.
fn bodies(state: &State) -> Result<Vec<Body>> {
    let mut writer = Writer::new(Vec::new(), &header()?).map_err(snapshot_error)?;
    state.write_to(&mut writer).map_err(snapshot_error)?;
    let bytes = writer.finish().map_err(snapshot_error)?;
    let mut reader = Reader::new(bytes.as_slice(), Limits::default()).map_err(snapshot_error)?;
    let mut bodies = Vec::new();
    while let Some(mut section) = reader.next_section().map_err(snapshot_error)? {
        let (name, version, optional) = (section.name().to_owned(), section.version(), section.is_optional());
        let mut body = Vec::new();
        while let Some(chunk) = section.chunk().map_err(snapshot_error)? {
            body.extend_from_slice(chunk);
        }
        bodies.push((name, version, optional, body));
    }
    Ok(bodies)
}

/// The reverse of [`bodies`].
fn sections(bodies: &[Body]) -> Result<Sections> {
    let mut writer = Writer::new(Vec::new(), &header()?).map_err(snapshot_error)?;
    for (name, version, optional, body) in bodies {
        let mut section = writer.section(name.clone(), *version, *optional).map_err(snapshot_error)?;
        std::io::Write::write_all(&mut section, body).map_err(|source| {
            let op = "write a section";
            let source = freestone_bus::Error::Io { op, source };
            Error::Lifecycle { device: name.clone(), op, source }
        })?;
        section.finish().map_err(snapshot_error)?;
    }
    let bytes = writer.finish().map_err(snapshot_error)?;
    let reader = Reader::new(bytes.as_slice(), Limits::default()).map_err(snapshot_error)?;
    Sections::load(reader).map_err(snapshot_error)
}

impl<T: DriverTransport> Bench<T> {
    /// The device saves itself, ends, and goes on in another machine with the same memory. The driver finds no difference: not even
    /// a register was written.
    ///
    /// # Errors
    /// [`Error::Lifecycle`] if the device cannot do that, [`Error::Protocol`] if it then has another state.
    pub fn move_on(&mut self, make: Make<'_>) -> Result<()> {
        lifecycle(self, "pause", |device| device.pause())?;
        let state = save(self)?;
        let before = bodies(&state)?;
        let again = bodies(&save(self)?)?;
        ensure(before == again, "state that is saved twice", "2.7", || differences(&before, &again))?;
        self.replace(make)?;
        let name = self.device.name().to_owned();
        let mut sections = state.into_sections(header()?);
        lifecycle(self, "restore", |device| device.restore(&mut sections.of(&name)))?;
        sections.finish().map_err(snapshot_error)?;
        let after = bodies(&save(self)?)?;
        ensure(before == after, "state of a restored device", "2.7", || differences(&before, &after))?;
        lifecycle(self, "resume", |device| device.resume())
    }

    /// Ends the device, and makes a new one in another machine with the same memory. The driver does not notice.
    fn replace(&mut self, make: Make<'_>) -> Result<()> {
        // All of the former machine goes first, and with it what the device has put into memory.
        self.driver.let_go();
        self.device = Box::new(Nothing);
        self.wiring = TestWiring::new(self.memory());
        T::prepare(&mut self.wiring)?;
        self.device = make().plug(&mut self.wiring).map_err(Error::Plug)?;
        self.driver = self.driver.follow(&self.wiring)?;
        Ok(())
    }
}

/// Stands for a device that is gone.
struct Nothing;

impl Device for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }
}

fn differences(one: &[Body], other: &[Body]) -> String {
    let differs = |(one, other): (&Body, &Body)| (one != other).then(|| format!("{one:x?} and {other:x?}"));
    one.iter().zip(other).find_map(differs).unwrap_or_else(|| "another number of sections".to_owned())
}

/// Save and restore between any two turns of the device's work, with requests in flight: in the end every request was used that an
/// undisturbed device uses, once.
///
/// # Errors
/// [`Error::Lifecycle`] or [`Error::Protocol`].
pub fn loses_nothing_when_restored<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let fits = Outcome::has_all_of;
    undisturbed_by::<T>(make, "requests in flight over save and restore", "2.7", fits, |bench, _| {
        bench.move_on(make)
    })
}

/// Status, features, size and liveness of each queue, configuration space.
type Found = (u32, u64, Vec<(u32, bool)>, Vec<u8>);

/// What a driver can read of a device without changing what it does.
fn registers<T: DriverTransport>(driver: &VirtioDriver<T>) -> Result<Found> {
    let queues = (0..driver.queue_count()?)
        .map(|index| Ok((driver.queue_max(index)?, driver.transport().queue_is_live(index)?)))
        .collect::<Result<_>>()?;
    let mut config = vec![0; 64];
    // A device may have no such space.
    let _refused = driver.read_config(0, &mut config);
    Ok((driver.status()?, driver.device_features()?, queues, config))
}

/// Save and restore after each step of the initialization (3.1.1) and of the first requests: the registers are as before, and the
/// driver can go on with the next step.
///
/// # Errors
/// [`Error::Lifecycle`] or [`Error::Protocol`].
pub fn restores_at_every_point<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    for (set, wanted) in Bench::<T>::on(make())?.ring_features()?.into_iter().enumerate() {
        // What few features change is in the last steps, and any of the others shows the rest.
        let from = if set % 2 == 0 { 0 } else { POINTS - 4 };
        for point in from..=POINTS {
            let mut bench = Bench::<T>::on(make())?;
            bench.arena = Arena::new(ARENA, MEMORY);
            bring_up_with(&mut bench, wanted, Shape::Request, POINTS, &mut |bench, step| {
                if step != point {
                    return Ok(());
                }
                let before = registers(&bench.driver)?;
                bench.move_on(make)?;
                let after = registers(&bench.driver)?;
                ensure(before == after, "registers after restore", "2.1", || {
                    format!("{after:x?} and not {before:x?}, at point {point}")
                })
            })?;
            let now = bench.driver.status()?;
            ensure(now & status::DRIVER_OK != 0, "status after restore", "2.1", || format!("{now:#x}"))?;
            bench.settle()?;
            bench.move_on(make)?;
            bench.recovers()?;
        }
    }
    Ok(())
}

/// A device that waits for a reset does so after save and restore, and leaves its queues alone; a driver that gave up finds that it
/// did; a reset brings the device back.
///
/// # Errors
/// [`Error::Lifecycle`] or [`Error::Protocol`].
pub fn restores_what_is_broken<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    for (seed, case) in (0..).zip(Hostile::ALL) {
        bench.driver.reset()?;
        bench.arena = Arena::new(ARENA, MEMORY);
        let mut queues = bench.start(u64::MAX)?;
        if let Some(queue) = queues.first_mut() {
            case.apply(queue, &mut bench.arena, &mut Source::seed(seed))?;
        }
        kick_all(&bench)?;
        bench.settle()?;
        let before = bench.driver.status()?;
        bench.move_on(make)?;
        let now = bench.driver.status()?;
        ensure(now == before, "status after restore", "2.1.2", || format!("{now:#x} and not {before:#x}"))?;
        if before & status::NEEDS_RESET != 0 {
            is_still(&bench, "memory of a restored device that needs a reset", "2.1.2")?;
        }
    }
    bench.driver.add_status(status::FAILED)?;
    bench.move_on(make)?;
    let now = bench.driver.status()?;
    ensure(now & status::FAILED != 0, "status after restore", "2.1", || format!("{now:#x}"))?;
    bench.recovers()
}

/// States of which a byte is another, that end early or go on too long, or are nonsense altogether: they are refused or taken, and a
/// device that took one works as one whose driver wrote nonsense. Nothing panics, and nothing goes on for ever.
///
/// # Errors
/// [`Error::Lifecycle`] or [`Error::Protocol`].
pub fn survives_damaged_states<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    // Each format of rings has its own half of the damages: what is checked is the same but for the positions in the rings.
    let formats = Bench::<T>::on(make())?.ring_features()?.into_iter().step_by(2);
    for (half, wanted) in formats.enumerate() {
        let mut bench = Bench::<T>::on(make())?;
        bench.arena = Arena::new(ARENA, MEMORY);
        bring_up_with(&mut bench, wanted, Shape::Request, POINTS, &mut |_, _| Ok(()))?;
        lifecycle(&mut bench, "pause", |device| device.pause())?;
        let good = bodies(&save(&mut bench)?)?;
        for (index, (.., body)) in good.iter().enumerate() {
            let damages = damages(body, &mut Source::seed(index as u64));
            for damaged in damages.into_iter().skip(half).step_by(2) {
                let mut state = good.clone();
                if let Some((.., body)) = state.get_mut(index) {
                    *body = damaged;
                }
                survives_state(&mut bench, make, &state)?;
            }
        }
    }
    Ok(())
}

fn survives_state<T: DriverTransport>(bench: &mut Bench<T>, make: Make<'_>, state: &[Body]) -> Result<()> {
    bench.replace(make)?;
    let name = bench.device.name().to_owned();
    let mut sections = sections(state)?;
    if bench.device.restore(&mut sections.of(&name)).is_err() {
        return Ok(());
    }
    // It may not be able to start. The driver may not find its registers where they were.
    if bench.device.resume().is_ok() && kick_all(bench).is_ok() {
        bench.settle()?;
    }
    Ok(())
}

fn damages(body: &[u8], source: &mut Source<'_>) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (at, flip) in (0..body.len()).zip(FLIPS.into_iter().cycle()) {
        // One of two, in another order at each second byte: both halves of this list have some of all.
        for flip in if at.is_multiple_of(2) { [flip, 0xff] } else { [0xff, flip] } {
            let mut damaged = body.to_vec();
            if let Some(byte) = damaged.get_mut(at) {
                *byte ^= flip;
            }
            all.push(damaged);
        }
        if at.is_multiple_of(8) {
            all.push(body.iter().copied().take(at).collect());
        }
    }
    all.push(body.iter().copied().chain([0]).collect());
    for _ in 0..NONSENSE {
        let random = (0..body.len()).map(|_| source.next_u32().to_le_bytes()[0]);
        all.push(random.collect());
    }
    all
}

/// A device that says of itself that it has no way to be saved: for those that are named in the macro.
///
/// # Errors
/// [`Error::Protocol`] if it has one: then it is to pass the other checks.
pub fn is_not_saved<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    let name = bench.device.name().to_owned();
    let saved = bench.device.save(&mut State::new().of(&name));
    let refused = matches!(saved, Err(freestone_bus::Error::NotSaved { .. }));
    ensure(refused, "a device that is named as one that cannot be saved", "2.7", || format!("{saved:?}"))
}
