//! Clients that do what clients should not, while a machine runs and is saved: neither it nor the others wait for them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::vmm::{Vmm, folder, no_kvm};

/// Clients that each began something and do not end it.
fn bad_clients(socket: &Path) -> Vec<UnixStream> {
    let beginnings: [&[u8]; 5] = [
        b"",
        b"GET / HT",
        b"PUT /mmds HTTP/1.1\r\nContent-Length: 50000\r\n\r\n{",
        b"GET /vm/config HTTP/1.1\r\n\r\nGET /",
        b"PUT /mmds HTTP/1.1\r\nX: ",
    ];
    let client = |beginning: &[u8]| {
        let mut stream = UnixStream::connect(socket).unwrap();
        let _ = stream.write_all(beginning);
        stream
    };
    (0..100).map(|number| client(beginnings[number % beginnings.len()])).collect()
}

/// The last round that the guest told.
fn round(dir: &Path) -> u64 {
    let text = fs::read_to_string(dir.join("serial")).unwrap_or_default();
    assert!(!text.contains("BAD"), "{text}");
    let number = |line: &str| line.strip_prefix("life ")?.split(' ').next()?.parse().ok();
    text.lines().filter_map(number).next_back().unwrap_or(0)
}

fn goes_on(dir: &Path) {
    let (before, end) = (round(dir), Instant::now() + Duration::from_secs(120));
    while round(dir) <= before {
        assert!(Instant::now() < end, "the guest stands still at {before}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_machine_runs_and_is_saved_whatever_clients_do() {
    if no_kvm("a_machine_runs_and_is_saved_whatever_clients_do") {
        return;
    }
    let dir = folder();
    let vmm = Vmm::with(dir.path(), "vm", &["--enable-pci"]);
    vmm.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 256}));
    vmm.put(
        "/boot-source",
        &json!({"kernel_image_path": "life", "boot_args": "every=4 spin=2000 memory=256 vsock=off net=off"}),
    );
    vmm.put("/drives/d", &json!({"drive_id": "d", "path_on_host": "disk.img", "is_root_device": false}));
    vmm.put("/serial", &json!({"serial_out_path": "serial"}));
    vmm.put("/actions", &json!({"action_type": "InstanceStart"}));
    goes_on(dir.path());
    let mut clients = bad_clients(&vmm.socket);
    goes_on(dir.path());
    assert_eq!(vmm.get("/")["state"], "Running");
    // Half-closed ones, and what is too large.
    for client in clients.iter().take(50) {
        let _ = client.shutdown(std::net::Shutdown::Write);
    }
    let mut large = UnixStream::connect(&vmm.socket).unwrap();
    let _ = large.write_all(b"PUT /mmds HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n");
    let mut answer = String::new();
    let _ = large.read_to_string(&mut answer);
    assert!(answer.contains(" 413 "), "{answer}");
    vmm.state("Paused");
    let save = json!({"mem_file_path": "mem", "snapshot_path": "state"});
    std::thread::scope(|scope| {
        let saved = scope.spawn(|| vmm.put("/snapshot/create", &save));
        while !saved.is_finished() {
            // Others are answered meanwhile.
            assert_eq!(vmm.get("/")["state"], "Paused");
            clients.extend(UnixStream::connect(&vmm.socket));
            clients.drain(..clients.len().saturating_sub(100));
        }
        saved.join().unwrap();
    });
    vmm.state("Resumed");
    goes_on(dir.path());
    drop(clients);
    assert_eq!(vmm.get("/")["state"], "Running");
}
