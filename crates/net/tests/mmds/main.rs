//! The metadata service as a machine sees it.
#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod hostile;
mod machine;

use freestone_net::mmds::{MAX_CONNECTIONS, MmdsConfig, MmdsStore, MmdsVersion};
use freestone_net::{Port, VnetHeader};
use machine::{MAC, Machine, complete, split};
use serde_json::json;
use smoltcp::socket::tcp::State;

fn store() -> MmdsStore {
    let store = MmdsStore::default();
    store.put(json!({"latest": {"meta-data": {"ami-id": "ami-1", "net": {"mac": "x"}}}})).unwrap();
    store
}

fn machine() -> Machine {
    Machine::new(MmdsConfig::new(), &store())
}

#[test]
fn a_machine_gets_values_as_text_and_as_json() {
    let mut machine = machine();
    assert_eq!(machine.get("/latest/meta-data/ami-id"), (200, "ami-1".into()));
    assert_eq!(machine.get("/latest/meta-data/"), (200, "ami-id\nnet/".into()));
    assert_eq!(machine.get("/nothing").0, 404);
    let (status, head, body) =
        machine.ask("GET /latest/meta-data/net HTTP/1.1\r\nAccept: application/json\r\n\r\n");
    assert_eq!((status, body.as_str()), (200, r#"{"mac":"x"}"#));
    assert!(head.contains("Content-Type: application/json"), "{head}");
    assert!(machine.inner.0.lock().unwrap().sent.is_empty(), "nothing of that went out");
}

#[test]
fn what_the_host_changes_is_seen_at_once() {
    let store = store();
    let mut machine = Machine::new(MmdsConfig::new(), &store);
    assert_eq!(machine.get("/latest/meta-data/ami-id").1, "ami-1");
    store.patch(&json!({"latest": {"meta-data": {"ami-id": "ami-2"}}})).unwrap();
    assert_eq!(machine.get("/latest/meta-data/ami-id").1, "ami-2");
}

#[test]
fn version_2_gives_a_token_and_wants_it_back() {
    let mut machine = Machine::new(MmdsConfig::new().version(MmdsVersion::V2), &store());
    assert_eq!(machine.get("/latest").0, 401);
    for (ask, with) in
        [("X-metadata-token", "x-METADATA-token"), ("X-aws-ec2-metadata-token", "X-metadata-token")]
    {
        let put =
            format!("PUT /latest/api/token HTTP/1.1\r\n{ask}-ttl-seconds: 60\r\nContent-Length: 0\r\n\r\n");
        let (status, head, token) = machine.ask(&put);
        assert_eq!(status, 200);
        assert!(head.contains(&format!("{ask}-ttl-seconds: 60")), "{head}");
        let (status, _, body) = machine.ask(&format!("GET /latest HTTP/1.1\r\n{with}: {token}\r\n\r\n"));
        assert_eq!((status, body.as_str()), (200, "meta-data/"));
    }
    let forwarded =
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: a\r\n\r\n";
    assert_eq!(machine.ask(forwarded).0, 400);
    assert_eq!(machine.ask("DELETE /latest HTTP/1.1\r\n\r\n").0, 405);
}

#[test]
fn a_connection_carries_several_requests_in_order() {
    let mut machine = machine();
    let handle = machine.connect();
    let requests = "GET /latest HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\n\r\n\
                    GET /latest/meta-data/ami-id HTTP/1.1\r\nConnection: close\r\n\r\nGET /lost HTTP/1.1\r\n\r\n";
    let got = machine.talk(handle, requests.as_bytes(), |_| false);
    let text = String::from_utf8(got).unwrap();
    let statuses: Vec<_> = text.match_indices("HTTP/1.1 ").map(|(at, _)| &text[at + 9..at + 12]).collect();
    assert_eq!(statuses, ["200", "404", "200"]);
    assert!(text.ends_with("\r\n\r\nami-1"), "{text}");
    assert!(!machine.socket(handle).may_recv(), "the service closed it");
}

#[test]
fn a_large_answer_arrives_whole() {
    let store = store();
    let value = "v".repeat(50_000);
    store.put(json!({"v": value})).unwrap();
    let mut machine = Machine::new(MmdsConfig::new(), &store);
    assert_eq!(machine.get("/v"), (200, value));
}

#[test]
fn requests_that_come_byte_by_byte_are_answered() {
    let mut machine = machine();
    let handle = machine.connect();
    machine.poll_often();
    for byte in b"GET /latest HTTP/1.1\r\n\r\n" {
        machine.socket(handle).send_slice(&[*byte]).unwrap();
        machine.poll();
    }
    assert_eq!(split(&machine.talk(handle, b"", complete)).2, "meta-data/");
}

#[test]
fn frames_for_others_pass_untouched_both_ways() {
    let mut machine = machine();
    machine.card.header = VnetHeader { checksum: Some((34, 16)), ..VnetHeader::default() };
    let mut tcp_to_another = vec![7; 60];
    tcp_to_another[12..14].copy_from_slice(&[8, 0]);
    tcp_to_another[23] = 6;
    for frame in [tcp_to_another, vec![1; 3], vec![2; 14], vec![3; 1514]] {
        machine.card.send(&frame);
        assert_eq!(machine.inner.0.lock().unwrap().sent.pop(), Some((machine.card.header, frame.clone())));
        machine.inner.0.lock().unwrap().give.push_back(frame.clone());
        assert_eq!(machine.card.take(), Some(frame));
    }
    assert_eq!(machine.port.store().counts().rx_frames, 0);
}

#[test]
fn connections_are_bounded_and_used_again() {
    let mut machine = machine();
    let open: Vec<_> = (0..MAX_CONNECTIONS).map(|_| machine.connect()).collect();
    machine.poll_often();
    assert!(
        open.iter().all(|handle| machine.sockets.get_mut::<smoltcp::socket::tcp::Socket>(*handle).may_send())
    );
    let more = machine.connect();
    machine.poll_often();
    assert_eq!(machine.socket(more).state(), State::Closed, "refused");
    for handle in open {
        machine.socket(handle).close();
    }
    machine.poll_often();
    for _ in 0..3 * MAX_CONNECTIONS {
        let (status, _, _) = machine.ask("GET /latest HTTP/1.0\r\n\r\n");
        assert_eq!(status, 200);
    }
    let counts = machine.port.store().counts();
    assert_eq!(counts.connections_created, 4 * MAX_CONNECTIONS as u64);
    assert_eq!(counts.connections_destroyed, counts.connections_created);
}

#[test]
fn other_ports_are_refused() {
    let mut machine = machine();
    let frame = hostile::segment(40_000, 81, hostile::Segment { flags: 2, ..Default::default() });
    machine.card.send(&frame);
    let reset = machine.card.take().unwrap();
    assert_eq!((&reset[..6], reset[47] & 0x04), (&MAC[..], 0x04));
}

#[test]
fn what_came_by_another_pair_is_answered_by_the_first() {
    let mut machine = machine();
    machine.card.by = 1;
    assert_eq!(machine.get("/latest"), (200, "meta-data/".into()));
}

#[test]
fn a_reset_ends_connections_and_the_service_goes_on() {
    let mut machine = machine();
    let handle = machine.connect();
    machine.poll_often();
    assert!(machine.socket(handle).may_send());
    machine.port.reset();
    assert_eq!(machine.inner.0.lock().unwrap().resets, 1);
    machine.card.ends.clear();
    machine.card = machine::Card::new(&mut machine.port, 1);
    machine.socket(handle).send_slice(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    machine.poll_often();
    assert_eq!(machine.socket(handle).state(), State::Closed, "it was reset");
    assert_eq!(machine.get("/latest").0, 200);
}
