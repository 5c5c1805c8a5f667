//! Forks: a template of a machine that stands still, and child machines that are restored from it, each a process of its own.
//!
//! Children share the template's memory until they write to it. Disks that can be written become overlays, in the folder of the child; the
//! image below is then shared for reading, and the machine that it belongs to cannot go on while a child has it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freestone_block::tools::{CreateOptions, create};
use freestone_vmm::State;
use freestone_vmm::block::{self, Hold, ImageFormat};
use freestone_vmm::store::{StorePaths, Stored};
use serde::{Deserialize, Serialize};

use super::config::{Config, ConfigSection};
use super::restore::{disk_names, net_names};
use super::vm::Vm;
use crate::cli::Run;
use crate::disk::Format;
use crate::failure::Failure;
use crate::names::{Claim, Name};
use crate::net::{Kind, TapSpec};
use crate::{options, place};

/// A template, and the files by which other processes restore it.
pub(super) struct Kept {
    state: File,
    memory: Arc<File>,
    /// The machine went on since: this is for children that are being made, and for no others.
    pub(super) stale: bool,
    /// How many are making children.
    users: u32,
}

/// What children are made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ForkSource {
    /// State of the template, for processes of the same user.
    pub(crate) state: PathBuf,
    /// Its memory.
    pub(crate) memory: PathBuf,
    /// Disks of the machine that children read through their overlays.
    pub(crate) shared: Vec<String>,
    /// Whether the machine ran before.
    pub(crate) ran: bool,
    /// Whether it stands still now.
    pub(crate) paused: bool,
    /// How long this took, in microseconds.
    pub(crate) took_us: u64,
}

impl Vm {
    /// Pauses the machine and makes a template of it, unless there is one. Its disks are shared, but for `others`. It goes on if it ran
    /// before and no disk is shared, unless it is to be kept paused. [`fork_end`](Self::fork_end) is to be called when the children are
    /// there.
    pub(crate) fn fork_begin(&mut self, others: &[String], keep_paused: bool) -> Result<ForkSource, Failure> {
        if self.leaving {
            return Err(Failure::new("the machine is on its way to another process"));
        }
        let began = Instant::now();
        let ran = self.machine.state() == State::Running;
        self.pause()?;
        let done = self.fork_paused(others);
        let (shared, goes_on) = match &done {
            Ok(shared) => (shared.clone(), ran && shared.is_empty() && !keep_paused),
            Err(_) => (Vec::new(), ran),
        };
        if goes_on {
            self.go()?;
        }
        done?;
        let path = |fd: i32| PathBuf::from(format!("/proc/{}/fd/{fd}", process::id()));
        let template = self.template.as_ref().ok_or_else(|| Failure::new("there is no template"))?;
        Ok(ForkSource {
            state: path(template.state.as_raw_fd()),
            memory: path(template.memory.as_raw_fd()),
            shared,
            ran,
            paused: !goes_on,
            took_us: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        })
    }

    fn fork_paused(&mut self, others: &[String]) -> Result<Vec<String>, Failure> {
        let mut shared = Vec::new();
        let controls = Arc::clone(&self.controls);
        let files = disk_names(&self.config().parse()?);
        for (name, disk) in &controls.disks {
            if disk.read_only() || others.contains(name) || !files.contains(name) {
                continue;
            }
            disk.set_hold(Hold::Share).map_err(|e| Failure::new(format!("cannot share {name}: {e}")))?;
            shared.push(name.clone());
        }
        match &mut self.template {
            Some(template) if !template.stale => template.users += 1,
            _ => {
                let template = self.template()?;
                let (state, memory) = (template.state_file()?, Arc::clone(template.memory_file()));
                self.template = Some(Kept { state, memory, stale: false, users: 1 });
            }
        }
        Ok(shared)
    }

    /// The children are made: the template goes, unless it is of use for others.
    pub(crate) fn fork_end(&mut self) {
        if let Some(template) = &mut self.template {
            template.users = template.users.saturating_sub(1);
        }
        self.drop_template();
    }

    pub(super) fn drop_template(&mut self) {
        self.template.take_if(|template| template.stale && template.users == 0);
    }

    /// Has the machine's files for itself again.
    pub(super) fn own(&mut self) -> Result<(), Failure> {
        for (name, disk) in &self.controls.disks {
            let shared = disk.hold() == Hold::Share;
            disk.set_hold(Hold::Own).map_err(|error| match shared {
                true if error.kind() == std::io::ErrorKind::WouldBlock => Failure::new(format!(
                    "the machine cannot go on while others read its disk {name}: machines that were forked from it"
                )),
                _ => Failure::new(format!("cannot have the disk {name} back: {error}")),
            })?;
        }
        if std::mem::take(&mut self.gave_pmem) {
            for (name, pmem) in &self.controls.pmems {
                let failed = |e| Failure::new(format!("cannot have the persistent memory {name} back: {e}"));
                pmem.set_owned(true).map_err(failed).inspect_err(|_| self.gave_pmem = true)?;
            }
        }
        Ok(())
    }

    /// Gives all files of the machine, which is paused, to whoever takes it over.
    pub(super) fn disown(&mut self) -> Result<(), Failure> {
        for (name, disk) in &self.controls.disks {
            let failed = |e| Failure::new(format!("cannot give up the disk {name}: {e}"));
            disk.set_hold(Hold::None).map_err(failed)?;
        }
        self.gave_pmem = true;
        for (name, pmem) in &self.controls.pmems {
            let failed = |e| Failure::new(format!("cannot give up the persistent memory {name}: {e}"));
            pmem.set_owned(false).map_err(failed)?;
        }
        Ok(())
    }
}

/// What children are to be.
#[derive(Debug, Clone)]
pub(crate) struct ForkRequest {
    /// They are called PREFIX-1 and so on.
    pub(crate) prefix: Name,
    /// Number of the first.
    pub(crate) first: u32,
    /// How many.
    pub(crate) count: u32,
    /// `NAME=SPEC` of disks, where `{}` or `%d` is the number of the child.
    pub(crate) disks: Vec<String>,
    /// The same of network cards.
    pub(crate) nets: Vec<String>,
    /// The same of persistent memories.
    pub(crate) pmems: Vec<String>,
    /// Where each gets one more control socket, `NAME.sock`.
    pub(crate) sockets: Option<PathBuf>,
    /// Path of the vsock device's sockets, in the same way.
    pub(crate) vsock: Option<String>,
    /// Whether they do not go on yet.
    pub(crate) paused: bool,
}

impl ForkRequest {
    /// The disks that are given anew.
    pub(crate) fn others(&self) -> Vec<String> {
        self.disks.iter().filter_map(|text| Some(text.split_once('=')?.0.to_owned())).collect()
    }
}

/// A child that runs.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its name.
    pub(crate) name: Name,
    /// Its process.
    pub(crate) process: process::Child,
    /// How long it took to make.
    pub(crate) took: Duration,
}

/// Makes children of a template, one after the other, and gives each to `made`. Blocks: not for a machine's own thread.
pub(crate) fn fork(
    source: &ForkSource,
    request: &ForkRequest,
    made: &mut dyn FnMut(Child) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut stored = Stored::open(&StorePaths::files(&source.state, &source.memory))?;
    let config = Config::try_from(stored.sections().take::<ConfigSection>()?)?;
    let run = config.parse()?;
    let template = Parent { source, request, config: &config, run: &run };
    template.check()?;
    for number in (request.first..).take(usize::try_from(request.count)?) {
        let began = Instant::now();
        let prefix = &request.prefix;
        let name = prefix.numbered(number).map_err(|e| Failure::usage(format!("{prefix}-{number}: {e}")))?;
        let (name, process) = place::spawn_with(Some(&name), |claim| template.arguments(claim, number))
            .map_err(|e| Failure::with_status(format!("child {name}: {e}"), e.status()))?;
        made(Child { name, process, took: began.elapsed() })?;
    }
    Ok(())
}

/// Of what children are made.
struct Parent<'a> {
    source: &'a ForkSource,
    request: &'a ForkRequest,
    config: &'a Config,
    run: &'a Run,
}

impl Parent<'_> {
    /// Whether there is something that only one machine can have, said before there is a child.
    fn check(&self) -> Result<(), Failure> {
        let given = |texts: &[String], name: &str| {
            texts.iter().any(|text| text.split_once('=').is_some_and(|(other, _)| other == name))
        };
        for (name, net) in net_names(self.run).iter().zip(&self.run.nets) {
            if given(&self.request.nets, name) {
                continue;
            }
            let place = match &net.kind {
                Kind::Tap(TapSpec::Named { name, .. }) if name.contains('%') => continue,
                Kind::Tap(TapSpec::Named { name, .. }) => format!("the interface {name}"),
                Kind::Tap(TapSpec::Inherited(_)) => "an interface that it was given".to_owned(),
                Kind::Stream(_) => "a stream socket".to_owned(),
                Kind::Switch(_) => {
                    tracing::warn!("{name}: all children have the same address on the switch");
                    continue;
                }
                Kind::User(config) => {
                    if config.forwards.iter().any(|forward| forward.host.port() != 0) {
                        tracing::warn!(
                            "{name}: the host's side of forwards is the port and the child's number"
                        );
                    }
                    continue;
                }
                Kind::Absent => continue,
            };
            return Err(Failure::usage(format!(
                "{name} is plugged into {place}, which only one machine can have: say --net {name}=... (to the API: \
                 network_overrides), with {{}} for the child's number"
            )));
        }
        for (number, pmem) in self.run.pmems.iter().enumerate() {
            let name = format!("pmem{number}");
            if !pmem.read_only && !given(&self.request.pmems, &name) {
                return Err(Failure::usage(format!(
                    "{name} can be written, so only one machine can have it: say --pmem {name}=..., with {{}} for the \
                     child's number"
                )));
            }
        }
        Ok(())
    }

    /// The arguments of a child's process, which restores it. Its overlays are made.
    fn arguments(&self, claim: &Claim, number: u32) -> Result<Vec<OsString>, Failure> {
        let request = self.request;
        let mut words: Vec<OsString> = vec!["restore".into(), "--detach".into()];
        let mut push = |option: &str, value: &str| words.push(format!("--{option}={value}").into());
        push("name", claim.name().as_str());
        push("state", &self.source.state.to_string_lossy());
        push("memory", &self.source.memory.to_string_lossy());
        let disks = self.config.values("--disk");
        for ((name, disk), text) in disk_names(self.run).iter().zip(&self.run.disks).zip(disks) {
            if self.source.shared.contains(name) {
                if disk.format == Format::Probe {
                    // The guest may have written a header meanwhile, which could name any file.
                    return Err(Failure::usage(format!(
                        "the format of {name} was guessed: start the machine with format=raw or format=qcow2"
                    )));
                }
                let format = block::choose(&disk.path, disk.format.choice())?;
                let path = claim.file(&format!("{name}.qcow2"));
                overlay(&path, &disk.path, format)?;
                push("disk", &format!("{name}={}", over(text, &path)));
            }
        }
        let others = net_names(self.run).into_iter().zip(self.config.values("--net"));
        for (name, text) in others {
            if let Some(text) = net(text, number).map_err(|e| Failure::usage(format!("{name}: {e}")))? {
                push("net", &format!("{name}={text}"));
            }
        }
        for (option, values) in [("disk", &request.disks), ("net", &request.nets), ("pmem", &request.pmems)] {
            values.iter().for_each(|value| push(option, &numbered(value, number)));
        }
        match (&request.vsock, &self.run.vsock) {
            (Some(text), _) => push("vsock", &numbered(text, number)),
            (None, Some(vsock)) => {
                let path = vsock.path.to_string_lossy().replace(',', ",,");
                push("vsock", &format!("path={path}-{number},cid={}", vsock.cid));
            }
            (None, None) => {}
        }
        if let Some(folder) = &request.sockets {
            push("control", &folder.join(format!("{}.sock", claim.name())).to_string_lossy());
        }
        if request.paused {
            words.push("--paused".into());
        }
        Ok(words)
    }
}

/// Makes an empty image over that of the template.
fn overlay(path: &Path, base: &Path, format: ImageFormat) -> Result<(), Failure> {
    let name = base.to_str().ok_or_else(|| Failure::new(format!("the name {base:?} is not UTF-8")))?;
    let mut options = CreateOptions::new(ImageFormat::Qcow2, 0);
    options.size = None;
    options.backing = Some((name.to_owned(), format));
    Ok(create(path, &options)?)
}

/// A disk's description with an overlay in place of its image.
fn over(text: &str, path: &Path) -> String {
    let rest = options::without(text, &["path", "format", "backing", "direct", "engine"], false);
    let path = path.to_string_lossy().replace(',', ",,");
    let comma = if rest.is_empty() { "" } else { "," };
    format!("path={path},format=qcow2,backing=on{comma}{rest}")
}

/// A card's description for child `number`, if it is another than the template's: other ports of the host, and no recording.
fn net(text: &str, number: u32) -> Result<Option<String>, String> {
    let own = options::without(text, &["pcap", "mirror"], true);
    let mut wrong = None;
    let moved = options::map(&own, |_, key, value| {
        let (host, guest) = value.split_once('-').filter(|_| key == Some("hostfwd"))?;
        let (host, port) = host.rsplit_once(':')?;
        let port: u16 = port.parse().ok().filter(|&port| port != 0)?;
        let moved = u16::try_from(number).ok().and_then(|number| port.checked_add(number));
        if moved.is_none() {
            return Some(String::new());
        }
        Some(format!("{host}:{}-{guest}", moved?))
    });
    if moved.split(',').any(|part| part == "hostfwd=") {
        wrong = Some(format!("there is no port of the host that is {number} after one of its forwards"));
    }
    match wrong {
        Some(wrong) => Err(wrong),
        None => Ok((moved != text).then_some(moved)),
    }
}

/// Puts the child's number where the text says `{}` or `%d`.
fn numbered(text: &str, number: u32) -> String {
    text.replace("{}", &number.to_string()).replace("%d", &number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_number_is_put_into_what_it_is_given() {
        assert_eq!(numbered("vda=c-{}.img,serial={}", 7), "vda=c-7.img,serial=7");
        assert_eq!(numbered("net0=tap=child%d,up=on", 12), "net0=tap=child12,up=on");
    }

    #[test]
    fn an_overlay_keeps_what_is_not_about_the_file() {
        let over = |text| over(text, Path::new("/x/vda.qcow2"));
        assert_eq!(over("disk.img"), "path=/x/vda.qcow2,format=qcow2,backing=on");
        assert_eq!(
            over("path=a,,b.img,direct,queues=2,engine=uring,format=raw,iops=5"),
            "path=/x/vda.qcow2,format=qcow2,backing=on,queues=2,iops=5"
        );
    }

    #[test]
    fn forwards_of_children_do_not_meet() {
        let text = "user,hostfwd=tcp::8000-:80,hostfwd=udp:127.0.0.1:53-:53,hostfwd=tcp::0-:22,pcap=x";
        let moved = net(text, 3).unwrap().unwrap();
        assert_eq!(moved, "user,hostfwd=tcp::8003-:80,hostfwd=udp:127.0.0.1:56-:53,hostfwd=tcp::0-:22");
        assert_eq!(net("user,mtu=1400", 3).unwrap(), None);
        assert!(net("user,hostfwd=tcp::65535-:80", 1).unwrap_err().contains("port"));
        assert!(net("user,hostfwd=tcp::1-:80", 70_000).is_err());
    }
}
