//! The program that runs inside the lab and starts what the host side asks for.
//!
//! It speaks [`super::wire`] over a virtio-serial port and ends when the host side says so or goes away; the lab's first
//! program then switches the machine off.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::wire::{self, Message};
use crate::process::{self, Event, Order};

/// The port's end that all threads write to, one message at a time.
type Port = Arc<Mutex<File>>;

/// Serves the port at `path` until the host side ends it.
pub fn serve(path: &Path) -> Result<()> {
    let mut input = open(path)?;
    let port: Port = Arc::new(Mutex::new(input.try_clone().context("duplicating the port")?));
    let mut running: HashMap<u32, Sender<Order>> = HashMap::new();
    let mut first = Some(first_message(&mut input)?);
    while let Some(message) =
        first.take().map_or_else(|| wire::receive(&mut input), |first| Ok(Some(first)))?
    {
        match message {
            Message::Ready => tell(&port, &Message::Ready)?,
            Message::Start(id, argv) => match start(&port, id, &argv) {
                Ok(orders) => drop(running.insert(id, orders)),
                Err(error) => fail(&port, id, &error)?,
            },
            Message::Input(id, bytes) => order(&running, id, Order::Input(bytes)),
            Message::CloseInput(id) => order(&running, id, Order::CloseInput),
            Message::Kill(id) => order(&running, id, Order::Kill),
            Message::Shutdown => break,
            Message::Output(..) | Message::Exit(..) => {}
        }
    }
    Ok(())
}

/// Opens the port, which appears some time after its driver was loaded.
fn open(path: &Path) -> Result<File> {
    let mut tries = 0;
    loop {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => return Ok(file),
            Err(error) if tries == 200 => {
                return Err(error).with_context(|| format!("opening {}", path.display()));
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
        tries += 1;
    }
}

/// Waits for the host side's first message. Until the driver has learnt that the host side is connected, the port reads
/// as ended.
fn first_message(input: &mut File) -> Result<Message> {
    for _ in 0..200 {
        if let Some(message) = wire::receive(input)? {
            return Ok(message);
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("the host side did not connect")
}

fn tell(port: &Port, message: &Message) -> Result<()> {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    wire::send(&mut *port, message)
}

fn fail(port: &Port, id: u32, error: &anyhow::Error) -> Result<()> {
    tell(port, &Message::Output(id, format!("{error:#}\n").into_bytes()))?;
    tell(port, &Message::Exit(id, 127))
}

fn order(running: &HashMap<u32, Sender<Order>>, id: u32, order: Order) {
    if let Some(orders) = running.get(&id) {
        drop(orders.send(order));
    }
}

/// Starts a program and a thread that carries its events to the host side.
fn start(port: &Port, id: u32, argv: &[String]) -> Result<Sender<Order>> {
    let (order_tx, order_rx) = channel();
    let (event_tx, event_rx) = channel();
    process::spawn_with(argv, order_rx, event_tx)?;
    let port = Arc::clone(port);
    thread::spawn(move || {
        for event in event_rx {
            let message = match event {
                Event::Output(bytes) => Message::Output(id, bytes),
                Event::Exit(status) => Message::Exit(id, status),
            };
            if tell(&port, &message).is_err() {
                break;
            }
        }
    });
    Ok(order_tx)
}
