//! The lab: a machine emulated by QEMU whose software CPU has AMD's virtualization, so that a true hardware KVM runs where
//! this machine has none.
//!
//! The lab boots once and runs many programs: the host side here talks to an agent inside ([`agent`]) over a virtio-serial
//! port ([`wire`]). Time in the lab is dilated, so nothing in it is a measurement of speed.

pub mod agent;
mod image;
mod wire;

use std::collections::HashMap;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

pub use image::{Contents, Image, build_static};
use wire::Message;

use crate::process::{Event, Order, Process};
use crate::repo::{self, progress};

/// Path of the VMM inside the lab.
pub const VMM: &str = "/bin/freestone";
/// Path of the guest's bzImage inside the lab.
pub const BZIMAGE: &str = "/lab/bzImage";
/// Path of the guest's ELF kernel inside the lab.
pub const VMLINUX: &str = "/lab/vmlinux";
/// Path of the guest's initramfs inside the lab.
pub const INITRAMFS: &str = "/lab/initramfs.cpio";
/// Path of the initramfs with the tools for devices inside the lab.
pub const TOOLS: &str = "/lab/tools.cpio";
/// Path of the 32-bit guest's bzImage inside the lab.
pub const BZIMAGE32: &str = "/lab/bzImage32";
/// Path of the 32-bit guest's initramfs inside the lab.
pub const TOOLS32: &str = "/lab/tools32.cpio";
/// Path of this program inside the lab.
pub const TOOL: &str = "/bin/xtask";
/// Path of `passt` inside the lab, where it is there.
pub const PASST: &str = "/bin/passt";
/// Path of the guest's root disk inside the lab.
pub const ROOT_DISK: &str = "/lab/root.img";

/// Memory of the lab in MiB: a guest of 5 GiB and the lab's own files.
const MEMORY: u32 = 7168;
/// How long the lab may take until its agent answers.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

type Events = Arc<Mutex<HashMap<u32, Sender<Event>>>>;

/// A running lab; it is switched off when the value is dropped.
#[derive(Debug)]
pub struct Lab {
    qemu: Child,
    port: Arc<Mutex<UnixStream>>,
    events: Events,
    next_id: AtomicU32,
    log: PathBuf,
    passt: bool,
    _socket: tempfile::TempDir,
}

impl Lab {
    /// Boots the lab and waits for its agent.
    fn boot(image: &Image) -> Result<Self> {
        // In the system's temporary directory: the path of a socket is limited to some 100 bytes.
        let socket = tempfile::tempdir().context("creating a temporary directory")?;
        let path = socket.path().join("port");
        let log = socket.path().join("console.log");
        let listener =
            UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;

        progress("booting the lab (QEMU, emulated AMD CPU with SVM)");
        let started = Instant::now();
        let mut command = machine(image, "quiet loglevel=3")?;
        command.arg("-serial").arg(format!("file:{}", log.display()));
        command.arg("-chardev").arg(format!("socket,id=port,path={}", path.display()));
        command.args([
            "-device",
            "virtio-serial-pci",
            "-device",
            "virtserialport,chardev=port,name=freestone.lab",
        ]);
        // QEMU warns of CPU features that its software CPU lacks; it also says there why it does not start.
        let messages = fs::File::create(socket.path().join("qemu.log")).context("creating a log file")?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages);
        let mut qemu = command.spawn().with_context(|| format!("starting {}", repo::shown(&command)))?;
        let stream = match accept(&listener, &mut qemu) {
            Ok(stream) => stream,
            Err(error) => {
                drop(qemu.kill());
                drop(qemu.wait());
                let messages = fs::read_to_string(socket.path().join("qemu.log")).unwrap_or_default();
                return Err(error.context(messages));
            }
        };
        let (ready_tx, ready_rx) = channel();
        let events = Events::default();
        receive(stream.try_clone().context("duplicating the socket")?, Arc::clone(&events), ready_tx);
        let lab = Self {
            qemu,
            port: Arc::new(Mutex::new(stream)),
            events,
            next_id: AtomicU32::new(1),
            log,
            passt: image.passt,
            _socket: socket,
        };
        tell(&lab.port, &Message::Ready)?;
        if ready_rx.recv_timeout(BOOT_LIMIT).is_err() {
            bail!("the lab did not come up in {BOOT_LIMIT:?}; its console:\n{}", lab.console());
        }
        progress(format!("the lab is up after {:.1} s", started.elapsed().as_secs_f64()));
        Ok(lab)
    }

    /// Whether [`PASST`] is in it.
    pub fn has_passt(&self) -> bool {
        self.passt
    }

    /// Starts a program in the lab.
    pub fn spawn(&self, argv: &[String]) -> Result<Process> {
        let id = self.next_id();
        let (order_tx, order_rx) = channel();
        let event_rx = self.expect_events(id);
        tell(&self.port, &Message::Start(id, argv.to_vec()))?;
        let port = Arc::clone(&self.port);
        thread::spawn(move || pass_on(&port, id, &order_rx));
        Ok(Process::new(order_tx, event_rx))
    }

    /// `None` while the lab works; the end of its console otherwise.
    pub fn death(&mut self) -> Option<String> {
        match self.qemu.try_wait() {
            Ok(None) => None,
            _ => Some(format!("the lab has ended; its console:\n{}", self.console())),
        }
    }

    /// What the lab's own kernel and first program wrote on their console.
    fn console(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn next_id(&self) -> u32 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn expect_events(&self, id: u32) -> Receiver<Event> {
        let (tx, rx) = channel();
        self.events.lock().unwrap_or_else(PoisonError::into_inner).insert(id, tx);
        rx
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let told = tell(&self.port, &Message::Shutdown);
        for _ in 0..50 {
            if told.is_err() || !matches!(self.qemu.try_wait(), Ok(None)) {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// QEMU's command line, without the serial port. One CPU: with more, QEMU's software CPU corrupts the state of nested
/// guests. Several labs may run at a time instead.
fn machine(image: &Image, cmdline: &str) -> Result<Command> {
    let mut command = repo::program("qemu-system-x86_64")?;
    command.args([
        "-M",
        "q35,accel=tcg,smm=off",
        "-cpu",
        "EPYC",
        "-smp",
        "1",
        "-nodefaults",
        "-display",
        "none",
    ]);
    command.arg("-no-reboot").arg("-m").arg(MEMORY.to_string());
    command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initramfs);
    command.arg("-append").arg(format!("console=ttyS0 panic=-1 mitigations=off {cmdline}"));
    Ok(command)
}

/// Waits for QEMU to connect; fails when it ends instead.
fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream> {
    listener.set_nonblocking(true).context("setting the socket non-blocking")?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).context("setting the socket blocking")?;
            return Ok(stream);
        }
        if let Some(status) = qemu.try_wait().context("waiting for QEMU")? {
            bail!("QEMU ended at its start: {status}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("QEMU did not connect to its port in 30 s")
}

fn tell(port: &Mutex<UnixStream>, message: &Message) -> Result<()> {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    wire::send(&mut *port, message).context("talking to the lab")
}

/// Carries orders for one program into the lab.
fn pass_on(port: &Mutex<UnixStream>, id: u32, orders: &Receiver<Order>) {
    for order in orders {
        let message = match order {
            Order::Input(bytes) => Message::Input(id, bytes),
            Order::CloseInput => Message::CloseInput(id),
            Order::Kill => Message::Kill(id),
        };
        if tell(port, &message).is_err() {
            break;
        }
    }
}

/// Hands the agent's messages to the programs they are about, on a thread of its own. When the lab ends, all senders are
/// dropped, and whoever waits learns of it.
fn receive(mut stream: UnixStream, events: Events, ready: Sender<()>) {
    thread::spawn(move || {
        while let Ok(Some(message)) = wire::receive(&mut stream) {
            let mut events = events.lock().unwrap_or_else(PoisonError::into_inner);
            match message {
                Message::Ready => drop(ready.send(())),
                Message::Output(id, bytes) => drop(events.get(&id).map(|to| to.send(Event::Output(bytes)))),
                Message::Exit(id, status) => drop(events.remove(&id).map(|to| to.send(Event::Exit(status)))),
                _ => {}
            }
        }
        events.lock().unwrap_or_else(PoisonError::into_inner).clear();
    });
}
