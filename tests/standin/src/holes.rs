//! What a snapshot misses that is written while memory is still being loaded: in QEMU's stream, zeros in the place of pages.
//!
//! Of the stream (`migration/savevm.c`, `migration/ram.c`, QEMU 7.2 to 10) only the part with memory is understood, which comes first:
//!
//! ```text
//! "QEVM" u32  [7 u32 machine]  1 id "ram" u32 u32 body footer  {2 id body footer}  3 id body footer  everything else
//! body: words of an address and flags: total (with the blocks), page (with its content), zero page (with a byte), end
//! ```
//!
//! Numbers are big-endian, strings have their length before them in a byte.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};

const MAGIC: u32 = 0x5145_564d;
const PAGE: u64 = 4096;
/// Sections.
const START: u8 = 1;
const PART: u8 = 2;
const END: u8 = 3;
const CONFIGURATION: u8 = 7;
const FOOTER: u8 = 0x7e;
/// Flags in the low bits of an address.
const ZERO: u64 = 0x02;
const TOTAL: u64 = 0x04;
const CONTENT: u64 = 0x08;
const LAST: u64 = 0x10;
const SAME_BLOCK: u64 = 0x20;

/// Loses what is not loaded of the guest's memory: of `all` parts, the first `loaded` are. How many pages that are.
pub(crate) fn lose(file: &File, loaded: u64, all: u64) -> Result<u64> {
    let mut stream = Stream::new(file)?;
    ensure!(stream.number(4)? == u64::from(MAGIC), "the stream is none of QEMU's");
    stream.skip(4)?;
    // The largest block is the guest's memory; others are its firmware.
    let (mut memory, mut size, mut lost) = (String::new(), 0, 0);
    // Of the last page, in whichever section.
    let mut block = String::new();
    loop {
        match stream.byte()? {
            CONFIGURATION => {
                let length = stream.number(4)?;
                stream.skip(length)?;
                continue;
            }
            START => {
                stream.skip(4)?;
                let name = stream.string()?;
                ensure!(name == "ram", "{name:?} comes before memory");
                stream.skip(8)?;
            }
            PART | END => stream.skip(4)?,
            FOOTER => {
                stream.skip(4)?;
                continue;
            }
            // Everything else: the devices.
            _ => return Ok(lost),
        }
        loop {
            let word = stream.number(8)?;
            let (address, flags) = (word & !(PAGE - 1), word & (PAGE - 1));
            if flags & TOTAL != 0 {
                let mut left = address;
                while left > 0 {
                    let (name, length) = (stream.string()?, stream.number(8)?);
                    left = left.checked_sub(length).context("blocks do not add up")?;
                    if length > size {
                        (memory, size) = (name, length);
                    }
                }
            } else if flags & (ZERO | CONTENT) != 0 {
                if flags & SAME_BLOCK == 0 {
                    block = stream.string()?;
                }
                if flags & ZERO != 0 {
                    stream.skip(1)?;
                } else {
                    if block == memory && address >= size / all * loaded {
                        file.write_all_at(&[0; PAGE as usize], stream.at)?;
                        lost += 1;
                    }
                    stream.skip(PAGE)?;
                }
            } else if flags & LAST != 0 {
                break;
            } else {
                bail!("memory with the flags {flags:#x}");
            }
        }
    }
}

/// A stream that is read, and where in its file that is.
struct Stream<'a> {
    file: BufReader<&'a File>,
    at: u64,
}

impl<'a> Stream<'a> {
    fn new(file: &'a File) -> Result<Self> {
        let mut from = file;
        from.rewind()?;
        Ok(Self {
            file: BufReader::with_capacity(1 << 16, file),
            at: 0,
        })
    }

    fn take(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.file.read_exact(buffer).context("the stream ends in memory")?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.take(&mut byte)?;
        Ok(byte[0])
    }

    fn number(&mut self, length: usize) -> Result<u64> {
        let mut bytes = [0; 8];
        self.take(&mut bytes[8 - length..])?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn string(&mut self) -> Result<String> {
        let mut bytes = vec![0; self.byte()?.into()];
        self.take(&mut bytes)?;
        Ok(String::from_utf8(bytes)?)
    }

    fn skip(&mut self, length: u64) -> Result<()> {
        self.file.seek_relative(length.try_into()?)?;
        self.at += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    fn string(text: &str) -> Vec<u8> {
        [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
    }

    #[test]
    fn what_is_not_loaded_of_the_largest_block_is_lost_and_nothing_else() {
        let page = |byte| vec![byte; PAGE as usize];
        let footer = [&[FOOTER][..], &[0, 0, 0, 2]].concat();
        let start = [
            b"QEVM\0\0\0\x03\x07\0\0\0\x02pc".to_vec(),
            [&[START, 0, 0, 0, 2][..], &string("ram"), &[0; 4], &[0, 0, 0, 4]].concat(),
            words(&[(6 * PAGE) | TOTAL]),
            [string("bios"), words(&[2 * PAGE])].concat(),
            [string("ram"), words(&[4 * PAGE, LAST])].concat(),
            footer.clone(),
        ]
        .concat();
        let part = [&[PART, 0, 0, 0, 2][..], &words(&[CONTENT]), &string("ram"), &page(1)].concat();
        let more = [
            words(&[PAGE | ZERO | SAME_BLOCK]),
            vec![0],
            words(&[(2 * PAGE) | CONTENT | SAME_BLOCK]),
            page(2),
            words(&[(3 * PAGE) | CONTENT]),
            string("ram"),
            page(3),
            words(&[PAGE | CONTENT]),
            string("bios"),
            page(4),
            words(&[LAST]),
            footer.clone(),
            [&[END, 0, 0, 0, 2][..], &words(&[LAST]), &footer, &[4], &[0xaa; 5000]].concat(),
        ]
        .concat();
        let whole = [start, part, more].concat();
        for (loaded, lost) in [(0, 3), (1, 2), (2, 2), (3, 1), (4, 0)] {
            let mut file = tempfile();
            file.write_all(&whole).unwrap();
            assert_eq!(lose(&file, loaded, 4).unwrap(), lost, "{loaded}");
            let mut left = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut left).unwrap();
            for (content, lives) in [(1, loaded > 0), (2, loaded > 2), (3, loaded > 3), (4, true)] {
                let found = left.windows(PAGE as usize).any(|window| window == page(content));
                assert_eq!(found, lives, "page {content} of {loaded}");
            }
            assert_eq!(left.len(), whole.len());
        }
    }

    #[test]
    fn what_is_no_stream_is_an_error() {
        for bad in [
            &b""[..],
            b"garbage, and some more of it",
            b"QEVM\0\0\0\x03\x02\0\0\0\x02\0\0\0\0\0\0\0\x80",
        ] {
            let mut file = tempfile();
            file.write_all(bad).unwrap();
            assert!(lose(&file, 0, 1).is_err(), "{}", bad.escape_ascii());
        }
    }

    /// A file that is gone when it is closed.
    fn tempfile() -> File {
        let path = std::env::temp_dir().join(format!(
            "standin-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
