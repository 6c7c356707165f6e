//! A program that asks a running daemon for everything and then does not do as it should: for
//! tests of how the daemon takes it back.
//!
//! `upgrade_peer SOCKET WHAT`, where WHAT is
//! * `version`: comes from a version far ahead;
//! * `noise`: says something that is no message;
//! * `leave`: asks for everything and ends without waiting for it;
//! * `die`: waits until everything has come, and ends;
//! * `silence`: the same, and says nothing more.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail, ensure};

fn frame(document: &str) -> Result<Vec<u8>> {
    let mut bytes = b"HFUPGRDE".to_vec();
    bytes.extend([1, 0, 0, 0]);
    bytes.extend(u32::try_from(document.len())?.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(document.as_bytes());
    Ok(bytes)
}

fn receive(stream: &mut UnixStream) -> Result<String> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    ensure!(header.starts_with(b"HFUPGRDE"), "no message: {header:?}");
    let length = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
    let mut document = vec![0; usize::try_from(length)?];
    stream.read_exact(&mut document)?;
    Ok(String::from_utf8(document)?)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (socket, what) = (arguments.next().context("SOCKET")?, arguments.next().context("WHAT")?);
    let mut stream = UnixStream::connect(socket)?;
    let hello = |low: u16, high: u16| {
        frame(&format!("{{\"Hello\":{{\"versions\":[{low},{high}],\"program\":\"a test\"}}}}"))
    };
    match what.as_str() {
        "version" => {
            stream.write_all(&hello(998, 999)?)?;
            let answer = receive(&mut stream)?;
            ensure!(answer.contains("Refused") && answer.contains("998"), "{answer}");
            return Ok(());
        }
        "noise" => {
            stream.write_all(&[0x5a; 4096])?;
            return Ok(());
        }
        "leave" | "die" | "silence" => {}
        other => bail!("{other}?"),
    }
    stream.write_all(&hello(1, 1)?)?;
    let answer = receive(&mut stream)?;
    ensure!(answer.contains("Welcome"), "{answer}");
    stream.write_all(&frame("\"Take\"")?)?;
    if what == "leave" {
        return Ok(());
    }
    let answer = receive(&mut stream)?;
    ensure!(answer.contains("State"), "{answer}");
    println!("received");
    if what == "silence" {
        loop {
            std::thread::park();
        }
    }
    Ok(())
}
