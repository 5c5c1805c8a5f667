//! From exec to the guest's first byte: `freestone restore` beside a program of raw calls.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freestone_benches::floor::{self, Host};
use freestone_benches::image::Image;
use freestone_benches::rounds::{self, CycleFrom};
use freestone_benches::saved::Saved;
use freestone_benches::{Fallible, observe};
use freestone_guest::life;
use kvm_bindings::KVM_EXIT_IO;
use serde_json::{Value, json};

use crate::guest::{Raw, micros};

/// Present in the environment of a process that is to be the floor: its folder.
const VARIABLE: &str = "FREESTONE_BENCH_LIFECYCLE_FLOOR";
const COM1: u16 = 0x3F8;
const SIZES: [(&str, u64); 3] = [("128M", 128 << 20), ("1G", 1 << 30), ("4G", 4 << 30)];
/// Writes to COM1 for ever: `mov dx, 0x3F8; mov al, 0; 1: out dx, al; jmp 1b`.
const WRITER: &[u8] = &[0x66, 0xBA, 0xF8, 0x03, 0xB0, 0x00, 0xEE, 0xEB, 0xFD];

/// Makes the command of a subject.
type Make<'a> = Box<dyn Fn() -> Fallible<Command> + 'a>;

/// Runs the floor if this process was started for that.
pub(crate) fn asked() -> Option<Fallible<()>> {
    std::env::var_os(VARIABLE).map(|folder| run(Path::new(&folder)))
}

fn run(folder: &Path) -> Fallible<()> {
    let saved = Saved::from_bytes(&std::fs::read(folder.join("raw"))?).ok_or("no state")?;
    let image = File::open(folder.join("raw-memory"))?;
    let mut vm = floor::Vm::restore(&Host::open()?, &saved, &image)?;
    if vm.run()? != KVM_EXIT_IO {
        return Err("the guest does not write".into());
    }
    let mut out = std::io::stdout();
    out.write_all(&[0])?;
    Ok(out.flush()?)
}

/// The guest: its low byte, forever, on COM1.
fn guest() -> Fallible<Vec<u8>> {
    let mut file = freestone_guest::LIFE.to_vec();
    let (gpa, data) =
        Image::new(freestone_guest::LIFE).ok_or("no image")?.segments().next().ok_or("empty")?;
    let offset = data.as_ptr().addr() - freestone_guest::LIFE.as_ptr().addr();
    for (word, value) in [(life::MODE, 1), (life::PORT, u64::from(COM1)), (life::EVERY, 1)] {
        let at = offset + usize::try_from(life::word(word) - gpa)?;
        file.get_mut(at..at + 8).ok_or("no parameters")?.copy_from_slice(&value.to_le_bytes());
    }
    Ok(file)
}

pub(crate) fn measure(binary: &Path, count: u32) -> Fallible<Vec<Value>> {
    let dir = tempfile::tempdir()?;
    let kernel = dir.path().join("guest");
    std::fs::write(&kernel, guest()?)?;
    let mut results = Vec::new();
    for (label, size) in SIZES {
        let folder = dir.path().join(label);
        std::fs::create_dir(&folder)?;
        let image = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(folder.join("raw-memory"))?;
        let raw = Raw::new(size, WRITER, image)?;
        std::fs::write(folder.join("raw"), raw.saved.to_bytes())?;
        save(binary, dir.path(), &kernel, &folder, label)?;
        let commands: [(&str, Make<'_>); 3] = [
            ("floor", Box::new(|| floor_command(&folder))),
            ("freestone restore", Box::new(|| Ok(restore_command(binary, &folder)))),
            ("floor again", Box::new(|| floor_command(&folder))),
        ];
        let mut series = vec![Vec::new(); commands.len()];
        for round in 0..=count {
            for (at, (_, command)) in commands.iter().enumerate().cycle_from(round as usize) {
                let elapsed = first_byte(command()?)?;
                if let (1.., Some(values)) = (round, series.get_mut(at)) {
                    values.push(micros(elapsed));
                }
            }
        }
        let floor = series.first().cloned().unwrap_or_default();
        let mut lines = Vec::new();
        for ((name, command), values) in commands.iter().zip(&series) {
            let log = dir.path().join("strace.log");
            let calls = observe::calls_until_output(&command()?, &log)?;
            let (median, low) = (rounds::median(values), rounds::percentile(values, 10));
            let (ratio, best) = (rounds::ratio(values, &floor), low / rounds::percentile(&floor, 10));
            let row = if *name == "floor" { format!("exec to first byte {label}") } else { String::new() };
            println!(
                "{row:<46} {name:<18} {median:>11.0} {low:>11.0} {ratio:>7.2} {best:>7.2} {:>6}",
                calls.map_or("-".to_owned(), |calls| calls.to_string()),
            );
            lines.push(json!({
                "subject": name, "median_us": median, "p10_us": low, "ratio": ratio, "best_ratio": best, "calls": calls,
            }));
        }
        results.push(json!({ "row": format!("exec to first byte {label}"), "subjects": lines }));
    }
    Ok(results)
}

/// Runs the guest by `binary`, and saves it to `folder`.
fn save(binary: &Path, runtime: &Path, kernel: &Path, folder: &Path, memory: &str) -> Fallible<()> {
    let name = format!("bench{memory}").to_lowercase();
    let freestone = || {
        let mut command = Command::new(binary);
        command.env("FREESTONE_RUNTIME_DIR", runtime.join("names")).stdout(Stdio::null());
        command
    };
    let mut run = freestone();
    run.args(["run", "--detach", "--rm", "--name", &name, "--memory", memory, "--kernel"]).arg(kernel);
    let mut snapshot = freestone();
    snapshot.args(["snapshot", "create", &name, "--stop"]).arg(folder.join("snapshot"));
    for mut command in [run, snapshot] {
        let status = command.status()?;
        if !status.success() {
            return Err(format!("{command:?} ended with {status}").into());
        }
    }
    Ok(())
}

fn floor_command(folder: &Path) -> Fallible<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(VARIABLE, folder);
    Ok(command)
}

fn restore_command(binary: &Path, folder: &Path) -> Command {
    let mut command = Command::new(binary);
    let folder: PathBuf = folder.join("snapshot");
    command.env_remove("FREESTONE_LOG").arg("restore").arg(folder);
    command
}

/// From before exec to the first byte; the process is ended then.
fn first_byte(mut command: Command) -> Fallible<Duration> {
    use std::io::Read;
    let begin = Instant::now();
    let mut child = observe::spawn(&mut command)?;
    let mut out = child.stdout.take().ok_or("no pipe")?;
    let got = out.read_exact(&mut [0]);
    let elapsed = begin.elapsed();
    end(&mut child)?;
    got.map_err(|e| format!("{command:?} sent nothing: {e}"))?;
    Ok(elapsed)
}

fn end(child: &mut Child) -> Fallible<()> {
    let _ = child.kill();
    child.wait()?;
    Ok(())
}
