//! The built-in guest on a terminal, and the terminal afterwards.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

/// A pseudo-terminal: our side and the program's.
struct Terminal {
    ours: File,
    theirs: OwnedFd,
}

impl Terminal {
    fn open() -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let theirs = open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        Self { ours: File::from(ours), theirs }
    }

    fn mode(&self) -> Termios {
        tcgetattr(&self.theirs).unwrap()
    }

    fn is_raw(&self) -> bool {
        !self.mode().local_modes.contains(LocalModes::ICANON)
    }

    fn spawn(&self, args: &[&str]) -> Child {
        let end = || Stdio::from(self.theirs.try_clone().unwrap());
        Command::new(env!("CARGO_BIN_EXE_freestone"))
            .args(args)
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap()
    }

    /// Reads until `text` appears.
    fn expect(&mut self, text: &str) -> String {
        let mut seen = String::new();
        let mut buffer = [0; 4096];
        while !seen.contains(text) {
            let n = self.ours.read(&mut buffer).unwrap();
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        seen
    }

    fn assert_restored(&self, before: &Termios) {
        let after = self.mode();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.input_modes, before.input_modes);
        assert_eq!(after.output_modes, before.output_modes);
        assert_eq!(after.control_modes, before.control_modes);
    }
}

fn wait(mut child: Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    panic!("freestone did not end");
}

fn no_kvm(test: &str) -> bool {
    freestone_testkit::dev_kvm_usable().inspect_err(|reason| freestone_testkit::skip(test, reason)).is_err()
}

/// A guest that echoes lines and has begun to, its terminal, and the mode that this had before.
fn echo_on_a_terminal() -> (Terminal, Termios, Child) {
    let mut terminal = Terminal::open();
    let before = terminal.mode();
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(freestone_guest::ECHO).unwrap();
    let child = terminal.spawn(&["run", "--kernel", kernel.path().to_str().unwrap()]);
    // The kernel is in guest memory by then, and its file may go.
    terminal.expect("end with quit");
    (terminal, before, child)
}

#[test]
fn the_built_in_guest_passes_and_leaves_the_terminal_as_it_was() {
    if no_kvm("the_built_in_guest_passes_and_leaves_the_terminal_as_it_was") {
        return;
    }
    let mut terminal = Terminal::open();
    let before = terminal.mode();
    let child = terminal.spawn(&["run"]);
    let text = terminal.expect("checks passed");
    assert!(text.contains("virtio-blk"), "{text}");
    assert_eq!(wait(child), Some(0));
    terminal.assert_restored(&before);
}

#[test]
fn the_terminal_is_raw_while_the_guest_runs_and_ctrl_a_x_ends_it() {
    if no_kvm("the_terminal_is_raw_while_the_guest_runs_and_ctrl_a_x_ends_it") {
        return;
    }
    let (mut terminal, before, child) = echo_on_a_terminal();
    assert!(terminal.is_raw());
    // Ctrl-C is the guest's, not ours.
    terminal.ours.write_all(b"\x03typed\r").unwrap();
    terminal.expect("typed");
    terminal.ours.write_all(b"\x01x").unwrap();
    assert_eq!(wait(child), Some(130));
    terminal.assert_restored(&before);
}

#[test]
fn a_signal_ends_the_machine_in_order_and_the_terminal_is_restored() {
    if no_kvm("a_signal_ends_the_machine_in_order_and_the_terminal_is_restored") {
        return;
    }
    let (terminal, before, child) = echo_on_a_terminal();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(wait(child), Some(130));
    terminal.assert_restored(&before);
}

#[test]
fn an_error_after_the_command_line_leaves_the_terminal_as_it_was() {
    let terminal = Terminal::open();
    let before = terminal.mode();
    let child = terminal.spawn(&["run", "--kernel", "/nonexistent/kernel"]);
    assert_eq!(wait(child), Some(1));
    terminal.assert_restored(&before);
}

#[test]
fn a_closed_standard_output_does_not_stop_the_guest() {
    if no_kvm("a_closed_standard_output_does_not_stop_the_guest") {
        return;
    }
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let child = Command::new(env!("CARGO_BIN_EXE_freestone"))
        .arg("run")
        .stdin(Stdio::null())
        .stdout(write)
        .spawn()
        .unwrap();
    assert_eq!(wait(child), Some(0));
}
