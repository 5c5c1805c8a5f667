//! From what the API collected to the arguments of `freestone run`, and back: a machine is made in one way only.

use std::path::Path;
use std::time::Duration;

use crate::api::fault::Fault;
use crate::api::model::{
    Balloon, BootSource, Drive, HugePages, IoEngine, MachineConfig, MemoryHotplug, NetworkInterface, Pmem,
    TokenBucket, Vsock,
};
use crate::api::resources::{OWN_NETWORK, VmResources};
use crate::cli::{MemoryBacking, Run};
use crate::net::{Kind, TapSpec};

/// Bytes of the name that a disk tells its driver.
const MAX_SERIAL: usize = 20;

fn refuse<T>(what: &str) -> Result<T, Fault> {
    Err(Fault::bad_request(format!("Cannot start the microVM: {what}.")))
}

/// A value among options: commas in it are doubled.
fn quoted(text: &str) -> String {
    text.replace(',', ",,")
}

fn path(path: &Path) -> Result<String, Fault> {
    let text = path.to_str().ok_or_else(|| Fault::bad_request(format!("{path:?} is not UTF-8.")))?;
    Ok(quoted(text))
}

/// The arguments that follow `run`.
pub(super) fn to_args(vm: &VmResources, pci: bool) -> Result<Vec<String>, Fault> {
    if vm.cpu_config.is_some() {
        return refuse("cpu-config is not supported");
    }
    let mut args = Vec::new();
    let mut push = |name: &str, value: String| args.push(format!("--{name}={value}"));
    boot(vm, pci, &mut push)?;
    let machine = &vm.machine_config;
    push("cpus", machine.vcpu_count.to_string());
    push("memory", format!("{}M", machine.mem_size_mib));
    push("transport", if pci { "pci" } else { "mmio" }.to_owned());
    if machine.huge_pages == HugePages::Size2M {
        push("memory-backing", "huge2m".to_owned());
    }
    for drive in &vm.drives {
        push("disk", disk(drive)?);
    }
    for net in &vm.network_interfaces {
        push("net", card(net));
    }
    for pmem in &vm.pmem {
        let read_only = if pmem.read_only { ",ro" } else { "" };
        push("pmem", format!("path={}{read_only}", path(&pmem.path_on_host)?));
    }
    if let Some(balloon) = &vm.balloon {
        let on = |on: bool| if on { "on" } else { "off" };
        push(
            "balloon",
            format!(
                "target={}M,deflate-on-oom={},reporting={},hinting={}",
                balloon.amount_mib,
                on(balloon.deflate_on_oom),
                on(balloon.free_page_reporting),
                on(balloon.free_page_hinting)
            ),
        );
    }
    if let Some(vsock) = &vm.vsock {
        push("vsock", format!("path={},cid={}", path(&vsock.uds_path)?, vsock.guest_cid));
    }
    if let Some(memory) = &vm.memory_hotplug {
        push("memory-hotplug", format!("{}M,block={}M", memory.total_size_mib, memory.block_size_mib));
    }
    if vm.entropy.is_some() {
        push("rng", "on".to_owned());
    }
    if machine.track_dirty_pages {
        args.push("--track-dirty".to_owned());
    }
    Ok(args)
}

fn boot(vm: &VmResources, pci: bool, push: &mut impl FnMut(&str, String)) -> Result<(), Fault> {
    let Some(BootSource { kernel_image_path, initrd_path, boot_args }) = &vm.boot_source else {
        return refuse("the boot source is not configured");
    };
    let text = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| Fault::bad_request(format!("{path:?} is not UTF-8.")))
    };
    push("kernel", text(kernel_image_path)?);
    if let Some(initrd) = initrd_path {
        push("initrd", text(initrd)?);
    }
    // What Firecracker says if nobody says anything.
    let default = if pci { "reboot=k panic=1" } else { "reboot=k panic=1 pci=off" };
    let mut line = boot_args.clone().unwrap_or_else(|| default.to_owned());
    let pmem = (0..).zip(&vm.pmem).find(|(_, pmem)| pmem.root_device);
    if let Some(drive) = vm.drives.first().filter(|drive| drive.is_root_device) {
        let mode = if drive.is_read_only.unwrap_or(false) { "ro" } else { "rw" };
        match &drive.partuuid {
            Some(uuid) => line.push_str(&format!(" root=PARTUUID={uuid} {mode}")),
            None => line.push_str(&format!(" root=/dev/vda {mode}")),
        }
    } else if let Some((number, pmem)) = pmem {
        line.push_str(&format!(" root=/dev/pmem{number} {}", if pmem.read_only { "ro" } else { "rw" }));
    }
    push("cmdline", line);
    Ok(())
}

fn disk(drive: &Drive) -> Result<String, Fault> {
    let image = drive.path_on_host.as_deref().unwrap_or(Path::new(""));
    // An image of the API is raw, whatever it looks like. A guest may flush even if it need not.
    let mut spec = format!("path={},format=raw", path(image)?);
    if drive.drive_id.len() <= MAX_SERIAL {
        spec.push_str(&format!(",serial={}", quoted(&drive.drive_id)));
    }
    if drive.is_read_only.unwrap_or(false) {
        spec.push_str(",ro");
    }
    if drive.io_engine == Some(IoEngine::Sync) {
        spec.push_str(",engine=sync");
    }
    Ok(spec)
}

fn card(net: &NetworkInterface) -> String {
    let mut spec = match net.host_dev_name.strip_prefix(OWN_NETWORK) {
        Some(own) => own.to_owned(),
        None => format!("tap={}", quoted(&net.host_dev_name)),
    };
    spec.push_str(&format!(",id={}", quoted(&net.iface_id)));
    if let Some(mac) = &net.guest_mac {
        spec.push_str(&format!(",mac={mac}"));
    }
    if let Some(mtu) = net.mtu {
        spec.push_str(&format!(",mtu={mtu}"));
    }
    let limits = [("rx", net.rx_rate_limiter), ("tx", net.tx_rate_limiter)];
    for (way, limiter) in limits.into_iter().filter_map(|(way, limiter)| Some((way, limiter?))) {
        for (what, bucket) in [("bandwidth", limiter.bandwidth), ("iops", limiter.ops)] {
            if let Some(rate) = bucket.and_then(per_second) {
                spec.push_str(&format!(",{way}-{what}={rate}"));
            }
        }
    }
    spec
}

/// What a bucket comes to in a second, for what knows no other limit.
pub(super) fn per_second(bucket: TokenBucket) -> Option<u64> {
    let bucket = bucket.bucket()?;
    let millis = u64::try_from(bucket.refill_time.as_millis()).ok()?.max(1);
    Some((bucket.size.saturating_mul(1000) / millis).max(1))
}

/// What a restored machine is made of, as the API tells it. Nobody knows any more what it booted.
pub(super) fn from_run(run: &Run) -> VmResources {
    let mib = |bytes: u64| bytes >> 20;
    let small = |bytes: u64| u32::try_from(mib(bytes)).unwrap_or(u32::MAX);
    VmResources {
        machine_config: MachineConfig {
            vcpu_count: u8::try_from(run.cpus).unwrap_or(u8::MAX),
            mem_size_mib: mib(run.memory),
            track_dirty_pages: run.track_dirty,
            huge_pages: match run.memory_backing {
                MemoryBacking::Huge2m => HugePages::Size2M,
                _ => HugePages::None,
            },
            ..MachineConfig::default()
        },
        drives: ('a'..='z').zip(&run.disks).map(|(letter, disk)| restored_drive(letter, disk)).collect(),
        network_interfaces: (0..).zip(&run.nets).map(|(number, net)| restored_net(number, net)).collect(),
        pmem: (0..).zip(&run.pmems).map(|(n, pmem)| restored_pmem(n, pmem)).collect(),
        vsock: run.vsock.as_ref().map(|vsock| Vsock {
            guest_cid: vsock.cid,
            uds_path: vsock.path.clone(),
            vsock_id: None,
        }),
        balloon: run.balloon.map(|balloon| Balloon {
            amount_mib: small(balloon.target),
            deflate_on_oom: balloon.deflate_on_oom,
            stats_polling_interval_s: 0,
            free_page_hinting: balloon.hinting,
            free_page_reporting: balloon.reporting,
        }),
        memory_hotplug: run.memory_hotplug.map(|memory| MemoryHotplug {
            total_size_mib: small(memory.most),
            slot_size_mib: 128,
            block_size_mib: memory.block.map_or(2, small),
        }),
        entropy: run.rng.map(|_| crate::api::model::Entropy::default()),
        ..VmResources::default()
    }
}

fn restored_drive(letter: char, disk: &crate::disk::DiskSpec) -> Drive {
    Drive {
        drive_id: disk.serial.clone().unwrap_or_else(|| format!("vd{letter}")),
        is_read_only: Some(disk.read_only),
        path_on_host: Some(disk.path.clone()),
        ..Drive::default()
    }
}

fn restored_net(number: u32, net: &crate::net::NetSpec) -> NetworkInterface {
    let host_dev_name = match &net.kind {
        Kind::Tap(TapSpec::Named { name, .. }) => name.clone(),
        kind => format!("{OWN_NETWORK}{}", kind.name()),
    };
    NetworkInterface {
        iface_id: net.id.clone().unwrap_or_else(|| format!("net{number}")),
        host_dev_name,
        guest_mac: net.mac.map(|mac| mac.to_string()),
        mtu: net.mtu,
        ..NetworkInterface::default()
    }
}

fn restored_pmem(number: u32, pmem: &crate::specs::PmemSpec) -> Pmem {
    Pmem {
        id: format!("pmem{number}"),
        path_on_host: pmem.path.clone(),
        read_only: pmem.read_only,
        ..Pmem::default()
    }
}

/// The interval of statistics; 0 is none.
pub(super) fn interval(seconds: u16) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}
