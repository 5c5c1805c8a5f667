//! A name server that knows a few names.

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context, Result};

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
/// A response, recursion available; the reply code is added.
const RESPONSE: u16 = 0x8180;
const NAME_ERROR: u16 = 3;

/// Parses NAME=ADDR.
pub fn parse_record(text: &str) -> Result<(String, IpAddr), String> {
    let (name, addr) = text.split_once('=').ok_or("not NAME=ADDR")?;
    Ok((name.to_ascii_lowercase(), addr.parse().map_err(|e| format!("{addr:?}: {e}"))?))
}

/// Answers queries for ever.
pub fn serve(socket: &UdpSocket, records: &[(String, IpAddr)]) -> Result<()> {
    let mut query = [0; 1500];
    loop {
        let (length, from) = socket.recv_from(&mut query).context("receiving a query")?;
        if let Some(reply) = query.get(..length).and_then(|query| answer(query, records)) {
            // A client that is gone is not our failure.
            drop(socket.send_to(&reply, from));
        }
    }
}

/// The reply to a query with one question; `None` for what is not one.
fn answer(query: &[u8], records: &[(String, IpAddr)]) -> Option<Vec<u8>> {
    let header = query.get(..12)?;
    if header.get(4..6)? != [0, 1] {
        return None;
    }
    let mut name = String::new();
    let mut at = 12;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(&String::from_utf8_lossy(query.get(at..at + length)?).to_ascii_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
    let question = query.get(12..at + 4)?;
    let known = records.iter().any(|(known, _)| *known == name);
    let addrs: Vec<Vec<u8>> = records
        .iter()
        .filter(|(known, _)| *known == name)
        .filter_map(|(_, addr)| match addr {
            IpAddr::V4(v4) if kind == TYPE_A => Some(v4.octets().to_vec()),
            IpAddr::V6(v6) if kind == TYPE_AAAA => Some(v6.octets().to_vec()),
            _ => None,
        })
        .collect();

    let mut reply = header.get(..2)?.to_vec();
    let count = u16::try_from(addrs.len()).ok()?;
    for field in [RESPONSE | if known { 0 } else { NAME_ERROR }, 1, count, 0, 0] {
        reply.extend_from_slice(&field.to_be_bytes());
    }
    reply.extend_from_slice(question);
    for addr in addrs {
        // The name is the one in the question, at offset 12; class IN, one minute to live.
        reply.extend_from_slice(&[0xc0, 12]);
        reply.extend_from_slice(&kind.to_be_bytes());
        reply.extend_from_slice(&[0, 1, 0, 0, 0, 60]);
        reply.extend_from_slice(&u16::try_from(addr.len()).ok()?.to_be_bytes());
        reply.extend_from_slice(&addr);
    }
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A query for the address of `a.test`, with this type.
    fn query(kind: u16) -> Vec<u8> {
        let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend_from_slice(b"\x01A\x04test\x00");
        query.extend_from_slice(&kind.to_be_bytes());
        query.extend_from_slice(&[0, 1]);
        query
    }

    #[test]
    fn a_known_name_is_answered_with_its_address() {
        let records = [parse_record("a.test=10.0.2.2").unwrap()];
        let reply = answer(&query(TYPE_A), &records).unwrap();
        assert_eq!(reply[..8], [0xab, 0xcd, 0x81, 0x80, 0, 1, 0, 1]);
        assert!(reply.ends_with(&[0, 4, 10, 0, 2, 2]));
    }

    #[test]
    fn a_known_name_without_an_address_of_that_kind_has_an_empty_answer() {
        let records = [parse_record("a.test=10.0.2.2").unwrap()];
        let reply = answer(&query(TYPE_AAAA), &records).unwrap();
        assert_eq!(reply[2..8], [0x81, 0x80, 0, 1, 0, 0]);
    }

    #[test]
    fn an_unknown_name_does_not_exist() {
        let reply = answer(&query(TYPE_A), &[]).unwrap();
        assert_eq!(reply[2..4], [0x81, 0x83]);
    }

    #[test]
    fn a_query_cut_short_at_any_byte_is_not_answered() {
        let query = query(TYPE_A);
        for length in 0..query.len() {
            assert_eq!(answer(&query[..length], &[]), None, "cut to {length} bytes");
        }
    }
}
