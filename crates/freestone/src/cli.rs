//! The command line.

use std::path::{Path, PathBuf};

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand};
use freestone_vmm::net::mmds::MmdsStore;

use crate::completions::Completions;
use crate::control::Ctl;
use crate::disk::DiskSpec;
use crate::lifecycle::{
    ConsoleArgs, Fork, Logs, Many, Migrate, Ps, Receive, Restore, Rm, Snapshot, StatsArgs, Stop,
};
use crate::metadata::MmdsSpec;
use crate::net::{self, NetSpec};
use crate::place::PlaceArgs;
use crate::size;
use crate::specs::{BalloonSpec, CpuSpec, HotplugSpec, PmemSpec, RngSpec, SerialSpec, VsockSpec};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// What `--net` takes, at length: not a documentation comment, where brackets would be links.
const NET_HELP: &str = "\
Attach a network card. May be repeated: they are net0, net1, and so on. What it is plugged into comes first:

user: the guest goes out by connections of this process, with DHCP and DNS and no privileges. \
hostfwd=tcp|udp:[ADDR]:PORT-[ADDR]:PORT leads a port of the host to the guest, guestfwd=tcp:ADDR:PORT-TARGET an \
address in the guest's network to cmd:PROGRAM, unix:PATH or tcp:ADDR:PORT. allow= and deny=NETWORK[:PORTS][/tcp|udp] \
decide in order what it may reach; internet-only=on is the Internet without the host and private networks; restrict=on \
shuts it in. Addresses: net=10.0.2.0/24, host=, guest= (or dhcpstart=), dns=, ipv6-net=, ipv6-host=, ipv6-dns=, \
ipv4=off, ipv6=off. Names: hostname=, domainname=, resolver=ADDR[:PORT]. Limits: max-tcp=N, max-udp=N.

tap=NAME: an interface of the host, which is made if it is not there; up=on brings it up. tap,fd=N: a descriptor of \
one.

switch=NAME or switch=PATH: a switch that machines share. Options: vlan=N; trunk=N+N-N (vlan= is then that of frames \
without a tag); isolated=on; pin=on; mirror=FILE records what passes the switch.

stream=PATH or stream=tcp:ADDR:PORT: a socket with QEMU, passt or another machine at its other end. Options: \
server=on; reconnect=SECONDS or off.

none: no card.

Options of every card: mac=52:54:00:00:00:01; mtu=N; queues=N; pcap=FILE records all frames; bandwidth=SIZE and iops=N \
limit each way in a second, rx-bandwidth=, rx-iops=, tx-bandwidth=, tx-iops= one; link=off; thread=on or off; id=NAME.";

/// The reference virtual machine monitor made of the Freestone crates.
#[derive(Debug, Parser)]
#[command(name = "freestone", version, styles = STYLES, max_term_width = 100, propagate_version = true)]
#[command(
    after_help = "Start with `freestone run`: it boots a small built-in guest. `freestone doctor` tells whether this \
                        host can run virtual machines, and how to mend it if not."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// What to log on standard error: error, warn, info, debug, trace, or a filter such as `freestone_virtio=debug`.
    #[arg(long, global = true, value_name = "FILTER", default_value = "warn", env = "FREESTONE_LOG")]
    pub(crate) log: String,
}

#[derive(Debug, Subcommand)]
// Only the arguments of the command that is given are put together.
#[command(defer = true)]
pub(crate) enum Command {
    /// Run a virtual machine with its console on this terminal.
    Run(Box<Run>),
    /// List machines: those that run, or all.
    Ps(Ps),
    /// Have guest and devices of machines stand still.
    Pause(Many),
    /// Have paused machines go on.
    Resume(Many),
    /// Stop machines: ask the guest to power off, and end what does not.
    Stop(Stop),
    /// Kill the processes of machines.
    Kill(Many),
    /// Remove what is left of machines that do not run any more.
    Rm(Rm),
    /// Show what a detached machine wrote.
    Logs(Logs),
    /// Connect this terminal with the console of a detached machine. Ctrl-A x leaves it.
    Console(ConsoleArgs),
    /// Show what a machine costs: exits, queues, memory, processor time.
    Stats(StatsArgs),
    /// Show what all machines cost, as it happens: exits, queues, memory, processor time.
    Top(crate::top::Top),
    /// Save machines to files, and describe, check and join what was saved.
    Snapshot(Snapshot),
    /// Run a machine that was saved.
    Restore(Box<Restore>),
    /// Fill the memory of restored machines from a snapshot, page by page as they ask for it.
    PageServer(crate::page_server::PageServerArgs),
    /// Make many machines of one, that share its memory until they write to it.
    Fork(Fork),
    /// Send a running machine to another process, here or on another host, where it goes on.
    Migrate(Migrate),
    /// Wait for a machine that another process sends, and run it.
    Receive(Box<Receive>),
    /// Ask a running machine: statistics, disks, balloon, memory, network.
    Ctl(Ctl),
    /// Show and change the network of a running machine: cards, forwards, flows, counters, links.
    Net(net::Net),
    /// Tell what this host can do for virtual machines, and how to mend what it cannot.
    Doctor(Doctor),
    /// Make, describe, check and convert disk images.
    Image(crate::image::Image),
    /// Serve Firecracker's API, by Firecracker's own command line.
    Firecracker(Box<crate::firecracker::Firecracker>),
    /// Print what a shell needs to complete this command line.
    Completions(Completions),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone run
      Boot the built-in guest: it checks CPU, memory and devices and powers off.
  freestone run --kernel bzImage --initrd initrd.img --memory 1G --cpus 2
      Boot a Linux kernel to its initramfs.
  freestone run --kernel vmlinux --disk root.img --disk data.img,ro
      Boot from a disk; the second disk cannot be written.
  freestone run --kernel vmlinux --disk path=root.qcow2,format=qcow2,queues=2 --control vm.ctl
      Boot from a qcow2 image with two queues; `freestone ctl vm.ctl stats` shows what they do.
  freestone run --kernel vmlinuz --memory 256M --cpus 1 --disk root.qcow2,format=qcow2 \\
      --net user,hostfwd=tcp::1234-:22
      The classic small machine: it reaches the net, and port 1234 of this host is its port 22.
  freestone run --rng --vsock vm.sock
      Entropy and sockets to the host.

On a terminal, Ctrl-A x stops the machine and Ctrl-A h lists the other keys.

Exit status:
  0  the guest powered off            3  the guest reset (reboot)
  1  something failed on the host     4  the guest's kernel panicked, then reset or powered off
  2  wrong usage                      5  the guest crashed (triple fault, bad instruction)
                                    130  stopped by Ctrl-A x or a signal")]
pub(crate) struct Run {
    /// Take options from a TOML file, in front of those on the command line: `memory = "1G"`, `disk = ["root.img", "data.img,ro"]`,
    /// `rng = true`. Relative paths in it begin at its folder.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Kernel to boot: an uncompressed ELF (vmlinux), a bzImage, or a PVH ELF. Without it, the built-in guest.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,

    /// Kernel command line [default with --kernel: "console=ttyS0 panic=-1" (hvc0 with --console virtio), pci=off with
    /// --transport mmio, and root=/dev/vda if there is a disk but no initrd].
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,

    /// How to enter the kernel.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Protocol::Auto, requires = "kernel")]
    pub(crate) protocol: Protocol,

    /// Number of virtual CPUs, 1 to 254.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=254))]
    pub(crate) cpus: u32,

    /// Guest memory: 512M, 4G, 1.5GiB; a bare number is MiB.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse_memory)]
    pub(crate) memory: u64,

    /// What guest memory is made of in the host.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = MemoryBacking::Anonymous)]
    pub(crate) memory_backing: MemoryBacking,

    /// Touch all guest memory before the guest starts, so that it never waits for a page.
    #[arg(long)]
    pub(crate) prefault: bool,

    /// Log what guest and devices write, so that snapshots can be made of the differences only.
    #[arg(long)]
    pub(crate) track_dirty: bool,

    /// How the guest finds its virtio devices.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Transport::Pci)]
    pub(crate) transport: Transport,

    /// Attach a disk image. May be repeated: the first is /dev/vda, then vdb, and so on. The built-in guest has a vda of its own.
    ///
    /// Options: ro; format=raw, qcow2 or probe; backing=on; queues=N; engine=auto, sync or uring; cache=writeback or writethrough;
    /// direct; serial=TEXT; block-size=512 or 4096; bandwidth=SIZE and iops=N (in a second, or of a bucket:
    /// SIZE/BURST/TIME); thread=on or off. A comma in a
    /// name is written twice.
    ///
    /// An image is raw unless it was made as something else by `freestone image create`, or a format is given. `probe` goes by
    /// what the file looks like: never use it for a raw image that a guest has written. backing=on lets the image read
    /// further files that it names.
    #[arg(long = "disk", value_name = "FILE[,OPTION...]", value_parser = clap::value_parser!(DiskSpec))]
    pub(crate) disks: Vec<DiskSpec>,

    /// Attach a network card. May be repeated: they are net0, net1, and so on.
    #[arg(long = "net", long_help = NET_HELP, value_name = "KIND[,OPTION...]", value_parser = clap::value_parser!(NetSpec))]
    pub(crate) nets: Vec<NetSpec>,

    /// Attach an entropy source (/dev/hwrng). Options: bandwidth=SIZE and iops=N limit what the guest gets in a second.
    #[arg(long, value_name = "OPTION,...", num_args = 0..=1, default_missing_value = "on")]
    pub(crate) rng: Option<RngSpec>,

    /// Attach a memory balloon. Options: target=SIZE that the guest gives up at first, deflate-on-oom=off, reporting=off,
    /// hinting=on.
    #[arg(long, value_name = "OPTION,...", num_args = 0..=1, default_missing_value = "on")]
    pub(crate) balloon: Option<BalloonSpec>,

    /// Attach sockets between guest and host (vsock). A program of the host connects to SOCKET and says `CONNECT port`; a
    /// connection of the guest to port P of the host (CID 2) arrives at SOCKET_P. cid=N is the guest's number, 3 if not said.
    #[arg(long, value_name = "SOCKET[,cid=N]")]
    pub(crate) vsock: Option<VsockSpec>,

    /// Attach a file as persistent memory (/dev/pmem0). Its size is a multiple of 2M. Options: ro, reserve=off (leave holes in
    /// the file). May be repeated.
    #[arg(long = "pmem", value_name = "FILE[,OPTION...]")]
    pub(crate) pmems: Vec<PmemSpec>,

    /// Let memory be plugged and unplugged while the guest runs, up to MOST. Options: requested=SIZE at first; block=SIZE, the
    /// unit, 2M or more.
    #[arg(long, value_name = "MOST[,OPTION...]")]
    pub(crate) memory_hotplug: Option<HotplugSpec>,

    /// Which console of the guest is on this terminal.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = ConsoleKind::Serial)]
    pub(crate) console: ConsoleKind,

    /// Append the output of the first serial port to a file or a named pipe. Options: bandwidth=SIZE drops what is more.
    #[arg(long, value_name = "FILE[,OPTION]")]
    pub(crate) serial: Option<SerialSpec>,

    /// Change bits of CPUID and MSRs: the JSON of a custom CPU template of Firecracker.
    #[arg(long, value_name = "JSON")]
    pub(crate) cpu_template: Option<CpuSpec>,

    /// Cards that lead to the metadata service, which the API fills.
    #[arg(long, value_name = "CARD+...[,OPTION...]", hide = true)]
    pub(crate) mmds: Option<MmdsSpec>,

    /// What the API knows of the machine.
    #[arg(long, value_name = "JSON", hide = true)]
    pub(crate) api_config: Option<String>,

    /// What the metadata service says.
    #[arg(skip)]
    pub(crate) metadata: Option<MmdsStore>,

    #[command(flatten)]
    pub(crate) place: PlaceArgs,

    /// Count exits, as with `stats`, but do not print them.
    #[arg(skip)]
    pub(crate) count_exits: bool,

    /// Listen for `freestone ctl` at this socket.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) control: Option<PathBuf>,

    /// Print how often each vCPU left the guest, and why, when the machine ends.
    #[arg(long)]
    pub(crate) stats: bool,
}

impl Run {
    /// Has all relative paths begin at `folder`.
    pub(crate) fn make_absolute(&mut self, folder: &Path) {
        let join = |path: &mut PathBuf| *path = folder.join(&*path);
        let single = [&mut self.kernel, &mut self.initrd, &mut self.control];
        single.into_iter().flatten().for_each(join);
        self.serial.iter_mut().for_each(|serial| join(&mut serial.path));
        self.vsock.iter_mut().for_each(|vsock| join(&mut vsock.path));
        self.disks.iter_mut().for_each(|disk| join(&mut disk.path));
        self.pmems.iter_mut().for_each(|pmem| join(&mut pmem.path));
        self.nets.iter_mut().for_each(|net| net.make_absolute(folder));
    }
}

/// How virtio devices are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    /// As functions of PCI, with an interrupt for each queue.
    Pci,
    /// By registers at addresses that ACPI tells; no PCI at all.
    Mmio,
}

/// Consoles of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ConsoleKind {
    /// The first serial port: ttyS0.
    Serial,
    /// A virtio console: hvc0. There is no serial port then. Not for the built-in guest.
    Virtio,
}

/// How to enter a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    /// PVH if the image has a PVH note, the Linux protocol that fits the image otherwise.
    Auto,
    /// PVH, in 32-bit protected mode.
    Pvh,
    /// The 64-bit Linux boot protocol.
    #[value(alias = "linux64")]
    Linux,
    /// The 32-bit Linux boot protocol.
    Linux32,
}

/// Host memory behind the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MemoryBacking {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd that other processes can share.
    Memfd,
    /// Huge pages of 2 MiB (the host must have set them aside: vm.nr_hugepages).
    Huge2m,
    /// Huge pages of 1 GiB.
    Huge1g,
}

#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 if this host can run virtual machines, 1 if it cannot.")]
pub(crate) struct Doctor {
    /// Print the findings as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
