//! [`Table`]: the flows, by their place and by their addresses.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::flow::Flow;
use crate::nat::context::{Kind, Token};

/// The addresses of a flow as the machine sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest: SocketAddr,
    pub(super) server: SocketAddr,
}

/// A place for a flow. It counts the flows it had, so that an event of an old one is known as such.
#[derive(Debug, Default)]
struct Slot {
    generation: u16,
    flow: Option<Box<Flow>>,
}

/// The flows.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Keyed by a hash that the machine cannot guess.
    by_key: HashMap<Key, u32>,
    /// The flow that was looked up last: segments come in bunches.
    last: Option<(Key, u32)>,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn find(&mut self, key: &Key) -> Option<u32> {
        if let Some((last, index)) = self.last
            && last == *key
        {
            return Some(index);
        }
        let index = *self.by_key.get(key)?;
        self.last = Some((*key, index));
        Some(index)
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.by_key.contains_key(key)
    }

    /// Where the next flow will be, for its socket to be watched.
    pub(super) fn next_token(&mut self) -> Option<Token> {
        let index = match self.free.last() {
            Some(index) => *index,
            None => {
                let index = u32::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot::default());
                self.free.push(index);
                index
            }
        };
        let slot = self.slots.get(usize::try_from(index).ok()?)?;
        Some(Token { kind: Kind::Tcp, generation: slot.generation, index })
    }

    /// Adds a flow at the place that [`next_token`](Self::next_token) told.
    pub(super) fn insert(&mut self, flow: Box<Flow>) -> Option<u32> {
        let index = self.free.pop()?;
        let slot = usize::try_from(index).ok().and_then(|index| self.slots.get_mut(index))?;
        self.by_key.insert(flow.key, index);
        slot.flow = Some(flow);
        Some(index)
    }

    pub(super) fn get(&mut self, index: u32) -> Option<&mut Flow> {
        self.slots.get_mut(usize::try_from(index).ok()?)?.flow.as_deref_mut()
    }

    /// The flow that an event is of, if it is still there.
    pub(super) fn by_token(&mut self, token: Token) -> Option<&mut Flow> {
        let slot = self.slots.get_mut(usize::try_from(token.index).ok()?)?;
        slot.flow.as_deref_mut().filter(|_| slot.generation == token.generation)
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<Box<Flow>> {
        let slot = self.slots.get_mut(usize::try_from(index).ok()?)?;
        let flow = slot.flow.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.by_key.remove(&flow.key);
        self.last = None;
        self.free.push(index);
        Some(flow)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.slots.iter().filter_map(|slot| slot.flow.as_deref())
    }

    /// The places that have flows.
    pub(super) fn indices(&self) -> Vec<u32> {
        self.by_key.values().copied().collect()
    }
}
