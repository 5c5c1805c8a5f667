//! Frames from the driver to the port (5.1.6.2).

use freestone_net::{Frame, Sent};

use super::header::{self, HEADER_LEN, Refusal};
use super::worker::{BURST, Io, Turn};
use crate::Result;
use crate::queue::ChainBuffers;

/// Why no more frames are taken from the driver for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intake {
    /// There are none, or it is the other direction's turn.
    Open,
    /// The port has no room.
    Busy,
    /// The rate limit says so.
    Limited,
}

impl Turn<'_, '_, '_> {
    /// Takes frames from the driver.
    pub(super) fn transmit(&mut self) -> Result<Intake> {
        let Self { tx: Some(tx), io, batch, budget, buffers, .. } = self else { return Ok(Intake::Open) };
        tx.queue.disable_kicks()?;
        for _ in 0..BURST {
            if *budget == 0 {
                break;
            }
            if let Some(gate) = &io.tx_gate
                && gate.is_limited()
                && tx.queue.has_next()?
                && !gate.open()
            {
                return Ok(Intake::Limited);
            }
            let Some(chain) = tx.queue.pop(buffers)? else { break };
            let bytes = u64::from(buffers.readable_len()).saturating_sub(HEADER_LEN as u64);
            if io.transmit(buffers)? == Sent::Busy {
                tx.queue.undo(chain);
                io.count(|stats| stats.tx_busy.add(1));
                return Ok(Intake::Busy);
            }
            *budget -= 1;
            if let Some(gate) = &io.tx_gate {
                gate.charge(bytes);
            }
            tx.queue.push_used(chain, 0)?;
            if !tx.moved(batch)? {
                *budget = 0;
            }
        }
        Ok(Intake::Open)
    }
}

impl Io {
    /// Hands the frame of a chain to the port, or drops it.
    fn transmit(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<Sent> {
        if !self.link_is_up() {
            self.count(|stats| stats.tx_link_down.add(1));
            return Ok(Sent::Done);
        }
        let mut bytes = [0; HEADER_LEN];
        if (buffers.readable_len() as usize) < HEADER_LEN {
            self.refuse(Refusal::Length);
            return Ok(Sent::Done);
        }
        // Copied once: what is checked is what is used.
        buffers.read(&mut bytes)?;
        let frame = Frame::new(buffers.readable());
        let len = frame.len();
        match header::check(bytes, len, self.transmit) {
            Err(refusal) => self.refuse(refusal),
            Ok(header) => {
                if self.endpoint.transmit(&header, frame) == Sent::Busy {
                    return Ok(Sent::Busy);
                }
                self.count(|stats| {
                    stats.tx_frames.add(1);
                    stats.tx_bytes.add(len as u64);
                });
            }
        }
        Ok(Sent::Done)
    }

    #[cold]
    fn refuse(&self, refusal: Refusal) {
        self.count(|stats| match refusal {
            Refusal::Malformed => stats.tx_malformed.add(1),
            Refusal::Offloads => stats.tx_offloads.add(1),
            Refusal::Length => stats.tx_length.add(1),
        });
    }
}
