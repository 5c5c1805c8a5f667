//! The guest-request queue (5.15.6).

use std::sync::Arc;

use super::Shared;
use super::blocks::{Answer, State};
use crate::queue::ChainBuffers;
use crate::worker::RequestHandler;
use crate::{Error, Result};

/// Bytes of every request, and of every answer.
const REQUEST: usize = 24;
const ANSWER: u32 = 10;

/// Answers requests.
pub(super) struct Requests {
    shared: Arc<Shared>,
}

impl Requests {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn answer(&self, kind: u16, addr: u64, count: u16) -> (Answer, u16) {
        let mut blocks = self.shared.blocks();
        match kind {
            0 => (blocks.plug(addr, count), 0),
            1 => (blocks.unplug(addr, count), 0),
            2 => {
                blocks.unplug_all();
                (Answer::Ack, 0)
            }
            3 => match blocks.state(addr, count) {
                Some(State::Plugged) => (Answer::Ack, 0),
                Some(State::Unplugged) => (Answer::Ack, 1),
                Some(State::Mixed) => (Answer::Ack, 2),
                None => (Answer::Error, 0),
            },
            _ => (Answer::Error, 0),
        }
    }
}

impl RequestHandler for Requests {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        // Looked at first: a request that cannot be answered is not carried out.
        let room = buffers.writable_len();
        if room < ANSWER {
            let (have, want) = (room.into(), ANSWER.into());
            return Err(Error::ShortRequest { direction: "device-writable", have, want });
        }
        let mut request = [0; REQUEST];
        buffers.read(&mut request)?;
        // Type, padding, address of the first block, number of blocks, padding.
        let [a, b, _, _, _, _, _, _, rest @ ..] = request;
        let [c, d, e, f, g, h, i, j, k, l, ..] = rest;
        let addr = u64::from_le_bytes([c, d, e, f, g, h, i, j]);
        let (answer, state) = self.answer(u16::from_le_bytes([a, b]), addr, u16::from_le_bytes([k, l]));
        let code: u16 = match answer {
            Answer::Ack => 0,
            Answer::Nack => 1,
            Answer::Busy => 2,
            Answer::Error => 3,
        };
        let mut bytes = [0; ANSWER as usize];
        let (head, tail) = bytes.split_at_mut(8);
        head.iter_mut().zip(code.to_le_bytes()).for_each(|(to, from)| *to = from);
        tail.iter_mut().zip(state.to_le_bytes()).for_each(|(to, from)| *to = from);
        buffers.write(&bytes)?;
        Ok(ANSWER)
    }
}
