//! From what the API collected to the arguments of `freestone run`, and back: a machine is made in one way only.

use std::path::Path;
use std::time::Duration;

use crate::api::fault::Fault;
use crate::api::model::{
    Balloon, BootSource, Drive, Entropy, HugePages, IoEngine, MachineConfig, MemoryHotplug, MmdsConfig,
    MmdsVersion, NetworkInterface, Pmem, RateLimiter, Serial, TokenBucket, Vsock,
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
        let limits = limits("", pmem.rate_limiter);
        push("pmem", format!("path={}{read_only}{limits}", path(&pmem.path_on_host)?));
    }
    if let Some(balloon) = &vm.balloon {
        let on = |on: bool| if on { "on" } else { "off" };
        let stats = match balloon.stats_polling_interval_s {
            0 => String::new(),
            seconds => format!(",stats={seconds}"),
        };
        push(
            "balloon",
            format!(
                "target={}M,deflate-on-oom={},reporting={},hinting={}{stats}",
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
    if let Some(entropy) = vm.entropy {
        push("rng", format!("on{}", limits("", entropy.rate_limiter)));
    }
    if let Some(serial) = vm.serial.as_ref().filter(|serial| **serial != Serial::default()) {
        // A limit alone is one of standard output.
        let out = serial.serial_out_path.as_deref().unwrap_or(Path::new("/dev/stdout"));
        let limit =
            limits("", serial.rate_limiter.map(|bucket| RateLimiter { bandwidth: Some(bucket), ops: None }));
        push("serial", format!("path={}{limit}", path(out)?));
    }
    if let Some(config) = &vm.cpu_config {
        let json = serde_json::to_string(config);
        push("cpu-template", json.map_err(|e| Fault::internal(format!("cpu-config: no JSON: {e}")))?);
    }
    if let Some(mmds) = &vm.mmds_config {
        push("mmds", metadata(mmds));
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
    spec.push_str(&limits("", drive.rate_limiter));
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
    spec.push_str(&limits("rx-", net.rx_rate_limiter));
    spec.push_str(&limits("tx-", net.tx_rate_limiter));
    spec
}

/// The options that limit a device: buckets to the letter.
fn limits(way: &str, limiter: Option<RateLimiter>) -> String {
    let limiter = limiter.unwrap_or_default();
    let mut text = String::new();
    for (what, unit, bucket) in [("bandwidth", "b", limiter.bandwidth), ("iops", "", limiter.ops)] {
        if let Some(TokenBucket { size, one_time_burst, refill_time }) =
            bucket.filter(|bucket| bucket.bucket().is_some())
        {
            let burst = one_time_burst.unwrap_or(0);
            text.push_str(&format!(",{way}{what}={size}{unit}/{burst}{unit}/{refill_time}ms"));
        }
    }
    text
}

fn metadata(mmds: &MmdsConfig) -> String {
    let version = match mmds.version {
        MmdsVersion::V1 => "v1",
        MmdsVersion::V2 => "v2",
    };
    let compat = if mmds.imds_compat { "on" } else { "off" };
    let (cards, address) = (mmds.network_interfaces.join("+"), mmds.ipv4_address);
    format!("cards={cards},ipv4={address},version={version},imds-compat={compat}")
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
            stats_polling_interval_s: balloon.stats.unwrap_or(0),
            free_page_hinting: balloon.hinting,
            free_page_reporting: balloon.reporting,
        }),
        memory_hotplug: run.memory_hotplug.map(|memory| MemoryHotplug {
            total_size_mib: small(memory.most),
            slot_size_mib: 128,
            block_size_mib: memory.block.map_or(2, small),
        }),
        entropy: run.rng.map(|rng| Entropy { rate_limiter: RateLimiter::of(rng.bandwidth, rng.iops) }),
        serial: run.serial.as_ref().map(|serial| Serial {
            serial_out_path: Some(serial.path.clone()),
            rate_limiter: serial.bandwidth.map(TokenBucket::of),
        }),
        ..VmResources::default()
    }
}

fn restored_drive(letter: char, disk: &crate::disk::DiskSpec) -> Drive {
    Drive {
        drive_id: disk.serial.clone().unwrap_or_else(|| format!("vd{letter}")),
        is_read_only: Some(disk.read_only),
        path_on_host: Some(disk.path.clone()),
        rate_limiter: RateLimiter::of(disk.bandwidth, disk.iops),
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
        rx_rate_limiter: RateLimiter::of(net.rx.bandwidth, net.rx.iops),
        tx_rate_limiter: RateLimiter::of(net.tx.bandwidth, net.tx.iops),
    }
}

fn restored_pmem(number: u32, pmem: &crate::specs::PmemSpec) -> Pmem {
    Pmem {
        id: format!("pmem{number}"),
        path_on_host: pmem.path.clone(),
        read_only: pmem.read_only,
        rate_limiter: RateLimiter::of(pmem.bandwidth, pmem.iops),
        ..Pmem::default()
    }
}

/// The interval of statistics; 0 is none.
pub(super) fn interval(seconds: u16) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}
