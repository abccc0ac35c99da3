//! Members of a zip, in the order of its directory.
//!
//! Read here rather than by the `zip` crate, which holds the whole directory in memory: a directory is as long as its writer
//! likes. Here it is walked, a record at a time, and members are read where it says. A zip therefore needs a file, not a stream, and in return
//! every size is known beforehand, also of members whose own header leaves it to a descriptor behind the bytes.
//!
//! Members stored, deflated, or compressed by bzip2, xz or Zstandard are read; encrypted ones and volumes of split zips are
//! not. A member's bytes must have the length and CRC-32 that the directory states, its own header must bear its name, and all members
//! together cannot take more bytes than the file has: those that share bytes are how a small zip becomes petabytes.
//! Names are bytes as they are if they are UTF-8, else in code page 437, as the format has it.

mod directory;

use self::directory::{Directory, Record};
use super::dictionaries::Dictionaries;
use super::input::{self, Coding, Input, Meter, count, truncated};
use super::sink::Sink;
use super::{damaged, refused, unsupported};
use crate::error::Result;
use crate::layout::ReadAt;
use crate::limits;
use crate::names::show_bytes;

/// The whole zip.
type Bytes<'a> = &'a (dyn ReadAt + Send);

/// Length of a member's own header without name and extra field.
const LOCAL_BYTES: u64 = 30;

/// Reads all members.
pub(super) fn read(file: Bytes<'_>, size: u64, dictionaries: &Dictionaries, sink: &mut Sink) -> Result<()> {
    let mut directory = Directory::open(file, size)?;
    let mut reading = Reading { file, sink, dictionaries, meter: Meter::default(), until: directory.start(), taken: 0 };
    while let Some(record) = directory.next()? {
        reading.member(&record).map_err(|error| match error.kind() {
            crate::error::Kind::Corrupt => error.during(format!("`{}`", record.shown())),
            _ => error,
        })?;
    }
    Ok(())
}

struct Reading<'a> {
    file: Bytes<'a>,
    sink: &'a mut Sink,
    dictionaries: &'a Dictionaries,
    meter: Meter,
    /// Where the directory begins: members end before.
    until: u64,
    /// Bytes of the file that members took so far.
    taken: u64,
}

impl<'a> Reading<'a> {
    fn member(&mut self, record: &Record) -> Result<()> {
        let name = &record.name;
        if record.encrypted {
            return Err(unsupported(format!("`{}` is encrypted", record.shown())).remedy("decrypt it first"));
        }
        if name.ends_with(b"/") || record.is_type(libc::S_IFDIR) {
            return if record.size == 0 {
                self.sink.directory(name)
            } else {
                Err(unsupported(format!("the directory `{}` has {} bytes of its own", record.shown(), record.size)))
            };
        }
        if record.is_type(libc::S_IFLNK) {
            let target = self.target(record)?;
            return self.sink.symlink(name, &target);
        }
        if !record.is_type(0) && !record.is_type(libc::S_IFREG) {
            return Err(refused(format!("`{}` is a device, FIFO or socket", record.shown())));
        }
        let executable = record.mode & 0o111 != 0;
        if self.sink.is_here(name, record.size) {
            // Its own header was looked at when it was read; this is what it takes at least.
            self.take(record, LOCAL_BYTES + count(record.raw_name.len()) + record.stored)?;
            return self.sink.file_here(name, record.size, executable);
        }
        let mut input = self.open(record)?;
        self.sink.file(name, Some(record.size), executable)?;
        let mut crc = flate2::Crc::new();
        input.pieces(record.size, |piece| {
            piece.iter().for_each(|run| crc.update(run));
            self.sink.bytes(piece)
        })?;
        check_end(&mut input, &crc, record)
    }

    /// The target of a symbolic link, which is a member's content.
    fn target(&mut self, record: &Record) -> Result<Vec<u8>> {
        if record.size > count(limits::ENTRY_PATH_BYTES) {
            return Err(refused(format!("the target of the symbolic link `{}` is too long", record.shown())));
        }
        let mut input = self.open(record)?;
        let target = input.piece(record.size)?.concat();
        if count(target.len()) < record.size {
            return Err(truncated());
        }
        let mut crc = flate2::Crc::new();
        crc.update(&target);
        check_end(&mut input, &crc, record)?;
        Ok(target)
    }

    /// The bytes of a member, after a look at its own header.
    fn open(&mut self, record: &Record) -> Result<Input<'a>> {
        let coding = coding(record)?;
        if record.header_at >= self.until {
            return Err(damaged("its header is not where the directory says"));
        }
        let mut fixed = [0; 30];
        read_exact_at(self.file, &mut fixed, record.header_at)?;
        if !fixed.starts_with(b"PK\x03\x04") {
            return Err(damaged("its header is not where the directory says"));
        }
        let name_bytes = u64::from(u16::from_le_bytes([fixed[26], fixed[27]]));
        let extra_bytes = u64::from(u16::from_le_bytes([fixed[28], fixed[29]]));
        let start = record.header_at + LOCAL_BYTES + name_bytes + extra_bytes;
        let end = start.checked_add(record.stored).filter(|end| *end <= self.until);
        let end = end.ok_or_else(|| damaged("its bytes reach into the directory"))?;
        let mut name = vec![0; usize::from(u16::from_le_bytes([fixed[26], fixed[27]]))];
        read_exact_at(self.file, &mut name, record.header_at + LOCAL_BYTES)?;
        if name != record.raw_name {
            return Err(damaged(format!("its own header calls it `{}`", show_bytes(&name))));
        }
        self.take(record, end - record.header_at)?;
        Input::range(self.file, start, record.stored, coding, self.meter.clone(), self.dictionaries)
    }
}

impl Reading<'_> {
    /// Counts what a member takes of the file.
    fn take(&mut self, record: &Record, bytes: u64) -> Result<()> {
        self.taken = self.taken.saturating_add(bytes);
        if self.taken > self.until {
            return Err(refused(format!("`{}` shares its bytes with other members", record.shown())));
        }
        Ok(())
    }
}

fn coding(record: &Record) -> Result<Coding> {
    match record.method {
        0 if record.stored == record.size => Ok(Coding::Plain),
        0 => Err(damaged("it is stored and has two lengths")),
        8 => Ok(Coding::Deflate),
        12 => Ok(Coding::Bzip2),
        93 => Ok(Coding::Zstd),
        95 => Ok(Coding::Xz),
        method => {
            let known = match method {
                9 => " (Deflate64)",
                14 => " (LZMA)",
                99 => " (AES encryption)",
                _ => "",
            };
            Err(unsupported(format!("`{}` is compressed by method {method}{known}", record.shown())))
        }
    }
}

/// After the stated bytes nothing may follow, and their sum must be right.
fn check_end(input: &mut Input, crc: &flate2::Crc, record: &Record) -> Result<()> {
    if input.fill(&mut [0])? > 0 {
        return Err(damaged(format!("it has more than the {} bytes that the directory states", record.size)));
    }
    if crc.sum() != record.crc {
        return Err(damaged("its CRC-32 is wrong"));
    }
    Ok(())
}

fn read_exact_at(file: Bytes<'_>, buffer: &mut [u8], at: u64) -> Result<()> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(at + count(length), &mut buffer[length..]) {
            Ok(0) => return Err(truncated()),
            Ok(more) => length += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(input::fault(error)),
        }
    }
    Ok(())
}
