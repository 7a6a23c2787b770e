//! One request of the driver, carried out (virtio 1.2, 5.2.6).
//!
//! A request is a header and data that the device reads, data that it writes, and a last byte for the status. A
//! request must lie in one segment, and, when it writes, in a writable one; everything else is an I/O error.

use nix::errno::Errno;
use tracing::debug;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::segments::SegmentMap;
use crate::buffers::GuestSlices;

/// The unit of offsets and lengths in requests, in bytes, whatever the block size.
pub(super) const SECTOR_BYTES: u64 = 512;

/// Largest read or write in bytes. Linux asks for 1.25 MiB unless told otherwise.
const MAX_TRANSFER_BYTES: usize = 64 << 20;

/// Ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 32;

/// What the disk says it is (`/sys/block/vda/serial`).
const SERIAL: &[u8] = b"podvisor";

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// Why a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Io,
    Unsupported,
}

/// Carries out the request in a chain. Returns the bytes written to guest memory, the status among them; a chain
/// that has no room for a status gets none.
pub(super) fn serve(
    map: &SegmentMap,
    mut readable: GuestSlices<'_>,
    mut writable: GuestSlices<'_>,
) -> u32 {
    let Some(status) = writable.pop_byte() else {
        debug!("a block request without room for its status");
        return 0;
    };
    let room = writable.len();
    let outcome = execute(map, &mut readable, &mut writable);
    let written = room - writable.len();
    let (code, written) = match outcome {
        Ok(()) => (VIRTIO_BLK_S_OK, written),
        Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
        Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
    };
    status.write(code as u8);
    // Reads are limited to MAX_TRANSFER_BYTES, so this fits.
    written as u32 + 1
}

fn execute(
    map: &SegmentMap,
    readable: &mut GuestSlices<'_>,
    writable: &mut GuestSlices<'_>,
) -> Result<(), Failure> {
    let mut header = [0; HEADER_BYTES];
    if !readable.read(&mut header) {
        return Err(Failure::Io);
    }
    let kind = le32(&header, 0);
    let sector = le64(&header, 8);
    match kind {
        VIRTIO_BLK_T_IN => read(map, sector, writable),
        VIRTIO_BLK_T_OUT => write(map, sector, readable),
        VIRTIO_BLK_T_FLUSH => map.flush().map_err(|_| Failure::Io),
        VIRTIO_BLK_T_GET_ID => identify(writable),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => clear(map, kind, readable),
        _ => Err(Failure::Unsupported),
    }
}

fn read(map: &SegmentMap, sector: u64, into: &mut GuestSlices<'_>) -> Result<(), Failure> {
    let offset = checked_offset(sector, into.len())?;
    let (source, at) = map.find(offset, into.len() as u64).ok_or(Failure::Io)?;
    source.read(at, into).map_err(|error| {
        source.report("read", at, &error);
        Failure::Io
    })
}

fn write(map: &SegmentMap, sector: u64, from: &mut GuestSlices<'_>) -> Result<(), Failure> {
    let offset = checked_offset(sector, from.len())?;
    let (source, at) = map.find(offset, from.len() as u64).ok_or(Failure::Io)?;
    if !source.writable() {
        return Err(Failure::Io);
    }
    source.write(at, from).map_err(|error| {
        source.report("write", at, &error);
        Failure::Io
    })
}

/// The byte offset of a transfer of `length` bytes, which must be whole sectors.
fn checked_offset(sector: u64, length: usize) -> Result<u64, Failure> {
    let whole_sectors = length > 0 && (length as u64).is_multiple_of(SECTOR_BYTES);
    if !whole_sectors || length > MAX_TRANSFER_BYTES {
        return Err(Failure::Io);
    }
    sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)
}

fn identify(writable: &mut GuestSlices<'_>) -> Result<(), Failure> {
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    id[..SERIAL.len()].copy_from_slice(SERIAL);
    if writable.write(&id) {
        Ok(())
    } else {
        Err(Failure::Io)
    }
}

/// Discard and write-zeroes: both make holes, which read as zeroes and cost no space.
fn clear(map: &SegmentMap, kind: u32, ranges: &mut GuestSlices<'_>) -> Result<(), Failure> {
    let allowed_flags = if kind == VIRTIO_BLK_T_WRITE_ZEROES {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    } else {
        0
    };
    if ranges.is_empty()
        || !ranges.len().is_multiple_of(RANGE_BYTES)
        || ranges.len() / RANGE_BYTES > MAX_RANGES as usize
    {
        return Err(Failure::Io);
    }
    let mut range = [0; RANGE_BYTES];
    while ranges.read(&mut range) {
        let (sector, sectors, flags) = (le64(&range, 0), le32(&range, 8), le32(&range, 12));
        if flags & !allowed_flags != 0 {
            return Err(Failure::Unsupported);
        }
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
        let length = u64::from(sectors) * SECTOR_BYTES;
        let (source, at) = map.find(offset, length).ok_or(Failure::Io)?;
        if length == 0 || !source.writable() {
            return Err(Failure::Io);
        }
        match source.punch(at, length) {
            Ok(()) => {}
            // The guest's kernel takes this as an answer and writes zeroes itself.
            Err(Errno::EOPNOTSUPP | Errno::ENODEV) => return Err(Failure::Unsupported),
            Err(error) => {
                source.report("clear", at, &error.into());
                return Err(Failure::Io);
            }
        }
    }
    Ok(())
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
