//! A layer of an image: unpacked as it is read, and then found to be the one that was asked for.

use std::cell::RefCell;
use std::io::{self, BufReader, Cursor, Read};
use std::rc::Rc;

use ring::digest::{Context, SHA256};

use super::super::archive::{Archive, shown};
use super::{BUFFER, OciError, Sha256, Store, same};

/// Most bytes that all layers of an image, or an archive, are unpacked to.
pub(in super::super) const MAX_UNPACKED: u64 = 64 << 30;

/// A layer: an archive, perhaps compressed.
#[derive(Debug)]
pub(in super::super) struct Layer<'a> {
    pub(super) store: &'a Store,
    pub(in super::super) name: String,
    /// What it must be as it lies there, or unpacked.
    pub(super) packed: Option<Sha256>,
    pub(super) unpacked: Option<Sha256>,
}

impl Layer<'_> {
    /// Has `use_it` read the layer, and then checks that it is the one that was asked for. `budget` is what may still be unpacked.
    pub(in super::super) fn read<E: From<OciError>>(
        &self,
        budget: &mut u64,
        use_it: impl FnOnce(&mut Archive<&mut dyn Read>) -> Result<(), E>,
    ) -> Result<(), E> {
        let what = shown(self.name.as_bytes());
        let failed = |source| OciError::Read {
            what: what.clone(),
            source,
        };
        let (reader, _) = self.store.open(&self.name)?;
        let packed = Rc::new(RefCell::new(Summed::new(reader)));
        let limited = Limited {
            reader: unpack(Shared(packed.clone())).map_err(failed)?,
            left: *budget,
        };
        let mut unpacked = Summed::new(limited);
        use_it(&mut Archive::new(&mut unpacked))?;
        // What is behind the end of the archive, and of the compressed stream, is part of both sums.
        io::copy(&mut unpacked, &mut io::sink()).map_err(failed)?;
        io::copy(&mut Shared(packed.clone()), &mut io::sink()).map_err(failed)?;
        *budget = unpacked.reader.left;
        if let Some(expected) = &self.unpacked {
            same(&what, expected, &Sha256::of(unpacked.sum))?;
        }
        if let Some(expected) = &self.packed {
            same(&what, expected, &Sha256::of(packed.borrow().sum.clone()))?;
        }
        Ok(())
    }
}

/// What comes out of a stream that may be compressed: by gzip or zstd, which their first bytes tell.
pub(in super::super) fn unpack<'a>(mut reader: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut first = Vec::new();
    reader.by_ref().take(4).read_to_end(&mut first)?;
    let whole = BufReader::with_capacity(BUFFER, Cursor::new(first.clone()).chain(reader));
    Ok(match first.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        // A window of 128 MiB at most.
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}

/// A stream of which no more than so many bytes are read.
pub(in super::super) struct Limited<R> {
    pub(in super::super) reader: R,
    pub(in super::super) left: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.left = self
            .left
            .checked_sub(read as u64)
            .ok_or_else(|| io::Error::other(format!("it unpacks to more than {} GiB", MAX_UNPACKED >> 30)))?;
        Ok(read)
    }
}

/// A stream with the sum of what has been read of it.
struct Summed<R> {
    reader: R,
    sum: Context,
}

impl<R> Summed<R> {
    fn new(reader: R) -> Self {
        Self {
            reader,
            sum: Context::new(&SHA256),
        }
    }
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.sum.update(&buffer[..read]);
        Ok(read)
    }
}

/// A stream that somebody else reads to its end.
struct Shared<R>(Rc<RefCell<R>>);

impl<R: Read> Read for Shared<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buffer)
    }
}
