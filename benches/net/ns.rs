//! Network namespaces with a tap in them, and processes: agents that do the guest's part, and NATs.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use freestone_benches::Fallible;
use freestone_net::Bridge;
use freestone_net::nat::{Forward, Nat, NatConfig, Protocol};
use freestone_net::tap::{Tap, TapOptions};

use crate::traffic::{self, Task};

/// Where agents in a namespace listen.
pub const GUEST_PORT: u16 = 7777;

/// A namespace of its own; it is removed with this.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one.
    pub fn new(purpose: &str) -> Fallible<Self> {
        let name = format!("freestone-{purpose}-{}", std::process::id());
        ip(&["netns", "add", &name])?;
        let this = Self { name };
        this.ip(&["link", "set", "lo", "up"])?;
        Ok(this)
    }

    fn ip(&self, words: &[&str]) -> Fallible<()> {
        ip(&[&["-n", &self.name], words].concat())
    }

    /// Takes the tap `name` in, as the only card of a guest with QEMU's addresses.
    pub fn adopt(&self, tap: &str) -> Fallible<()> {
        ip(&["link", "set", tap, "netns", &self.name])?;
        self.ip(&["addr", "add", "10.0.2.15/24", "dev", tap])?;
        self.ip(&["link", "set", tap, "up"])?;
        self.ip(&["route", "add", "default", "via", "10.0.2.2"])
    }

    /// Takes the tap `name` in, without an address.
    pub fn take_in(&self, tap: &str) -> Fallible<()> {
        ip(&["link", "set", tap, "netns", &self.name])?;
        self.ip(&["link", "set", tap, "up"])
    }

    /// A command that runs in it.
    pub fn command(&self, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn ip(words: &[&str]) -> Fallible<()> {
    let out = Command::new("ip").args(words).output().map_err(|e| format!("cannot start ip: {e}"))?;
    match out.status.success() {
        true => Ok(()),
        false => {
            let why = String::from_utf8_lossy(&out.stderr);
            Err(format!("ip {}: {}", words.join(" "), why.trim()).into())
        }
    }
}

/// A process that is ended with this.
#[derive(Debug)]
pub struct Process(pub Child);

impl Process {
    /// Processor time that all its threads used so far, in seconds.
    pub fn processor_time(&self) -> f64 {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", self.0.id())) else { return f64::NAN };
        let ns = tasks.flatten().filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<f64>().ok()
        });
        ns.sum::<f64>() * 1e-9
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Does tasks in another process, as it is told line by line.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    tell: ChildStdin,
    hear: BufReader<ChildStdout>,
    /// The port it listens on.
    pub port: u16,
}

impl Agent {
    /// Starts this program as an agent, in `namespace` or beside us.
    pub fn start(namespace: Option<&Namespace>) -> Fallible<Self> {
        let program = std::env::current_exe()?;
        let mut command = match namespace {
            Some(namespace) => namespace.command(&program),
            None => Command::new(&program),
        };
        command.args(["--agent", if namespace.is_some() { "7777" } else { "0" }]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (tell, hear) = (child.stdin.take().ok_or("no pipe")?, child.stdout.take().ok_or("no pipe")?);
        let mut this = Self { process: Process(child), tell, hear: BufReader::new(hear), port: 0 };
        let mut line = String::new();
        this.hear.read_line(&mut line)?;
        this.port = line.trim().parse().map_err(|_| "the agent did not start")?;
        Ok(this)
    }

    /// Has it begin a task.
    pub fn begin(&mut self, task: Task) -> Fallible<()> {
        writeln!(self.tell, "{task}")?;
        Ok(self.tell.flush()?)
    }

    /// What came of it.
    pub fn finish(&mut self) -> Fallible<Vec<f64>> {
        let mut line = String::new();
        self.hear.read_line(&mut line)?;
        match line.trim().strip_prefix("ok") {
            Some(values) => Ok(values.split_whitespace().map(str::parse).collect::<Result<_, _>>()?),
            None if line.is_empty() => {
                Err(format!("the agent is gone: {:?}", self.process.0.try_wait()?).into())
            }
            None => Err(line.trim().into()),
        }
    }
}

/// The agent's own main program.
pub fn agent(port: u16) -> Fallible<()> {
    let listener: TcpListener = traffic::listen(Ipv4Addr::UNSPECIFIED, port)?;
    println!("{}", listener.local_addr()?.port());
    for line in std::io::stdin().lines() {
        match line?.parse::<Task>()?.run(&listener) {
            Ok(values) => {
                let values: Vec<String> = values.iter().map(f64::to_string).collect();
                println!("ok {}", values.join(" "));
            }
            Err(error) => println!("{error}"),
        }
    }
    Ok(())
}

/// A port of the host's loopback that nobody uses now.
pub fn free_port() -> Fallible<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// QEMU's slirp between a tap called `tap` and the host; `forward` leads to the agent.
pub fn slirp(tap: &str, forward: SocketAddr) -> Fallible<Process> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
    command.arg("-netdev").arg(format!("tap,id=t,ifname={tap},script=no,downscript=no,vnet_hdr=on"));
    command.arg("-netdev").arg(format!("user,id=u,hostfwd=tcp:{forward}-:{GUEST_PORT}"));
    command.args(["-netdev", "hubport,id=h0,hubid=0,netdev=t", "-netdev", "hubport,id=h1,hubid=0,netdev=u"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    came_up(Process(child), tap)
}

/// This program as a NAT of Freestone between a tap and the host.
pub fn freestone(tap: &str, forward: SocketAddr) -> Fallible<Process> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--nat", tap, "--forward", &forward.to_string()]);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    came_up(Process(child), tap)
}

/// Waits until the process has made its tap.
fn came_up(mut process: Process, tap: &str) -> Fallible<Process> {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(10) {
        if let Some(status) = process.0.try_wait()? {
            return Err(format!("ended with {status}").into());
        }
        if std::path::Path::new("/sys/class/net").join(tap).exists() {
            return Ok(process);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(format!("made no tap {tap}").into())
}

/// The main program of a NAT between a tap and the host: it ends when standard input does.
pub fn nat(tap: &str, forward: Option<SocketAddr>) -> Fallible<()> {
    let mut config = NatConfig::default();
    config.limits.new_flows = u32::MAX;
    if let Some(host) = forward {
        let (protocol, guest_port) = (Protocol::Tcp, GUEST_PORT);
        config.forwards.push(Forward { protocol, host, guest_addr: None, guest_port });
    }
    // Both are kept while the bridge is there.
    let (mut nat, mut tap) = (Nat::new(config)?, Tap::open(&TapOptions::new(tap))?);
    Ok(Bridge::open(&mut tap, &mut nat)?.run_until(std::io::stdin())?)
}
