//! The side at which the machine arrives.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use freestone_hypervisor::Hypervisor;
use freestone_hypervisor::x86::{HostCpu, VcpuState};
use freestone_memory::image::ImageLayout;
use freestone_memory::layout::PAGE_SIZE;
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemBuilder};
use freestone_snapshot::{Arch, Limits, Reader, Sections};
use freestone_vcpu::compat::{self, Severity};
use freestone_vcpu::state::VcpuSection;
use rustix::fs::MemfdFlags;

use super::wire::{Frame, MAX_BODY, Run, expect, get, put, refuse, wrong};
use crate::saved::MachineSection;
use crate::store::{self, MemorySection};
use crate::{Error, Machine, Result};

const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// A machine on its way: what it is made of is known, nothing of it is here yet.
#[derive(Debug)]
pub struct Arriving<S> {
    stream: S,
    hello: Sections,
    machine: MachineSection,
    layout: ImageLayout,
}

/// Waits for the first word of a source. `most` is the most guest memory that is taken, in bytes.
///
/// # Errors
/// If what comes is no migration that this version understands, or the machine is too large: the source is told.
pub fn receive<S: Read + Write>(mut stream: S, most: u64) -> Result<Arriving<S>> {
    match begin(&mut stream, most) {
        Ok((hello, machine, layout)) => Ok(Arriving { stream, hello, machine, layout }),
        Err(error) => {
            refuse(&mut stream, &error);
            Err(error)
        }
    }
}

fn begin(stream: &mut (impl Read + Write), most: u64) -> Result<(Sections, MachineSection, ImageLayout)> {
    let mut hello = sections(stream, Frame::Hello, &mut Vec::new())?;
    let machine: MachineSection = hello.take()?;
    let layout = hello.take::<MemorySection>()?.layout()?;
    machine.check_layout(&layout)?;
    if layout.size() > most {
        return Err(wrong(format!("the machine has {} bytes of memory: at most {most}", layout.size())));
    }
    Ok((hello, machine, layout))
}

/// Reads sections that come in frames of one kind.
fn sections(stream: &mut (impl Read + Write), frame: Frame, first: &mut Vec<u8>) -> Result<Sections> {
    let mut bytes = std::mem::take(first);
    let mut last = if bytes.is_empty() { MAX_BODY } else { bytes.len() };
    let limits = Limits::default();
    let mut body = Vec::new();
    while last == MAX_BODY {
        expect(stream, &mut body, frame)?;
        last = body.len();
        bytes.extend_from_slice(&body);
        if u64::try_from(bytes.len()).is_ok_and(|len| len > limits.in_memory) {
            return Err(wrong(format!("a state of more than {} bytes came", limits.in_memory)));
        }
    }
    let reader = Reader::new(bytes.as_slice(), limits)?;
    reader.header().check_arch(Arch::host())?;
    Ok(Sections::load(reader)?)
}

impl<S: Read + Write> Arriving<S> {
    /// What the machine is made of: the sections of the source's own.
    pub fn hello(&mut self) -> &mut Sections {
        &mut self.hello
    }

    /// The shape of the machine.
    pub fn machine(&self) -> &MachineSection {
        &self.machine
    }

    /// Compares the source's processor with this host's, if the source [described](crate::Machine::describe_cpu) it. What the guest may notice
    /// is logged.
    ///
    /// # Errors
    /// [`Error::Migration`] with what the guest would miss here: the machine is then to be [refused](Self::refuse).
    pub fn check_cpu(&mut self, host: &HostCpu) -> Result<()> {
        let Some(section) = self.hello.take_instance_if_present::<VcpuSection>("0")? else { return Ok(()) };
        let found = compat::check(&VcpuState::try_from(section)?, host);
        let (refused, noticed): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|mismatch| mismatch.severity == Severity::Refuse);
        for mismatch in noticed {
            tracing::warn!("the machine that arrives: {mismatch}");
        }
        if refused.is_empty() {
            return Ok(());
        }
        Err(wrong(refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))
    }

    /// Tells the source that this side cannot take the machine.
    pub fn refuse(mut self, error: &Error) {
        refuse(&mut self.stream, error);
    }

    /// Takes the machine. When its memory and state are here, `build` makes it, as after a [restore](crate::MachineBuilder::restore), of the memory and
    /// the state that it is given; it must be paused. It then goes on when the source says so, and is given back running.
    ///
    /// # Errors
    /// If the stream fails or `build` does: the source is told, and goes on itself.
    pub fn accept<H, M>(
        mut self,
        log: bool,
        build: impl FnOnce(GuestMem, &mut Sections) -> std::result::Result<M, Error>,
    ) -> Result<M>
    where
        H: Hypervisor,
        M: AsMut<Machine<H>>,
    {
        let mut made = self.take_over(log, build).inspect_err(|error| refuse(&mut self.stream, error))?;
        put(&mut self.stream, Frame::Ready, &[])?;
        expect(&mut self.stream, &mut Vec::new(), Frame::Go)?;
        made.as_mut().resume()?;
        // The machine runs: that the source does not hear of it changes nothing.
        if let Err(error) = put(&mut self.stream, Frame::Running, &[]) {
            tracing::warn!(%error, "the source does not learn that the machine runs here");
        }
        Ok(made)
    }

    fn take_over<H, M>(
        &mut self,
        log: bool,
        build: impl FnOnce(GuestMem, &mut Sections) -> std::result::Result<M, Error>,
    ) -> Result<M>
    where
        H: Hypervisor,
        M: AsMut<Machine<H>>,
    {
        let ram = self.machine.ram();
        let below: u64 = ram.iter().map(|range| range.len).sum();
        let memory = GuestMemBuilder::with_ranges(ram).dirty_log(log).build()?;
        // What devices plug in is not there before they are: it waits in a file in memory.
        let beside = if self.layout.size() > below { Some(beside(self.layout.size())?) } else { None };
        put(&mut self.stream, Frame::Accepted, &[])?;
        let mut body = Vec::new();
        loop {
            match get(&mut self.stream, &mut body)? {
                Frame::Pages => pages(&memory, beside.as_deref(), &self.layout, &body)?,
                Frame::State => break,
                frame => return Err(wrong(format!("{frame:?} came among the pages"))),
            }
        }
        let mut state = sections(&mut self.stream, Frame::State, &mut body)?;
        let mut made = build(memory, &mut state)?;
        if let Some(file) = &beside {
            store::fill(file, &self.layout, &self.machine, made.as_mut().memory())?;
        }
        state.finish()?;
        Ok(made)
    }
}

fn beside(size: u64) -> Result<Arc<File>> {
    let failed = |errno: rustix::io::Errno| Error::Io { op: "make a file in memory", source: errno.into() };
    let fd = rustix::fs::memfd_create("freestone-arriving", MemfdFlags::CLOEXEC).map_err(failed)?;
    rustix::fs::ftruncate(&fd, size).map_err(failed)?;
    Ok(Arc::new(File::from(fd)))
}

/// Puts the pages of a frame where they belong.
fn pages(memory: &GuestMem, beside: Option<&File>, layout: &ImageLayout, body: &[u8]) -> Result<()> {
    let view = memory.view();
    let mut rest = body;
    // No page comes twice in a frame, so that no frame takes longer than memory is large.
    let mut most = layout.size() / PAGE_SIZE;
    while !rest.is_empty() {
        let run = Run::decode(&mut rest)?;
        most =
            most.checked_sub(run.pages.into()).ok_or_else(|| wrong("a frame has more pages than memory"))?;
        for page in 0..u64::from(run.pages) {
            let gpa = page.checked_mul(PAGE_SIZE).and_then(|offset| run.gpa.checked_add(offset));
            let gpa = gpa.filter(|gpa| gpa.is_multiple_of(PAGE_SIZE));
            let offset = gpa.and_then(|gpa| layout.offset_of(gpa));
            let (Some(gpa), Some(offset)) = (gpa, offset) else {
                return Err(wrong(format!("a page came for {:#x}, where no memory is", run.gpa)));
            };
            let bytes = if run.data {
                let Some((bytes, behind)) = rest.split_first_chunk::<PAGE>() else {
                    return Err(wrong(format!("the page for {gpa:#x} is cut off")));
                };
                rest = behind;
                bytes
            } else {
                &ZEROS
            };
            if view.write_slice(bytes, GuestAddress(gpa)).is_err() {
                let file =
                    beside.ok_or_else(|| wrong(format!("a page came for {gpa:#x}, where no RAM is")))?;
                file.write_all_at(bytes, offset)
                    .map_err(|source| Error::Io { op: "write to a file in memory", source })?;
            }
        }
    }
    Ok(())
}
