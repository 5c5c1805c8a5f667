//! [`Flows`]: a table of flows that knows which was idle longest and which have something to read.

use std::collections::VecDeque;

use super::context::{Kind, Token};

/// Flows at indices that are used again, each time with another generation.
#[derive(Debug)]
pub(super) struct Flows<T> {
    kind: Kind,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    oldest: Option<u32>,
    newest: Option<u32>,
    /// Those with something to read, each once.
    readable: VecDeque<u32>,
    len: usize,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u16,
    value: Option<T>,
    older: Option<u32>,
    newer: Option<u32>,
    readable: bool,
}

impl<T> Flows<T> {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            kind,
            slots: Vec::new(),
            free: Vec::new(),
            oldest: None,
            newest: None,
            readable: VecDeque::new(),
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, index: u32) -> Option<&T> {
        self.slot(index)?.value.as_ref()
    }

    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.slot_mut(index)?.value.as_mut()
    }

    /// The flow that was used least lately.
    pub(super) fn oldest(&self) -> Option<(u32, &T)> {
        let index = self.oldest?;
        Some((index, self.get(index)?))
    }

    /// The flow that was used least lately of those that are so.
    pub(super) fn oldest_of(&self, is: impl Fn(&T) -> bool) -> Option<u32> {
        let mut at = self.oldest;
        while let Some(index) = at {
            let slot = self.slot(index)?;
            if slot.value.as_ref().is_some_and(&is) {
                return at;
            }
            at = slot.newer;
        }
        None
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.value.as_ref())
    }

    /// The index of one that is so.
    pub(super) fn find(&self, is: impl Fn(&T) -> bool) -> Option<u32> {
        let at = self.slots.iter().position(|slot| slot.value.as_ref().is_some_and(&is))?;
        u32::try_from(at).ok()
    }

    /// Adds a flow, used just now, that `make` makes of the token for its socket.
    ///
    /// # Errors
    /// Those of `make`; nothing is added then.
    pub(super) fn insert<E>(&mut self, make: impl FnOnce(Token) -> Result<T, E>) -> Result<u32, E> {
        let index = self.free.last().copied().unwrap_or(u32::try_from(self.slots.len()).unwrap_or(u32::MAX));
        let generation = self.slot(index).map_or(0, |slot| slot.generation);
        let value = make(Token { kind: self.kind, generation, index })?;
        if self.free.pop().is_none() {
            self.slots.push(Slot { generation, value: None, older: None, newer: None, readable: false });
        }
        if let Some(slot) = self.slot_mut(index) {
            slot.value = Some(value);
        }
        self.len += 1;
        self.append(index);
        Ok(index)
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<T> {
        let value = self.slot_mut(index)?.value.take()?;
        self.unlink(index);
        if let Some(slot) = self.slot_mut(index) {
            slot.generation = slot.generation.wrapping_add(1);
        }
        self.free.push(index);
        self.len -= 1;
        Some(value)
    }

    /// The flow was used just now.
    pub(super) fn touch(&mut self, index: u32) {
        if self.newest != Some(index) && self.get(index).is_some() {
            self.unlink(index);
            self.append(index);
        }
    }

    /// The index of `token`, if it is not of a flow that is gone.
    pub(super) fn at(&self, token: Token) -> Option<u32> {
        let slot = self.slot(token.index)?;
        (slot.generation == token.generation && slot.value.is_some()).then_some(token.index)
    }

    /// Its socket has something to read.
    pub(super) fn set_readable(&mut self, index: u32) {
        if let Some(slot) = self.slot_mut(index)
            && !std::mem::replace(&mut slot.readable, true)
        {
            self.readable.push_back(index);
        }
    }

    /// Takes the next flow whose socket has something to read.
    pub(super) fn next_readable(&mut self) -> Option<u32> {
        loop {
            let index = self.readable.pop_front()?;
            let slot = self.slot_mut(index)?;
            slot.readable = false;
            if slot.value.is_some() {
                return Some(index);
            }
        }
    }

    pub(super) fn has_readable(&self) -> bool {
        !self.readable.is_empty()
    }

    /// Removes all flows.
    pub(super) fn clear(&mut self) {
        while let Some(index) = self.oldest {
            self.remove(index);
        }
    }

    fn slot(&self, index: u32) -> Option<&Slot<T>> {
        self.slots.get(usize::try_from(index).ok()?)
    }

    fn slot_mut(&mut self, index: u32) -> Option<&mut Slot<T>> {
        self.slots.get_mut(usize::try_from(index).ok()?)
    }

    fn append(&mut self, index: u32) {
        let before = self.newest.replace(index);
        match before.and_then(|before| self.slot_mut(before)) {
            Some(before) => before.newer = Some(index),
            None => self.oldest = Some(index),
        }
        if let Some(slot) = self.slot_mut(index) {
            (slot.older, slot.newer) = (before, None);
        }
    }

    fn unlink(&mut self, index: u32) {
        let Some((older, newer)) = self.slot(index).map(|slot| (slot.older, slot.newer)) else { return };
        match older.and_then(|older| self.slot_mut(older)) {
            Some(older) => older.newer = newer,
            None => self.oldest = newer,
        }
        match newer.and_then(|newer| self.slot_mut(newer)) {
            Some(newer) => newer.older = older,
            None => self.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    fn insert(flows: &mut Flows<u32>, value: u32) -> Token {
        let mut token = None;
        let made = flows.insert(|made| {
            token = Some(made);
            Ok::<_, Infallible>(value)
        });
        assert_eq!(made, Ok(token.unwrap().index));
        token.unwrap()
    }

    #[test]
    fn a_token_of_a_flow_that_is_gone_leads_nowhere() {
        let mut flows = Flows::new(Kind::Udp);
        let first = insert(&mut flows, 1);
        assert_eq!(flows.at(first), Some(first.index));
        assert_eq!(flows.remove(first.index), Some(1));
        assert_eq!((flows.at(first), flows.remove(first.index)), (None, None));
        let second = insert(&mut flows, 2);
        assert_eq!(
            (second.index, flows.at(first), flows.at(second)),
            (first.index, None, Some(second.index))
        );
    }

    #[test]
    fn what_could_not_be_made_is_not_there() {
        let mut flows = Flows::<u32>::new(Kind::Udp);
        assert_eq!(flows.insert(|_| Err("no")), Err("no"));
        assert_eq!((flows.len(), flows.oldest()), (0, None));
    }

    #[test]
    fn a_flow_with_something_to_read_is_taken_once() {
        let mut flows = Flows::new(Kind::Udp);
        let [a, b] = [1, 2].map(|value| insert(&mut flows, value).index);
        for index in [b, a, b] {
            flows.set_readable(index);
        }
        flows.remove(a);
        assert_eq!((flows.next_readable(), flows.next_readable()), (Some(b), None));
        flows.set_readable(b);
        assert_eq!(flows.next_readable(), Some(b));
    }

    proptest! {
        #[test]
        fn the_oldest_is_the_one_used_least_lately(steps in proptest::collection::vec((0u8..3, any::<usize>()), 0..200)) {
            let mut flows = Flows::new(Kind::Udp);
            let mut model: Vec<(u32, u32)> = Vec::new();
            for (value, (step, which)) in (0u32..).zip(steps) {
                let at = which.checked_rem(model.len());
                match (step, at) {
                    (1, Some(at)) => {
                        let entry = model.remove(at);
                        prop_assert_eq!(flows.remove(entry.0), Some(entry.1));
                    }
                    (2, Some(at)) => {
                        let entry = model.remove(at);
                        model.push(entry);
                        flows.touch(entry.0);
                    }
                    _ => model.push((insert(&mut flows, value).index, value)),
                }
                prop_assert_eq!(flows.oldest().map(|(index, value)| (index, *value)), model.first().copied());
                prop_assert_eq!((flows.len(), flows.iter().count()), (model.len(), model.len()));
            }
            flows.clear();
            prop_assert_eq!((flows.len(), flows.oldest()), (0, None));
        }
    }
}
