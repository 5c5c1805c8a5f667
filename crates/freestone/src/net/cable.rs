//! [`Cable`]: the link of a card, which is up while the operator wants it and there is somebody at the other end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_vmm::virtio::net::NetHandle;

/// The cable between a card and what it is plugged into.
#[derive(Debug)]
pub(super) struct Cable(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The operator has it in.
    wanted: bool,
    /// There is somebody at the other end.
    peer: bool,
    /// The card, when there is one.
    card: Option<NetHandle>,
}

impl State {
    fn tell(&self) {
        if let Some(card) = &self.card {
            card.set_link(self.wanted && self.peer);
        }
    }
}

impl Cable {
    /// With somebody at the other end, until it is said that there is nobody.
    pub(super) fn new(wanted: bool) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { wanted, peer: true, card: None })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plugs it into the card.
    pub(super) fn plug(&self, card: NetHandle) {
        let mut state = self.state();
        state.card = Some(card);
        state.tell();
    }

    /// The operator plugs it in or pulls it out.
    pub(super) fn set(&self, wanted: bool) {
        let mut state = self.state();
        state.wanted = wanted;
        state.tell();
    }

    /// Somebody came to the other end, or went.
    pub(super) fn set_peer(&self, peer: bool) {
        let mut state = self.state();
        state.peer = peer;
        state.tell();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use freestone_vmm::net::stream::{StreamOptions, StreamPort};
    use freestone_vmm::net::{Port, Setup};
    use freestone_vmm::virtio::net::{Net, NetConfig};

    use super::*;

    #[test]
    fn the_link_is_up_while_it_is_wanted_and_there_is_a_peer() {
        let (ours, peer) = UnixStream::pair().unwrap();
        let mut port = StreamPort::from_stream(ours, StreamOptions::default()).unwrap();
        let cable = Cable::new(true);
        let hook = Arc::clone(&cable);
        port.on_link(move |peer| hook.set_peer(peer));
        let mut endpoint = port.open(&Setup { pairs: 1, receive: port.info().receive }).unwrap().remove(0);
        let card = Net::new(port, NetConfig::new()).unwrap().handle();
        cable.plug(card.clone());
        assert!(card.link());
        cable.set(false);
        assert!(!card.link());
        cable.set(true);
        assert!(card.link());
        drop(peer);
        endpoint.flush();
        assert_eq!(endpoint.waiting(), None);
        assert!(!card.link(), "the peer went away");
        cable.set(true);
        assert!(!card.link(), "there is nobody at the other end");
    }

    #[test]
    fn a_peer_that_comes_does_not_plug_in_what_the_operator_pulled_out() {
        let (ours, _peer) = UnixStream::pair().unwrap();
        let port = StreamPort::from_stream(ours, StreamOptions::default()).unwrap();
        let card = Net::new(port, NetConfig::new()).unwrap().handle();
        let cable = Cable::new(false);
        cable.plug(card.clone());
        cable.set_peer(false);
        cable.set_peer(true);
        assert!(!card.link());
        cable.set(true);
        assert!(card.link());
    }
}
