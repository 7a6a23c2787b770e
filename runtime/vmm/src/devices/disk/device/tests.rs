//! The device driven through a queue, as a driver does it, a hostile one included.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_bindings::virtio_blk::*;
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::devices::disk::{Access, Segment};
use crate::test_queue::{Part, TestQueue};

const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// Where the tests put things in guest memory.
const HEADER: u64 = 0x2000;
const STATUS: u64 = 0x3000;
const DATA: u64 = 0x10_000;
const MEMORY: usize = 0x80_000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

fn file_of(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

/// A disk and its driver.
struct Rig<'m> {
    memory: &'m GuestMemoryMmap,
    queue: TestQueue<'m>,
    disk: SegmentDisk,
}

impl<'m> Rig<'m> {
    fn new(memory: &'m GuestMemoryMmap, map: &SegmentMap) -> Self {
        Self {
            memory,
            queue: TestQueue::new(memory, 0),
            disk: SegmentDisk::new(map.clone()),
        }
    }

    fn process(&mut self) -> Result<u32, DeviceError> {
        let mut queues = [QueueRef::new(&mut self.queue.queue)];
        self.disk
            .process(self.memory, &mut queues, DeviceEvent::Queue(0))
    }

    /// One request with `data` after the header. Returns the status and the bytes said to be written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        self.memory
            .write_obj(kind.to_le(), GuestAddress(HEADER))
            .unwrap();
        self.memory
            .write_obj(sector.to_le(), GuestAddress(HEADER + 8))
            .unwrap();
        self.memory
            .write_obj(0xff_u8, GuestAddress(STATUS))
            .unwrap();
        let chain = [&[(HEADER, 16, 0)], data, &[(STATUS, 1, WRITE)]].concat();
        self.queue.push(&chain);
        assert_eq!(self.process().unwrap(), 1);
        let (_, written) = self.queue.used().unwrap();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), written)
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u8> {
        let (status, written) =
            self.request(VIRTIO_BLK_T_IN, offset / 512, &[(DATA, length, WRITE)]);
        if u32::from(status) != VIRTIO_BLK_S_OK {
            assert_eq!(written, 1);
            return Err(status);
        }
        assert_eq!(written, length + 1);
        let mut content = vec![0; length as usize];
        self.memory
            .read_slice(&mut content, GuestAddress(DATA))
            .unwrap();
        Ok(content)
    }

    fn write(&mut self, offset: u64, content: &[u8]) -> u8 {
        self.memory
            .write_slice(content, GuestAddress(DATA))
            .unwrap();
        self.request(
            VIRTIO_BLK_T_OUT,
            offset / 512,
            &[(DATA, content.len() as u32, 0)],
        )
        .0
    }

    /// Discard or write-zeroes of (sector, sectors, flags).
    fn clear(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (index, (sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = DATA + 16 * index as u64;
            self.memory
                .write_obj(sector.to_le(), GuestAddress(at))
                .unwrap();
            self.memory
                .write_obj(sectors.to_le(), GuestAddress(at + 8))
                .unwrap();
            self.memory
                .write_obj(flags.to_le(), GuestAddress(at + 12))
                .unwrap();
        }
        self.request(kind, 0, &[(DATA, 16 * ranges.len() as u32, 0)])
            .0
    }
}

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

#[test]
fn config_space_is_what_drivers_expect() {
    let disk = SegmentDisk::new(SegmentMap::new());
    let mut capacity = [0; 8];
    disk.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity) * 512, 8 << 40);
    let mut tail = [9; 8];
    disk.read_config(56, &mut tail);
    assert_eq!(tail, [1, 0, 0, 0, 0, 0, 0, 0]);
    disk.read_config(u64::MAX, &mut tail);
    assert_eq!(tail, [0; 8]);
}

#[test]
fn reads_the_file_and_zeroes_after_it() {
    let memory = memory();
    let map = SegmentMap::new();
    let mut rig = Rig::new(&memory, &map);
    let segment = map
        .insert(file_of(&[7; 5000]), 8, 4992, Access::ReadOnly)
        .unwrap();
    assert_eq!(segment.length, 8192);
    let content = rig.read(segment.start, 8192).unwrap();
    assert_eq!(content, [vec![7; 4992], vec![0; 3200]].concat());
    assert_eq!(rig.read(segment.start + 7680, 512).unwrap(), vec![0; 512]);
    assert_eq!(
        rig.read(segment.start + 7680, 1024),
        Err(IOERR),
        "beyond the segment"
    );
    assert_eq!(
        rig.read(segment.start + 100 * 512, 512),
        Err(IOERR),
        "no segment"
    );
    map.remove(segment.start).unwrap();
    assert_eq!(rig.read(segment.start, 512), Err(IOERR));
}

#[test]
fn writes_only_where_it_may() {
    let memory = memory();
    let map = SegmentMap::new();
    let mut rig = Rig::new(&memory, &map);
    let scratch = file_of(&[1; 8192]);
    let layer = file_of(&[2; 4096]);
    let rw = map
        .insert(scratch.try_clone().unwrap(), 4096, 4096, Access::ReadWrite)
        .unwrap();
    let ro = map
        .insert(layer.try_clone().unwrap(), 0, 4096, Access::ReadOnly)
        .unwrap();

    assert_eq!(rig.write(rw.start + 512, &[5; 1024]), OK);
    let mut content = [0; 8192];
    scratch.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content[..4608], [1; 4608]);
    assert_eq!(content[4608..5632], [5; 1024]);
    assert_eq!(content[5632..], [1; 2560]);

    assert_eq!(rig.write(ro.start, &[5; 512]), IOERR);
    assert_eq!(
        rig.write(rw.start + 3584, &[5; 1024]),
        IOERR,
        "over the end"
    );
    assert_eq!(
        rig.write(rw.start + 4096, &[5; 512]),
        IOERR,
        "between segments"
    );
    assert_eq!(
        rig.request(VIRTIO_BLK_T_OUT, u64::MAX, &[(DATA, 512, 0)]).0,
        IOERR
    );
    assert_eq!(
        rig.request(VIRTIO_BLK_T_OUT, u64::MAX / 512, &[(DATA, 512, 0)])
            .0,
        IOERR
    );
    assert_eq!(
        rig.request(VIRTIO_BLK_T_OUT, rw.start / 512, &[(DATA, 511, 0)])
            .0,
        IOERR
    );
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, rw.start / 512, &[]).0, IOERR);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(layer.metadata().unwrap().len(), 4096);
    assert_eq!(scratch.metadata().unwrap().len(), 8192);
}

#[test]
fn punches_holes_in_writable_segments() {
    let memory = memory();
    let map = SegmentMap::new();
    let mut rig = Rig::new(&memory, &map);
    let scratch = file_of(&vec![1; 1 << 20]);
    let rw = map
        .insert(scratch.try_clone().unwrap(), 0, 1 << 20, Access::Ephemeral)
        .unwrap();
    let ro = map
        .insert(file_of(&[2; 4096]), 0, 4096, Access::ReadOnly)
        .unwrap();
    let before = scratch.metadata().unwrap().blocks();
    assert_eq!(
        rig.clear(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0), (1024, 1016, 0)]),
        OK
    );
    assert!(scratch.metadata().unwrap().blocks() < before);
    assert_eq!(rig.read(rw.start + 4096, 4096).unwrap(), [0; 4096]);
    assert_eq!(rig.read(rw.start, 4096).unwrap(), [1; 4096]);
    assert_eq!(rig.clear(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 1)]), OK);
    assert_eq!(rig.read(rw.start, 512).unwrap(), [0; 512]);

    assert_eq!(
        rig.clear(VIRTIO_BLK_T_DISCARD, &[(ro.start / 512, 8, 0)]),
        IOERR
    );
    assert_eq!(rig.clear(VIRTIO_BLK_T_DISCARD, &[(0, 0, 0)]), IOERR);
    assert_eq!(rig.clear(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(
        rig.clear(VIRTIO_BLK_T_DISCARD, &[(u64::MAX, u32::MAX, 0)]),
        IOERR
    );
    assert_eq!(rig.clear(VIRTIO_BLK_T_DISCARD, &[]), IOERR);
    assert_eq!(rig.clear(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0); 33]), IOERR);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 17, 0)]).0,
        IOERR
    );
}

#[test]
fn answers_what_it_does_not_know() {
    let memory = memory();
    let mut rig = Rig::new(&memory, &SegmentMap::new());
    assert_eq!(rig.request(99, 0, &[(DATA, 512, WRITE)]), (UNSUPP, 1));
    assert_eq!(
        rig.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]),
        (OK, 21)
    );
    let mut id = [9; 20];
    memory.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"podvisor\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(
        rig.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, WRITE)]),
        (IOERR, 1)
    );

    let malformed: [&[Part]; 4] = [
        &[(HEADER, 16, 0)],                                // no status
        &[(HEADER, 15, 0), (STATUS, 1, WRITE)],            // short header
        &[(STATUS, 1, WRITE), (HEADER, 16, 0)],            // wrong order
        &[(HEADER, 16, 0), (MEMORY as u64 - 1, 2, WRITE)], // outside memory
    ];
    for chain in malformed {
        rig.queue.push(chain);
        assert_eq!(rig.process().unwrap(), 1);
        assert!(rig.queue.used().unwrap().1 <= 1);
    }
}

#[test]
fn broken_rings_are_errors() {
    let memory = memory();
    let mut rig = Rig::new(&memory, &SegmentMap::new());
    rig.queue.set_available(TestQueue::SIZE + 1);
    assert!(rig.process().is_err());
    rig.queue
        .queue
        .set_avail_ring_address(Some(0xffff_f000), None);
    assert!(rig.process().is_err());
    // The index says that there are entries, which would be behind the end of memory.
    rig.queue
        .queue
        .set_avail_ring_address(Some(MEMORY as u32 - 4), None);
    memory
        .write_obj(1_u16, GuestAddress(MEMORY as u64 - 2))
        .unwrap();
    assert!(rig.process().is_err());
    rig.queue.queue.set_ready(false);
    assert_eq!(rig.process().unwrap(), 0);
}

/// The disk of the model: two files with two segments each, the middle ones next to each other on the disk's grid.
struct Model {
    map: SegmentMap,
    segments: Vec<(Segment, bool)>,
    files: [File; 2],
    guards: [Vec<u8>; 2],
}

const SEGMENT: u64 = 64 << 10;

impl Model {
    fn new() -> Self {
        let map = SegmentMap::new();
        let guards = [
            vec![0xa5; 4 * SEGMENT as usize],
            vec![0x5a; 4 * SEGMENT as usize],
        ];
        let files = [file_of(&guards[0]), file_of(&guards[1])];
        let mut segments = Vec::new();
        for (file, offset, access) in [
            (0, SEGMENT, Access::ReadWrite),
            (1, 0, Access::ReadOnly),
            (0, 3 * SEGMENT, Access::Ephemeral),
            (1, 2 * SEGMENT, Access::ReadOnly),
        ] {
            let source = files[file].try_clone().unwrap();
            let segment = map.insert(source, offset, SEGMENT, access).unwrap();
            segments.push((segment, access != Access::ReadOnly));
        }
        Self {
            map,
            segments,
            files,
            guards,
        }
    }

    /// The bytes of the files that no segment or only a read-only one shows must never change.
    fn check_untouched(&self) {
        let size = SEGMENT as usize;
        let mut content = vec![0; 4 * size];
        self.files[0].read_exact_at(&mut content, 0).unwrap();
        assert!(
            content[..size] == self.guards[0][..size]
                && content[2 * size..3 * size] == self.guards[0][..size]
        );
        self.files[1].read_exact_at(&mut content, 0).unwrap();
        assert!(content == self.guards[1]);
        for file in &self.files {
            assert_eq!(file.metadata().unwrap().len(), 4 * SEGMENT);
        }
    }
}

/// A number that is often near something that matters.
fn edgy(limit: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        0..limit,
        (limit.saturating_sub(16)..=limit),
        any::<u64>(),
        Just(0),
        Just(u64::MAX)
    ]
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![4 => 0..MEMORY as u64, 1 => edgy(MEMORY as u64), 2 => Just(HEADER)];
    let length = prop_oneof![3 => Just(16), 3 => (0_u32..200).prop_map(|n| n * 512), 1 => any::<u32>(), 2 => Just(1)];
    let flags = prop_oneof![8 => 0_u16..4, 1 => 0_u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0_u16..16, 1 => any::<u16>()];
    (address, length, flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Any descriptors, any headers: never a panic, and never a byte changed outside a writable segment.
    #[test]
    fn survives_any_driver(
        table in vec(descriptor(), 16),
        heads in vec(prop_oneof![8 => 0_u16..16, 1 => any::<u16>()], 1..16),
        header in (prop_oneof![4 => 0_u32..14, 1 => any::<u32>()], edgy(4 << 11)),
        noise in vec(any::<u8>(), 64),
    ) {
        let model = Model::new();
        let memory = memory();
        memory.write_slice(&noise, GuestAddress(DATA)).unwrap();
        memory.write_obj(header.0.to_le(), GuestAddress(HEADER)).unwrap();
        memory.write_obj(header.1.to_le(), GuestAddress(HEADER + 8)).unwrap();
        let mut rig = Rig::new(&memory, &model.map);
        for (index, (address, length, flags, next)) in table.into_iter().enumerate() {
            rig.queue.store(index as u16, address, length, flags, next);
        }
        for head in heads {
            rig.queue.publish(head);
        }
        // An impossible head is an error of the queue; everything else is answered.
        let _ = rig.process();
        model.check_untouched();
    }

    /// Reads and writes anywhere give what a plain array of bytes would give.
    #[test]
    fn agrees_with_a_model(
        steps in vec((0_usize..4, 0_u64..130, 1_u32..20, 1_u32..3, any::<bool>(), any::<u8>()), 1..40),
    ) {
        let model = Model::new();
        let memory = memory();
        let mut rig = Rig::new(&memory, &model.map);
        let mut arrays: Vec<Vec<u8>> = [0xa5, 0x5a, 0xa5, 0x5a].map(|byte| vec![byte; SEGMENT as usize]).to_vec();
        for (which, sector, sectors, pieces, write, byte) in steps {
            let (segment, writable) = model.segments[which];
            let (offset, length) = (sector * 512, sectors * 512 * pieces);
            let fits = offset + u64::from(length) <= SEGMENT;
            let range = offset as usize..offset as usize + length as usize;
            let flags = if write { 0 } else { WRITE };
            let parts: Vec<Part> = (0..pieces)
                .map(|piece| (DATA + u64::from(piece * sectors * 512), sectors * 512, flags))
                .collect();
            let (kind, expected_ok) = if write { (VIRTIO_BLK_T_OUT, fits && writable) } else { (VIRTIO_BLK_T_IN, fits) };
            memory.write_slice(&vec![byte; length as usize], GuestAddress(DATA)).unwrap();
            let (status, _) = rig.request(kind, (segment.start + offset) / 512, &parts);
            prop_assert_eq!(status, if expected_ok { OK } else { IOERR });
            if !expected_ok {
                continue;
            }
            if write {
                arrays[which][range].fill(byte);
            } else {
                let mut content = vec![0; length as usize];
                memory.read_slice(&mut content, GuestAddress(DATA)).unwrap();
                prop_assert!(content == arrays[which][range]);
            }
        }
        model.check_untouched();
    }
}
