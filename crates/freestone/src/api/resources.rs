//! What a machine is to be made of: collected before it starts, checked as it comes, told by `GET /vm/config`.

use std::fs::OpenOptions;
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::model::{
    Balloon, BootSource, CpuConfig, CpuTemplate, Drive, Entropy, HugePages, Logger, MachineConfig,
    MachineUpdate, MemoryHotplug, Metrics, MmdsConfig, NetworkInterface, Pmem, Serial, Vsock,
};

/// What begins the name of a host device that `freestone run --net` would take.
pub(crate) const OWN_NETWORK: &str = "freestone:";
/// The most vCPUs.
const MAX_CPUS: u8 = 32;
/// The smallest unit in which the host sets memory to plug aside, in MiB.
const MIN_SLOT: u32 = 128;
/// The smallest unit in which the guest plugs it, in MiB.
const MIN_BLOCK: u32 = 2;

/// The whole configuration of a machine. As JSON it is the answer to `GET /vm/config`, and a configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct VmResources {
    /// Kernel, initial RAM disk and command line. There before a machine is started, and gone after one is restored.
    pub(crate) boot_source: Option<BootSource>,
    /// Disks: the root, if it is one, is the first.
    pub(crate) drives: Vec<Drive>,
    /// Cards, in the order in which they came.
    pub(crate) network_interfaces: Vec<NetworkInterface>,
    /// vCPUs and memory.
    pub(crate) machine_config: MachineConfig,
    /// Bits of CPUID and MSRs.
    pub(crate) cpu_config: Option<CpuConfig>,
    /// Sockets between guest and host.
    pub(crate) vsock: Option<Vsock>,
    /// The balloon.
    pub(crate) balloon: Option<Balloon>,
    /// Files as persistent memory.
    pub(crate) pmem: Vec<Pmem>,
    /// The entropy device.
    pub(crate) entropy: Option<Entropy>,
    /// The serial port.
    pub(crate) serial: Option<Serial>,
    /// Memory to plug.
    pub(crate) memory_hotplug: Option<MemoryHotplug>,
    /// The metadata service.
    pub(crate) mmds_config: Option<MmdsConfig>,
    /// The log. The API's own matter; here for those who ask.
    pub(crate) logger: Option<Logger>,
    /// Metrics. Likewise.
    pub(crate) metrics: Option<Metrics>,
}

fn bad<T>(message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::bad_request(message))
}

impl VmResources {
    /// Takes everything of `other`, checked as if it had come piece by piece.
    pub(crate) fn take_all(&mut self, other: Self) -> Result<(), Fault> {
        self.set_machine(other.machine_config)?;
        other.boot_source.map_or(Ok(()), |source| self.set_boot_source(source))?;
        other.cpu_config.map_or(Ok(()), |config| self.set_cpu_config(config))?;
        other.drives.into_iter().try_for_each(|drive| self.set_drive(drive))?;
        other.pmem.into_iter().try_for_each(|pmem| self.set_pmem(pmem))?;
        other.network_interfaces.into_iter().try_for_each(|net| self.set_net(net))?;
        other.vsock.map_or(Ok(()), |vsock| self.set_vsock(vsock))?;
        other.balloon.map_or(Ok(()), |balloon| self.set_balloon(balloon))?;
        other.memory_hotplug.map_or(Ok(()), |memory| self.set_memory_hotplug(memory))?;
        other.mmds_config.map_or(Ok(()), |mmds| self.set_mmds(mmds))?;
        self.entropy = other.entropy;
        self.serial = other.serial;
        Ok(())
    }

    /// Whether a machine can be made of this.
    pub(crate) fn check_start(&self) -> Result<(), Fault> {
        if self.boot_source.is_none() {
            return bad("Cannot start the microVM: the boot source is not configured.");
        }
        Ok(())
    }

    pub(crate) fn set_machine(&mut self, config: MachineConfig) -> Result<(), Fault> {
        let MachineConfig { vcpu_count, mem_size_mib, smt, huge_pages, .. } = config;
        if !(1..=MAX_CPUS).contains(&vcpu_count) {
            return bad(format!("vcpu_count: {vcpu_count} is not a number from 1 to {MAX_CPUS}."));
        }
        if smt && vcpu_count > 1 && !vcpu_count.is_multiple_of(2) {
            return bad(format!("vcpu_count: with smt {vcpu_count} has to be 1 or an even number."));
        }
        if mem_size_mib == 0 || mem_size_mib.checked_mul(1 << 20).is_none() {
            return bad(format!("mem_size_mib: {mem_size_mib} is not a size of memory."));
        }
        if huge_pages == HugePages::Size2M && !mem_size_mib.is_multiple_of(2) {
            return bad(format!(
                "mem_size_mib: {mem_size_mib} is not a multiple of the huge pages of 2 MiB."
            ));
        }
        if let Some(template) = config.cpu_template.filter(|&template| template != CpuTemplate::None) {
            return bad(format!(
                "cpu_template: {template:?} is not supported; /cpu-config changes bits of the CPU."
            ));
        }
        if let Some(balloon) = self.balloon {
            check_balloon(balloon.amount_mib, mem_size_mib)?;
        }
        self.machine_config = config;
        Ok(())
    }

    pub(crate) fn update_machine(&mut self, update: &MachineUpdate) -> Result<(), Fault> {
        if *update == MachineUpdate::default() {
            return bad("Empty PATCH request.");
        }
        let now = &self.machine_config;
        self.set_machine(MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(now.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(now.mem_size_mib),
            smt: update.smt.unwrap_or(now.smt),
            cpu_template: update.cpu_template.or(now.cpu_template),
            track_dirty_pages: update.track_dirty_pages.unwrap_or(now.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(now.huge_pages),
        })
    }

    pub(crate) fn set_boot_source(&mut self, source: BootSource) -> Result<(), Fault> {
        check_file("kernel_image_path", &source.kernel_image_path, true, false)?;
        if let Some(path) = &source.initrd_path {
            check_file("initrd_path", path, true, false)?;
        }
        self.boot_source = Some(source);
        Ok(())
    }

    pub(crate) fn set_cpu_config(&mut self, config: CpuConfig) -> Result<(), Fault> {
        config.check()?;
        self.cpu_config = Some(config).filter(|config| !config.is_empty());
        Ok(())
    }

    pub(crate) fn set_drive(&mut self, drive: Drive) -> Result<(), Fault> {
        check_id("drive_id", &drive.drive_id)?;
        if drive.socket.is_some() {
            return bad("socket: backends of vhost-user are not supported.");
        }
        let Some(path) = &drive.path_on_host else {
            return bad("missing field `path_on_host`");
        };
        if drive.is_root_device {
            self.check_root(&drive.drive_id)?;
        }
        check_file("path_on_host", path, true, !drive.is_read_only.unwrap_or(false))?;
        put(&mut self.drives, drive, |drive| &drive.drive_id, |drive| drive.is_root_device);
        Ok(())
    }

    pub(crate) fn set_pmem(&mut self, pmem: Pmem) -> Result<(), Fault> {
        check_id("id", &pmem.id)?;
        if pmem.root_device {
            self.check_root(&pmem.id)?;
        }
        check_file("path_on_host", &pmem.path_on_host, true, !pmem.read_only)?;
        put(&mut self.pmem, pmem, |pmem| &pmem.id, |pmem| pmem.root_device);
        Ok(())
    }

    /// Whether no device but `id` is the root.
    fn check_root(&self, id: &str) -> Result<(), Fault> {
        let drives =
            self.drives.iter().filter(|drive| drive.is_root_device).map(|drive| drive.drive_id.as_str());
        let pmems = self.pmem.iter().filter(|pmem| pmem.root_device).map(|pmem| pmem.id.as_str());
        match drives.chain(pmems).find(|&other| other != id) {
            Some(other) => bad(format!("A root device already exists: {other}.")),
            None => Ok(()),
        }
    }

    pub(crate) fn set_net(&mut self, net: NetworkInterface) -> Result<(), Fault> {
        check_id("iface_id", &net.iface_id)?;
        if let Some(text) = &net.guest_mac {
            check_mac(text)?;
        }
        if let Some(mtu) = net.mtu.filter(|&mtu| mtu < 68) {
            return bad(format!("mtu: {mtu} is not a number from 68 to 65535."));
        }
        check_host_device(&net.host_dev_name)?;
        for other in self.network_interfaces.iter().filter(|other| other.iface_id != net.iface_id) {
            let same = |a: &String, b: &String| a.eq_ignore_ascii_case(b);
            if net
                .guest_mac
                .as_ref()
                .is_some_and(|mac| other.guest_mac.as_ref().is_some_and(|o| same(mac, o)))
            {
                return bad(format!("guest_mac: {:?} has this address already.", other.iface_id));
            }
            if net.host_dev_name == other.host_dev_name && !net.host_dev_name.starts_with(OWN_NETWORK) {
                return bad(format!("host_dev_name: {:?} is plugged into it already.", other.iface_id));
            }
        }
        put(&mut self.network_interfaces, net, |net| &net.iface_id, |_| false);
        Ok(())
    }

    pub(crate) fn set_vsock(&mut self, vsock: Vsock) -> Result<(), Fault> {
        if !(3..u32::MAX).contains(&vsock.guest_cid) {
            let cid = vsock.guest_cid;
            return bad(format!("guest_cid: {cid} is not a number from 3 to 4294967294."));
        }
        if vsock.uds_path.as_os_str().is_empty() {
            return bad("uds_path: it is empty.");
        }
        self.vsock = Some(vsock);
        Ok(())
    }

    pub(crate) fn set_balloon(&mut self, balloon: Balloon) -> Result<(), Fault> {
        check_balloon(balloon.amount_mib, self.machine_config.mem_size_mib)?;
        self.balloon = Some(balloon);
        Ok(())
    }

    /// The balloon, which has to be there.
    pub(crate) fn balloon(&mut self) -> Result<&mut Balloon, Fault> {
        self.balloon.as_mut().ok_or_else(|| Fault::bad_request("There is no balloon device."))
    }

    /// Whether the balloon can have this target.
    pub(crate) fn check_target(&self, mib: u32) -> Result<(), Fault> {
        check_balloon(mib, self.machine_config.mem_size_mib)
    }

    /// Whether the interval of statistics can become this.
    pub(crate) fn check_interval(&mut self, seconds: u16) -> Result<(), Fault> {
        if (self.balloon()?.stats_polling_interval_s == 0) == (seconds == 0) {
            return Ok(());
        }
        bad("stats_polling_interval_s: statistics cannot be turned on or off while the machine runs.")
    }

    pub(crate) fn set_memory_hotplug(&mut self, memory: MemoryHotplug) -> Result<(), Fault> {
        let MemoryHotplug { total_size_mib: total, slot_size_mib: slot, block_size_mib: block } = memory;
        if block < MIN_BLOCK || !block.is_power_of_two() {
            return bad(format!("block_size_mib: {block} is not a power of two from {MIN_BLOCK}."));
        }
        if slot < MIN_SLOT || !slot.is_multiple_of(block) {
            return bad(format!("slot_size_mib: {slot} is not a multiple of {block} from {MIN_SLOT}."));
        }
        if total < slot || !total.is_multiple_of(slot) {
            return bad(format!("total_size_mib: {total} is not a multiple of {slot}."));
        }
        self.memory_hotplug = Some(memory);
        Ok(())
    }

    /// Whether the guest can be asked to use this much of the memory to plug.
    pub(crate) fn check_hotplug(&self, mib: u32) -> Result<(), Fault> {
        let Some(memory) = self.memory_hotplug else {
            return bad("There is no hotpluggable memory.");
        };
        if mib > memory.total_size_mib || !mib.is_multiple_of(memory.block_size_mib) {
            let MemoryHotplug { total_size_mib: total, block_size_mib: block, .. } = memory;
            return bad(format!("requested_size_mib: {mib} is not a multiple of {block} up to {total}."));
        }
        Ok(())
    }

    pub(crate) fn set_mmds(&mut self, mmds: MmdsConfig) -> Result<(), Fault> {
        if mmds.network_interfaces.is_empty() {
            return bad("network_interfaces: the metadata service needs one.");
        }
        let known = |id: &&String| self.network_interfaces.iter().any(|net| net.iface_id == **id);
        if let Some(id) = mmds.network_interfaces.iter().find(|id| !known(id)) {
            return bad(format!("network_interfaces: there is no {id:?}."));
        }
        if !is_link_local(mmds.ipv4_address) {
            return bad(format!("ipv4_address: {} is not a link-local address.", mmds.ipv4_address));
        }
        self.mmds_config = Some(mmds);
        Ok(())
    }

    pub(crate) fn drive(&mut self, id: &str) -> Result<&mut Drive, Fault> {
        find(&mut self.drives, "drive", id, |drive| &drive.drive_id)
    }

    pub(crate) fn net(&mut self, id: &str) -> Result<&mut NetworkInterface, Fault> {
        find(&mut self.network_interfaces, "network interface", id, |net| &net.iface_id)
    }

    pub(crate) fn pmem_device(&mut self, id: &str) -> Result<&mut Pmem, Fault> {
        find(&mut self.pmem, "pmem device", id, |pmem| &pmem.id)
    }
}

/// Replaces what has the same id, where it is; adds what is new at the end. What is `first` goes to the front.
fn put<T>(list: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String, first: impl Fn(&T) -> bool) {
    let place = list.iter().position(|other| id(other) == id(&item));
    if first(&item) {
        if let Some(place) = place {
            list.remove(place);
        }
        list.insert(0, item);
    } else if let Some(other) = place.and_then(|place| list.get_mut(place)) {
        *other = item;
    } else {
        list.push(item);
    }
}

fn find<'a, T>(
    list: &'a mut [T],
    what: &str,
    id: &str,
    key: impl Fn(&T) -> &String,
) -> Result<&'a mut T, Fault> {
    list.iter_mut()
        .find(|item| key(item) == id)
        .ok_or_else(|| Fault::bad_request(format!("There is no {what} {id:?}.")))
}

fn check_id(field: &str, id: &str) -> Result<(), Fault> {
    if id.is_empty() {
        return bad("The ID cannot be empty.");
    }
    if id.chars().all(|c| c.is_alphanumeric() || c == '_') {
        return Ok(());
    }
    bad(format!("{field}: {id:?} has characters that are not letters, digits or underscores."))
}

fn check_mac(text: &str) -> Result<(), Fault> {
    match text.parse::<freestone_vmm::net::MacAddr>() {
        Ok(_) => Ok(()),
        Err(error) => bad(format!("guest_mac: {text:?}: {error}")),
    }
}

fn check_host_device(name: &str) -> Result<(), Fault> {
    if let Some(own) = name.strip_prefix(OWN_NETWORK) {
        let spec = own.parse::<crate::net::NetSpec>();
        return spec.map(drop).or_else(|error| bad(format!("host_dev_name: {error}")));
    }
    // A name of an interface, as the kernel takes it: IFNAMSIZ with its terminator.
    let valid = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | ':');
    if name.is_empty() || name.len() > 15 || !name.chars().all(valid) {
        return bad(format!("host_dev_name: {name:?} is not the name of a network interface."));
    }
    Ok(())
}

fn check_balloon(target: u32, memory: u64) -> Result<(), Fault> {
    if u64::from(target) > memory {
        return bad(format!("amount_mib: {target} is more than the memory of {memory} MiB."));
    }
    Ok(())
}

fn is_link_local(address: Ipv4Addr) -> bool {
    // The first and last 256 are reserved (RFC 3927, 2.1).
    let [_, _, third, _] = address.octets();
    address.is_link_local() && (1..=254).contains(&third)
}

/// Whether a file is there and can be used: told to who names it, not to who starts the machine later.
pub(crate) fn check_file(field: &str, path: &Path, read: bool, write: bool) -> Result<(), Fault> {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY).bits()).unwrap_or(0);
    let file = OpenOptions::new().read(read).write(write).custom_flags(flags).open(path);
    let kind = file.and_then(|file| file.metadata()).map(|metadata| metadata.file_type());
    match kind {
        Ok(kind) if kind.is_file() || kind.is_block_device() => Ok(()),
        Ok(_) => bad(format!("{field}: {path:?} is neither a file nor a block device.")),
        Err(error) => bad(format!("{field}: cannot open {path:?}: {error}.")),
    }
}
