//! What is measured: each row has a floor and what is compared with it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freestone_benches::Fallible;
use freestone_benches::floor::{self, Host, Order};
use freestone_benches::saved::Saved;
use freestone_kvm::Kvm;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::memory::uffd::{PageServer, Uffd};
use freestone_vmm::memory::{GuestMem, GuestMemBuilder};
use freestone_vmm::migrate::{self, MigrateOptions};
use freestone_vmm::snapshot::State;
use freestone_vmm::store::{Kind, StoreOptions, StorePaths, Stored, Template};
use freestone_vmm::{Error, Machine};
use rustix::event::{EventfdFlags, eventfd};

use crate::guest::{
    AT, Raw, SIGNAL, SPIN, Signal, TOUCHED, begin, builder, end, flat, micros, running, writer,
};
use crate::pause;

/// Does it once and answers how many microseconds it took.
pub(crate) type Subject = Box<dyn FnMut() -> Fallible<f64>>;

/// The subjects of a row with their names; the first is the floor.
pub(crate) type Subjects = Vec<(&'static str, Subject)>;

/// Makes the subjects of a row.
type Make = Box<dyn Fn(&Places) -> Fallible<Subjects>>;

/// A row that can be made.
pub(crate) struct Row {
    pub(crate) name: String,
    /// How often less than others it is repeated.
    pub(crate) slow: u32,
    make: Make,
}

impl Row {
    pub(crate) fn make(&self, places: &Places) -> Fallible<Subjects> {
        (self.make)(places)
    }
}

/// Where files are.
pub(crate) struct Places {
    /// In memory.
    pub(crate) tmpfs: PathBuf,
    /// On a disk.
    pub(crate) disk: PathBuf,
}

const MIB: u64 = 1 << 20;
const SIZES: [(&str, u64); 3] = [("128M", 128 * MIB), ("1G", 1024 * MIB), ("4G", 4096 * MIB)];
const PROGRAM: &str = "bench lifecycle";

/// All rows.
pub(crate) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |name: String, slow, make: Make| {
        rows.push(Row { name, slow, make });
    };
    for (label, size) in SIZES {
        add(format!("create {label}"), 1, Box::new(move |_| create(size)));
    }
    for (label, size) in SIZES {
        add(format!("restore {label}"), 1, Box::new(move |places| restore(places, size)));
    }
    for (label, size) in SIZES {
        add(format!("fork {label}"), 1, Box::new(move |_| fork(size)));
    }
    add("pause CPL0".to_owned(), 1, Box::new(|_| pause::pause(pause::Level::Kernel)));
    add("pause CPL3".to_owned(), 1, Box::new(|_| pause::pause(pause::Level::User)));
    add("resume".to_owned(), 1, Box::new(|_| pause::resume()));
    for on_disk in [false, true] {
        let place = if on_disk { "disk" } else { "tmpfs" };
        for (label, size, touched) in
            [("128M", 128, 16), ("128M", 128, 64), ("1G", 1024, 512), ("4G", 4096, 16), ("4G", 4096, 512)]
        {
            let name = format!("snapshot full {label} {touched}M touched {place}");
            add(name, 4, Box::new(move |p| snapshot(p, on_disk, size * MIB, touched * MIB, Kind::Full)));
        }
        for (label, size, touched) in [("128M", 128, 16), ("4G", 4096, 16), ("4G", 4096, 64)] {
            let name = format!("snapshot diff {label} {touched}M written {place}");
            add(name, 4, Box::new(move |p| snapshot(p, on_disk, size * MIB, touched * MIB, Kind::Diff)));
        }
    }
    for (label, size, touched) in [("128M", 128, 16), ("1G", 1024, 512), ("4G", 4096, 512)] {
        for (rate, pages, wait) in [("idle", 0, 0), ("slow writer", 1024, 200), ("fast writer", 4096, 1)] {
            let name = format!("migration {label} {touched}M touched {rate}");
            add(name, 4, Box::new(move |_| migration(size * MIB, touched * MIB, pages, wait)));
        }
    }
    rows
}

fn boxed(subject: impl FnMut() -> Fallible<f64> + 'static) -> Subject {
    Box::new(subject)
}

fn create(size: u64) -> Fallible<Subjects> {
    let (host, kvm) = (Host::open()?, Kvm::open()?);
    let raw = move || {
        let begun = begin();
        let mut vm = floor::Vm::on(&host, size, Order::MemoryFirst)?;
        vm.boot_flat(SIGNAL, AT)?;
        vm.run()?;
        Ok(end(begun))
    };
    let again = raw.clone();
    let library = move || {
        let signal = Arc::new(Signal::default());
        signal.begin();
        let memory = GuestMem::anonymous(size)?;
        let mut machine = builder(&kvm, &signal).memory(memory).payload(flat(SIGNAL)).build()?;
        machine.start()?;
        signal.wait()
    };
    Ok(vec![("floor", boxed(raw)), ("library", boxed(library)), ("floor again", boxed(again))])
}

fn memfd(name: &str) -> Fallible<File> {
    Ok(File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?))
}

/// A template of a machine with `size` bytes, of which 16 MiB were written.
fn template(kvm: &Kvm, size: u64) -> Fallible<Template> {
    let mut machine = running(kvm, GuestMem::anonymous(size)?, SIGNAL, 16 * MIB)?;
    machine.pause()?;
    Ok(machine.paused()?.template(PROGRAM, State::new(), false)?)
}

/// A child of a template, paused.
pub(crate) fn child(kvm: &Kvm, template: &Template, signal: &Arc<Signal>) -> Fallible<Machine<Kvm>> {
    let machine = builder(kvm, signal).memory(template.map(false)?);
    Ok(machine.restore(&mut template.sections()?, ClockPolicy::Continue)?)
}

fn fork(size: u64) -> Fallible<Subjects> {
    let kvm = Kvm::open()?;
    let raw = Arc::new(Raw::new(size, SIGNAL, memfd("floor")?)?);
    let template = template(&kvm, size)?;
    let again = Arc::clone(&raw);
    let library = move || {
        let signal = Arc::new(Signal::default());
        signal.begin();
        let mut machine = child(&kvm, &template, &signal)?;
        machine.resume()?;
        signal.wait()
    };
    Ok(vec![
        ("floor", boxed(move || raw.restore())),
        ("library", boxed(library)),
        ("floor again", boxed(move || again.restore())),
    ])
}

/// Private memory of a child before and after its first instruction, in KiB each: the mean of `count`.
pub(crate) fn private_memory(count: u32) -> Fallible<(f64, f64)> {
    let kvm = Kvm::open()?;
    let template = template(&kvm, 128 * MIB)?;
    let mut children = Vec::new();
    // One that is not counted: what the process needs once.
    let signal = Arc::new(Signal::default());
    children.push((child(&kvm, &template, &signal)?, signal));
    let before = private_kib()?;
    for _ in 0..count {
        let signal = Arc::new(Signal::default());
        children.push((child(&kvm, &template, &signal)?, signal));
    }
    let made = private_kib()?;
    for (machine, signal) in &mut children {
        signal.begin();
        machine.resume()?;
        signal.wait()?;
        machine.pause()?;
    }
    let ran = private_kib()?;
    let each = |kib: f64| (kib - before) / f64::from(count);
    Ok((each(made), each(ran)))
}

fn private_kib() -> Fallible<f64> {
    let smaps = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let private =
        smaps.lines().filter(|line| line.starts_with("Private_Clean") || line.starts_with("Private_Dirty"));
    let kib = private.filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<f64>().ok());
    Ok(kib.sum())
}

fn restore(places: &Places, size: u64) -> Fallible<Subjects> {
    let kvm = Kvm::open()?;
    let folder = tempfile::tempdir_in(&places.disk)?;
    let image = folder.path().join("floor");
    let raw = File::options().read(true).write(true).create_new(true).open(&image)?;
    let raw = Raw::new(size, SIGNAL, raw)?;
    let state = folder.path().join("floor.state");
    std::fs::write(&state, raw.saved.to_bytes())?;
    let host = Arc::clone(&raw.host);
    drop(raw);
    // The floor opens and reads two files, too.
    let raw = move || {
        let begun = begin();
        let saved = Saved::from_bytes(&std::fs::read(&state)?).ok_or("the floor's state is damaged")?;
        let mut vm = floor::Vm::restore(&host, &saved, &File::open(&image)?)?;
        vm.run()?;
        Ok(end(begun))
    };
    let again = raw.clone();

    let mut machine = running(&kvm, GuestMem::anonymous(size)?, SIGNAL, 16 * MIB)?;
    machine.pause()?;
    let paths = StorePaths::in_folder(folder.path());
    machine.paused()?.store(&paths, &StoreOptions::new(PROGRAM), State::new(), &mut |_, _| {})?;
    drop(machine);

    let (same, other, served) = (kvm.clone(), kvm.clone(), paths.clone());
    let opened = paths.clone();
    let library = move || {
        // The folder goes with the subject.
        let _kept = &folder;
        let signal = Arc::new(Signal::default());
        signal.begin();
        let mut stored = Stored::open(&opened)?;
        let memory = stored.map(false)?;
        let mut machine =
            builder(&kvm, &signal).memory(memory).restore(stored.sections(), ClockPolicy::Continue)?;
        stored.finish()?;
        machine.resume()?;
        signal.wait()
    };
    // Once opened, restored often.
    let in_memory = move || {
        let mut stored = Stored::open(&paths)?;
        let signal = Arc::new(Signal::default());
        signal.begin();
        let memory = stored.map(false)?;
        let mut machine =
            builder(&same, &signal).memory(memory).restore(stored.sections(), ClockPolicy::Continue)?;
        machine.resume()?;
        signal.wait()
    };
    let mut subjects = vec![
        ("floor", boxed(raw)),
        ("library", boxed(library)),
        ("library, opened", boxed(in_memory)),
        ("floor again", boxed(again)),
    ];
    if Uffd::new().is_ok() {
        subjects.push(("userfaultfd", boxed(move || by_userfaultfd(&other, &served, size))));
    }
    Ok(subjects)
}

/// Restores with a page server on a thread of this process.
fn by_userfaultfd(kvm: &Kvm, paths: &StorePaths, size: u64) -> Fallible<f64> {
    let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let signal = Arc::new(Signal::default());
    signal.begin();
    let mut stored = Stored::open(paths)?;
    let memory = GuestMemBuilder::new(size).build()?;
    let uffd = Uffd::new()?;
    let regions = uffd.register(&memory)?;
    let mut server = PageServer::new(uffd, regions, stored.memory_file()?.try_clone()?)?;
    let stopped = Arc::clone(&stop);
    let serving = std::thread::spawn(move || {
        use std::os::fd::AsFd;
        server.run(stopped.as_fd())
    });
    let mut machine =
        builder(kvm, &signal).memory(memory).restore(stored.sections(), ClockPolicy::Continue)?;
    machine.resume()?;
    let elapsed = signal.wait();
    machine.stop()?;
    rustix::io::write(&*stop, &1_u64.to_ne_bytes())?;
    serving.join().map_err(|_| "the page server panicked")??;
    elapsed
}

fn snapshot(places: &Places, on_disk: bool, size: u64, touched: u64, kind: Kind) -> Fallible<Subjects> {
    let kvm = Kvm::open()?;
    let folder = tempfile::tempdir_in(if on_disk { &places.disk } else { &places.tmpfs })?;
    let memory = GuestMemBuilder::new(size).dirty_log(true).build()?;
    let mut machine = running(&kvm, memory, SPIN, touched)?;
    machine.pause()?;
    // A difference is not written over its base, which is the one before: they take turns.
    let turns = [folder.path().join("0"), folder.path().join("1")];
    for folder in &turns {
        std::fs::create_dir(folder)?;
    }
    let paths = turns.map(StorePaths::in_folder);
    let [_, last] = paths.clone();
    let mut options = StoreOptions::new(PROGRAM);
    if kind == Kind::Diff {
        let mut paused = machine.paused()?;
        paused.track(true)?;
        paused.store(&last, &options, State::new(), &mut |_, _| {})?;
    }
    options.kind = kind;
    let bytes = usize::try_from(touched)?;
    let raw = folder.path().join("raw");
    let floor = move || write_raw(&raw, bytes, size);
    let mut plain = options.clone();
    plain.checksums = false;
    let shared = Arc::new(std::sync::Mutex::new((machine, folder, 0_usize)));
    let store = |options: StoreOptions| {
        let (shared, paths) = (Arc::clone(&shared), paths.clone());
        move || {
            let mut shared = shared.lock().map_err(|_| "a former round failed")?;
            let (machine, _, turn) = &mut *shared;
            let [even, odd] = &paths;
            let paths = if turn.is_multiple_of(2) { even } else { odd };
            *turn += 1;
            if kind == Kind::Diff {
                crate::guest::touch(machine.memory(), touched)?;
            }
            let mut paused = machine.paused()?;
            let begun = begin();
            paused.store(paths, &options, State::new(), &mut |_, _| {})?;
            Ok(end(begun))
        }
    };
    Ok(vec![
        ("floor", boxed(floor)),
        ("library", boxed(store(options))),
        ("without checksums", boxed(store(plain))),
    ])
}

/// Writes as much to a file aside, syncs it, and renames it.
fn write_raw(path: &Path, bytes: usize, size: u64) -> Fallible<f64> {
    let chunk = vec![0xA5; 1 << 20];
    let begun = begin();
    let aside = path.with_extension("aside");
    let file = File::create(&aside)?;
    file.set_len(size)?;
    for at in (0..bytes).step_by(chunk.len()) {
        file.write_all_at(&chunk, TOUCHED + at as u64)?;
    }
    file.sync_data()?;
    std::fs::rename(&aside, path)?;
    File::open(path.parent().ok_or("no folder")?)?.sync_all()?;
    Ok(end(begun))
}

fn migration(size: u64, touched: u64, pages: u32, wait: u32) -> Fallible<Subjects> {
    let floor = move || copy_over_socket(touched);
    let subject = move |downtime: bool| {
        let kvm = Kvm::open()?;
        let memory = GuestMemBuilder::new(size).dirty_log(true).build()?;
        let code = if pages == 0 { SPIN.to_vec() } else { writer(pages, wait) };
        let mut machine = running(&kvm, memory, &code, touched)?;
        let (mut here, there) = UnixStream::pair()?;
        std::thread::scope(|scope| {
            let target = scope.spawn(|| -> Result<Machine<Kvm>, Error> {
                let signal = Arc::new(Signal::default());
                migrate::receive(there, 1 << 40)?.accept(false, |memory, sections| {
                    builder(&kvm, &signal).memory(memory).restore(sections, ClockPolicy::Continue)
                })
            });
            let mut hello = State::new();
            hello.put(&machine.describe())?;
            let mut options = MigrateOptions::new(PROGRAM);
            options.force = true;
            options.max_rounds = 8;
            begin();
            let sent = migrate::send(&mut here, &mut machine, hello, &options, &mut |_, _| {});
            end(std::time::Instant::now());
            let arrived = target.join().map_err(|_| "the target panicked")?;
            let report = sent?;
            drop(arrived?);
            Ok(micros(if downtime { report.downtime } else { report.total }))
        })
    };
    Ok(vec![
        ("floor", boxed(floor)),
        ("total", boxed(move || subject(false))),
        ("downtime", boxed(move || subject(true))),
    ])
}

/// As many bytes from one thread to another, into memory that is new.
fn copy_over_socket(bytes: u64) -> Fallible<f64> {
    let (mut here, mut there) = UnixStream::pair()?;
    let len = usize::try_from(bytes)?;
    let from = vec![0xA5; 1 << 20];
    let begun = begin();
    let target = std::thread::spawn(move || {
        let mut to = vec![0; len];
        there.read_exact(&mut to).map(|()| to)
    });
    for _ in (0..len).step_by(from.len()) {
        here.write_all(&from)?;
    }
    let copied = target.join().map_err(|_| "the reader panicked")??;
    let elapsed = end(begun);
    drop(copied);
    Ok(elapsed)
}
