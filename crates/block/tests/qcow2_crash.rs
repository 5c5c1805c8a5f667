//! A process that writes is killed at a random moment: the image is consistent, and every flushed write is in it.
#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "this test takes what it needs")]
mod common;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Random, Window, folder, path, text};
use freestone_block::tools::{CreateOptions, check_qcow2, create, repair_qcow2};
use freestone_block::{Image, ImageFormat, Qcow2Options};

const CHILD: &str = "FREESTONE_TEST_CRASH";
const THREADS: u64 = 2;
/// Blocks of each thread.
const BLOCKS: u64 = 2000;

/// What a block holds after step `step` of thread `thread`; 0: zeroes.
fn contents(thread: u64, step: u64, block: usize) -> Vec<u8> {
    let word = if step == 0 { 0 } else { step << 8 | thread << 1 | 1 };
    word.to_le_bytes().repeat(block / 8)
}

/// The process that is killed; nothing unless it is told what to do. Each thread notes a step before it takes it, and a flush after
/// it is done.
#[test]
fn child() {
    let Some(order) = std::env::var_os(CHILD) else { return };
    let order = order.into_string().unwrap();
    let [image, block, seed] = order.split('|').collect::<Vec<_>>().try_into().unwrap();
    let (block, seed): (usize, u64) = (block.parse().unwrap(), seed.parse().unwrap());
    let disk = Qcow2Options::new().open(image).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let disk = &disk;
            scope.spawn(move || {
                let mut log =
                    OpenOptions::new().append(true).create(true).open(format!("{image}.{thread}")).unwrap();
                let mut random = Random(seed * 97 + thread + 1);
                let window = Window::new();
                for step in 1.. {
                    let at = random.below(BLOCKS);
                    let offset = (thread * BLOCKS + at) * block as u64;
                    match random.below(12) {
                        0 => {
                            disk.flush().unwrap();
                            writeln!(log, "f").unwrap();
                        }
                        1 => {
                            log.write_all(format!("z {at} 0\n").as_bytes()).unwrap();
                            disk.write_zeroes(offset, block as u64, step % 2 == 0).unwrap();
                        }
                        _ => {
                            log.write_all(format!("w {at} {step}\n").as_bytes()).unwrap();
                            window.write(disk, offset, &contents(thread, step, block)).unwrap();
                        }
                    }
                }
            });
        }
    });
}

/// The steps that each block may be at: the one it had at the last flush, and all after it.
fn possible(log: &str) -> HashMap<u64, Vec<u64>> {
    let mut blocks: HashMap<u64, Vec<u64>> = HashMap::new();
    // The last line may be cut off; its step was not taken then.
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    for line in whole.lines() {
        let mut words = line.split(' ');
        if words.next() == Some("f") {
            for steps in blocks.values_mut() {
                steps.drain(..steps.len() - 1);
            }
        } else {
            let [at, step] = [words.next(), words.next()].map(|word| word.unwrap().parse::<u64>().unwrap());
            blocks.entry(at).or_insert_with(|| vec![0]).push(step);
        }
    }
    blocks
}

fn kill_and_look(image: &Path, block: usize, random: &mut Random) {
    let order = format!("{}|{block}|{}", text(image), random.below(1 << 30));
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, order)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(150 + random.below(350)));
    child.kill().unwrap();
    child.wait().unwrap();

    let report = check_qcow2(image).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
    if let Ok(output) = Command::new("qemu-img").args(["check", "-f", "qcow2", text(image)]).output() {
        // 0: clean, 3: leaks.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stdout));
    }
    let disk = Qcow2Options::new().read_only(true).open(image).unwrap();
    let window = Window::new();
    let mut flushed = 0;
    for thread in 0..THREADS {
        let log = std::fs::read_to_string(format!("{}.{thread}", text(image))).unwrap_or_default();
        flushed += log.matches('f').count();
        for (at, steps) in possible(&log) {
            let found = window.read(&disk, (thread * BLOCKS + at) * block as u64, block).unwrap();
            let known = steps.iter().any(|&step| found == contents(thread, step, block));
            assert!(known, "block {at} of thread {thread}: {steps:?} but {:x?}", found.get(..8));
        }
    }
    assert!(flushed > 0, "the child had time to flush");
}

fn survives(cluster: u64, block: usize, seed: u64, version: u32) {
    let mut random = Random(seed);
    for _ in 0..7 {
        let dir = folder();
        let image = path(&dir, "a.qcow2");
        let mut options = CreateOptions::new(ImageFormat::Qcow2, THREADS * BLOCKS * block as u64);
        options.cluster_size = cluster;
        options.version = version;
        create(&image, &options).unwrap();
        kill_and_look(&image, block, &mut random);
        let report = repair_qcow2(&image).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.problems);
        assert_eq!(check_qcow2(&image).unwrap().leaks, 0);
        File::open(&image).unwrap();
    }
}

#[test]
fn large_clusters_survive_a_kill() {
    survives(65536, 4096, 1, 3);
}

#[test]
fn small_clusters_survive_a_kill() {
    survives(512, 512, 2, 3);
}

#[test]
fn version_2_survives_a_kill() {
    survives(4096, 4096, 3, 2);
}
