//! The messages between the lab's host side and its agent, over one virtio-serial port.
//!
//! A message is a header of nine bytes (kind, process number and length, little endian) and its content.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail};

/// The longest content of a message.
const MAX_CONTENT: usize = 16 << 20;

/// A message. The `u32` is the number of a process, chosen by the host side.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// Host side: are you there? Agent: yes.
    Ready,
    /// Host side: start a program with these arguments.
    Start(u32, Vec<String>),
    /// Host side: bytes for the program's standard input.
    Input(u32, Vec<u8>),
    /// Host side: close the program's standard input.
    CloseInput(u32),
    /// Host side: kill the program.
    Kill(u32),
    /// Agent: bytes from the program's standard output or error.
    Output(u32, Vec<u8>),
    /// Agent: the program ended with this status.
    Exit(u32, i32),
    /// Host side: switch the lab off.
    Shutdown,
}

/// Sends one message.
pub fn send(to: &mut impl Write, message: &Message) -> Result<()> {
    let (kind, id, content) = match message {
        Message::Ready => (0u8, 0, Vec::new()),
        Message::Start(id, argv) => (1, *id, argv.join("\0").into_bytes()),
        Message::Input(id, bytes) => (2, *id, bytes.clone()),
        Message::CloseInput(id) => (3, *id, Vec::new()),
        Message::Kill(id) => (4, *id, Vec::new()),
        Message::Output(id, bytes) => (5, *id, bytes.clone()),
        Message::Exit(id, status) => (6, *id, status.to_le_bytes().to_vec()),
        Message::Shutdown => (7, 0, Vec::new()),
    };
    if content.len() > MAX_CONTENT {
        bail!("a message of {} bytes is longer than {MAX_CONTENT}", content.len());
    }
    let length = u32::try_from(content.len())?;
    let mut bytes = Vec::with_capacity(9 + content.len());
    bytes.push(kind);
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&content);
    to.write_all(&bytes).context("sending a message")
}

/// Receives one message; `None` at the end of the stream.
pub fn receive(from: &mut impl Read) -> Result<Option<Message>> {
    let mut kind = [0];
    if from.read(&mut kind).context("receiving a message")? == 0 {
        return Ok(None);
    }
    let id = read_u32(from)?;
    let length = usize::try_from(read_u32(from)?)?;
    if length > MAX_CONTENT {
        bail!("a message of {length} bytes is longer than {MAX_CONTENT}");
    }
    let mut content = vec![0; length];
    from.read_exact(&mut content).context("receiving the content of a message")?;
    let message = match kind {
        [0] => Message::Ready,
        [1] => Message::Start(id, String::from_utf8(content)?.split('\0').map(str::to_owned).collect()),
        [2] => Message::Input(id, content),
        [3] => Message::CloseInput(id),
        [4] => Message::Kill(id),
        [5] => Message::Output(id, content),
        [6] => Message::Exit(id, i32::from_le_bytes(content.as_slice().try_into()?)),
        [7] => Message::Shutdown,
        [other] => bail!("unknown kind of message: {other}"),
    };
    Ok(Some(message))
}

fn read_u32(from: &mut impl Read) -> Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes).context("receiving the header of a message")?;
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_comes_back_as_it_was_sent() {
        let messages = [
            Message::Ready,
            Message::Start(1, vec!["sh".into(), "-c".into(), "exit 1".into()]),
            Message::Input(2, vec![0, 1, 2, 255]),
            Message::CloseInput(3),
            Message::Kill(4),
            Message::Output(6, b"text".to_vec()),
            Message::Exit(7, -1),
            Message::Shutdown,
        ];
        let mut stream = Vec::new();
        for message in &messages {
            send(&mut stream, message).unwrap();
        }
        let mut stream = stream.as_slice();
        for message in messages {
            assert_eq!(receive(&mut stream).unwrap(), Some(message));
        }
        assert_eq!(receive(&mut stream).unwrap(), None);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_allocated() {
        let mut stream: &[u8] = &[5, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert!(receive(&mut stream).is_err());
    }
}
