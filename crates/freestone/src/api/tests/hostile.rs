//! Clients that err, dawdle, leave and crowd.

use std::io::Write;

use proptest::prelude::*;

use super::{Api, Client};
use crate::api::http::Method;
use crate::api::operation::route;
use crate::api::server::{MAX_CLIENTS, MAX_SUBSCRIBERS};

#[test]
fn a_connection_is_kept_for_the_next_request() {
    let api = Api::new();
    let mut client = api.connect();
    for _ in 0..3 {
        assert_eq!(client.ask("GET", "/version", "").status, 200);
        assert_eq!(client.ask("PUT", "/vsock", "{}").status, 400);
    }
    client.send("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(client.answer().unwrap().head.contains("Connection: close"));
    assert!(client.answer().is_none());
}

#[test]
fn pipelined_requests_are_answered_in_order_even_if_the_engine_is_slow() {
    let api = Api::new();
    api.start();
    let mut client = api.connect();
    let mut all = String::new();
    for _ in 0..20 {
        all.push_str(&Client::request("PATCH", "/vm", r#"{"state": "Paused"}"#));
        all.push_str(&Client::request("GET", "/", ""));
        all.push_str(&Client::request("PATCH", "/vm", r#"{"state": "Resumed"}"#));
        all.push_str(&Client::request("GET", "/nothing", ""));
    }
    client.send(all);
    for _ in 0..20 {
        assert_eq!(client.answer().unwrap().status, 204);
        assert_eq!(client.answer().unwrap().json()["state"], "Paused");
        assert_eq!(client.answer().unwrap().status, 204);
        assert_eq!(client.answer().unwrap().status, 400);
    }
}

#[test]
fn a_request_that_comes_byte_by_byte_is_a_request_and_holds_nobody_up() {
    let api = Api::new();
    let mut slow = api.connect();
    for byte in Client::request("PUT", "/vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#).bytes() {
        slow.send([byte]);
        assert_eq!(api.ask("GET", "/version", "").status, 200);
    }
    assert_eq!(slow.answer().unwrap().status, 204);
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_answers() {
    let api = Api::new();
    api.start();
    let mut client = api.connect();
    client.send(Client::request("PATCH", "/vm", r#"{"state": "Paused"}"#) + &Client::request("GET", "/", ""));
    client.half_close();
    assert_eq!(client.answer().unwrap().status, 204);
    assert_eq!(client.answer().unwrap().json()["state"], "Paused");
    assert!(client.answer().is_none());
}

#[test]
fn half_a_request_is_none() {
    let api = Api::new();
    let mut client = api.connect();
    client.send("PUT /vsock HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"guest");
    client.half_close();
    assert!(client.answer().is_none());
    assert_eq!(api.ask("GET", "/", "").status, 200);
}

#[test]
fn a_client_may_wait_to_be_told_to_send_the_body() {
    let api = Api::new();
    let mut client = api.connect();
    let body = r#"{"guest_cid": 3, "uds_path": "v"}"#;
    client.send(format!(
        "PUT /vsock HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    ));
    assert_eq!(client.answer().unwrap().status, 100);
    client.send(body);
    assert_eq!(client.answer().unwrap().status, 204);
    // Who would send too much is not told to go on.
    client.send("PUT /vsock HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 51201\r\n\r\n");
    assert_eq!(client.answer().unwrap().status, 413);
    assert!(client.answer().is_none());
}

#[test]
fn a_body_may_be_as_large_as_the_limit() {
    let api = Api::with(1000);
    let body = |size: usize| format!(r#"{{"a": "{}"}}"#, "x".repeat(size - 9));
    assert_eq!(api.ask("PUT", "/mmds", &body(999)).status, 204);
    let answer = api.ask("PUT", "/mmds", &body(1001));
    assert_eq!(answer.status, 413);
    assert!(answer.fault().contains("limit of 1000"), "{answer:?}");
}

#[test]
fn a_head_that_never_ends_is_refused() {
    let api = Api::new();
    let mut client = api.connect();
    client.send("GET / HTTP/1.1\r\n");
    let line = format!("X-Pad: {}\r\n", "x".repeat(1000));
    // The server hangs up before it has taken everything.
    while client.stream.write_all(line.as_bytes()).is_ok() {}
    assert_eq!(client.answer().unwrap().status, 400);
}

#[test]
fn what_is_not_http_is_answered_and_closed() {
    let api = Api::new();
    let not_utf8: &[u8] = b"PUT /mmds HTTP/1.1\r\nContent-Length: 9\r\n\r\n{\"\xff\xfe\": 1}";
    let mut client = api.connect();
    client.send(not_utf8);
    // The connection is fine: only its JSON was not.
    assert_eq!(client.answer().unwrap().status, 400);
    assert_eq!(client.ask("GET", "/", "").status, 200);
    for bytes in [
        &b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n"[..],
        b"PUT /vsock HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"HEAD / HTTP/1.1\r\n\r\n",
    ] {
        let mut client = api.connect();
        client.send(bytes);
        let answer = client.answer().unwrap();
        assert_eq!(answer.status, 400, "{bytes:?}");
        assert!(!answer.fault().is_empty());
        assert!(client.answer().is_none(), "{bytes:?}");
    }
}

#[test]
fn a_hundred_clients_at_a_time_are_all_answered() {
    let api = Api::new();
    let mut clients: Vec<_> = (0..100).map(|_| api.connect()).collect();
    for client in &mut clients {
        client.send(Client::request("GET", "/machine-config", ""));
    }
    for client in &mut clients {
        assert_eq!(client.answer().unwrap().json()["vcpu_count"], 1);
    }
}

#[test]
fn more_clients_than_places_take_those_of_the_idle_and_the_slow() {
    let api = Api::new();
    let mut idle: Vec<_> = (0..MAX_CLIENTS).map(|_| api.connect()).collect();
    for client in idle.iter_mut().skip(1) {
        client.send("PUT /vsock HTTP/1.1\r\nContent-Le");
    }
    let mut late: Vec<_> = (0..50).map(|_| api.connect()).collect();
    for client in &mut late {
        assert_eq!(client.ask("GET", "/", "").status, 200);
    }
    let gone = idle.into_iter().filter_map(|mut client| {
        client.stream.set_nonblocking(true).unwrap();
        let mut byte = [0];
        matches!(std::io::Read::read(&mut client.stream, &mut byte), Ok(0)).then_some(())
    });
    assert_eq!(gone.count(), 50);
}

#[test]
fn clients_of_events_are_few() {
    let api = Api::new();
    let mut clients: Vec<_> = (0..MAX_SUBSCRIBERS).map(|_| api.connect()).collect();
    for client in &mut clients {
        client.send("GET /freestone/events HTTP/1.1\r\n\r\n");
        assert_eq!(client.event()["event"], "state");
    }
    assert_eq!(api.ask("GET", "/freestone/events", "").status, 503);
    drop(clients.pop());
    // The place is free as soon as the server has seen that.
    loop {
        let mut client = api.connect();
        client.send("GET /freestone/events HTTP/1.1\r\n\r\n");
        let answer = client.answer().unwrap();
        if answer.status == 200 {
            break;
        }
    }
}

#[test]
fn a_client_that_never_reads_is_not_answered_without_end() {
    let api = Api::new();
    api.good("PUT", "/mmds", &format!(r#"{{"a": "{}"}}"#, "x".repeat(40_000)));
    let mut deaf = api.connect();
    deaf.stream.set_nonblocking(true).unwrap();
    let request = Client::request("GET", "/mmds", "");
    // Until the server takes no more from it: it holds one answer, not thousands.
    let mut sent = 0;
    while deaf.stream.write(request.as_bytes()).is_ok() {
        sent += 1;
        if sent % 100 == 0 {
            assert_eq!(api.ask("GET", "/", "").status, 200);
        }
        assert!(sent < 100_000);
    }
    assert_eq!(api.ask("GET", "/", "").status, 200);
    drop(deaf);
    assert_eq!(api.ask("GET", "/", "").status, 200);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_kill_the_server(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 1..4)) {
        let api = Api::new();
        let mut client = api.connect();
        for piece in &pieces {
            if client.stream.write_all(piece).is_err() {
                break;
            }
        }
        drop(client);
        prop_assert_eq!(api.ask("GET", "/", "").status, 200);
    }
}

proptest! {
    #[test]
    fn no_body_is_too_wild_for_any_path(
        method in prop::sample::select(vec![Method::Get, Method::Put, Method::Patch, Method::Post, Method::Delete]),
        path in "/(drives|pmem|network-interfaces|balloon|mmds|vm|snapshot|hotplug|freestone|vsock|[a-z-]{0,12})(/[a-z_]{0,8}){0,3}",
        body in prop::collection::vec(any::<u8>(), 0..200),
        json in "[{}\\[\\]\":,0-9a-z_ ]{0,80}",
    ) {
        drop(route(method, &path, &body));
        drop(route(method, &path, json.as_bytes()));
    }
}
