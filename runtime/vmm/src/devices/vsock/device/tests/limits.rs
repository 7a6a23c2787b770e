//! What is against the rules, or too much.

use super::*;

#[test]
fn what_is_against_the_rules_is_reset() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);

    // Nobody listens; no such connection.
    rig.send((9, 1), Op::Request, 0, &[]);
    rig.send((1024, 1), Op::Data, 0, b"x");
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0), (Op::Reset, 0, 0)]);
    // Not from this guest, not to the host: not even an answer.
    rig.send_raw(
        Header {
            source_cid: 4,
            ..packet(PORTS, Op::Request)
        },
        &[],
    );
    rig.send_raw(
        Header {
            destination_cid: 1,
            ..packet(PORTS, Op::Request)
        },
        &[],
    );
    assert_eq!(rig.receive_ops(), []);
    // Not a stream.
    rig.send_raw(
        Header {
            kind: 2,
            ..packet(PORTS, Op::Request)
        },
        &[],
    );
    let packets = rig.receive();
    assert_eq!((packets[0].0.op, packets[0].0.kind), (Op::Reset, 2));

    let broken = [
        packet(PORTS, Op::Unknown(99)),
        packet(PORTS, Op::Request),
        packet(PORTS, Op::Response),
        Header {
            kind: 2,
            ..packet(PORTS, Op::Data)
        },
        Header {
            length: 3,
            ..packet(PORTS, Op::Data)
        }, // more than there is
        Header {
            length: 1 << 30,
            ..packet(PORTS, Op::Data)
        }, // much more
    ];
    for header in broken {
        let mut stream = rig.dial(&mut listener, PORTS);
        rig.send_raw(header, b"ab");
        assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)], "{header:?}");
        assert_eq!(drain(&mut stream), (vec![], true));
        assert_eq!(rig.device.muxer.connections(), 0);
    }
    // A length smaller than the buffer is fine: the rest is no payload.
    let mut stream = rig.dial(&mut listener, PORTS);
    rig.send_raw(
        Header {
            length: 1,
            ..packet(PORTS, Op::Data)
        },
        b"ab",
    );
    assert_eq!(drain(&mut stream), (b"a".to_vec(), false));
}

#[test]
fn a_full_backlog_and_too_many_connections_are_refused() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let _listener = rig.handle.listen(1024);
    let mut answers = HashMap::new();
    for guest_port in 0..70 {
        rig.send((1024, guest_port), Op::Request, 0, &[]);
        for (op, ..) in rig.receive_ops() {
            *answers.entry(format!("{op:?}")).or_insert(0) += 1;
        }
    }
    assert_eq!(
        answers,
        HashMap::from([("Response".to_owned(), 64), ("Reset".to_owned(), 6)])
    );

    let mut last = Vec::new();
    for id in 0..1024 {
        last.push(rig.connect(10_000 + id, 1025));
        rig.receive();
    }
    assert_eq!(rig.device.muxer.connections(), 1024);
    assert_eq!(
        last[1023].try_recv().unwrap().unwrap_err().kind(),
        ErrorKind::QuotaExceeded
    );
}

#[test]
fn replies_do_not_pile_up() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    // The guest never empties its receive queue, and sends what needs replies.
    let mut taken = 0;
    for guest_port in 0..2000 {
        rig.send_raw(packet((9, guest_port), Op::Data), &[]);
        if rig.tx.used().is_none() {
            break;
        }
        taken += 1;
    }
    assert_eq!(
        taken,
        256 + u32::from(TestQueue::SIZE),
        "then its packets wait"
    );
    // It empties it: all is answered, those that waited too.
    assert_eq!(rig.receive().len(), taken as usize + 1);
    assert!(rig.tx.used().is_some());
}

#[test]
fn malformed_chains_are_given_back() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let malformed: [&[Part]; 4] = [
        &[(TX_HEADER, 43, 0)],
        &[(TX_HEADER, 44, WRITE)],
        &[(MEMORY as u64, 44, 0)],
        &[(TX_HEADER, 44, WRITE), (TX_DATA, 4, 0)],
    ];
    for chain in malformed {
        rig.tx.push(chain);
        rig.process(DeviceEvent::Queue(TX));
        assert_eq!(rig.tx.used(), Some((0, 0)));
    }
    // Receive buffers that hold no header, before one that does.
    let mut rig = Rig::new(&memory);
    rig.rx = TestQueue::new(&memory, 0x1000);
    rig.rx.push_at(0, &[(RX_BUFFERS, 43, WRITE)]);
    rig.rx.push_at(1, &[(MEMORY as u64 - 10, 44, WRITE)]);
    rig.rx
        .push_at(2, &[(RX_BUFFERS, 20, WRITE), (RX_BUFFERS + 20, 24, WRITE)]);
    rig.send((9, 1), Op::Data, 0, &[]);
    assert_eq!([rig.rx.used(), rig.rx.used()], [Some((0, 0)), Some((1, 0))]);
    assert_eq!(rig.rx.used(), Some((2, 44)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any packets: never a panic, never more than the limits.
    #[test]
    fn survives_any_guest(
        packets in vec(
            (
                (0_u16..9, 1022_u32..1026, 0_u32..4, 0_u32..8),
                prop_oneof![0_u32..70_000, any::<u32>()],
                prop_oneof![0_u32..70_000, any::<u32>()],
                (0_usize..9000, prop_oneof![9 => Just(1_u16), 1 => 0_u16..3]),
                0_u8..6,
            ),
            1..100,
        ),
    ) {
        let memory = memory();
        let mut rig = Rig::new(&memory);
        let mut listeners = [rig.handle.listen(1023), rig.handle.listen(1024)];
        let mut streams = Vec::new();
        for ((op, host, guest, flags), length, number, (bytes, kind), host_action) in packets {
            let mut wire = packet((host, guest), Op::Data).to_bytes();
            wire[30] = op as u8;
            let length = if length % 3 == 0 { length } else { bytes as u32 };
            let header = Header { flags, length, kind, buffer: number, forwarded: number / 2, ..Header::from_bytes(&wire) };
            rig.send_raw(header, &vec![1; bytes]);
            streams.extend(listeners.iter_mut().filter_map(VsockListener::try_accept));
            match host_action {
                0 => drop(streams.pop()),
                1 => streams.iter_mut().for_each(|stream| drop(stream.write(&[2; 5000]))),
                2 => streams.iter_mut().for_each(|stream| drop(stream.read(&mut vec![0; 50_000]))),
                3 => drop(rig.connect(u64::from(number) + 1_000_000, guest)),
                4 => streams.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Write))),
                _ => drop(rig.filled()),
            }
            rig.wake();
            rig.post(3);
            prop_assert!(rig.device.muxer.connections() <= 1024);
            prop_assert!(rig.device.muxer.waiting() <= 1024 * WINDOW as usize);
        }
    }
}
