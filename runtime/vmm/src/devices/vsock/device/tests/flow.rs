//! Credit, slow ends, and streams that stay streams.

use super::*;

#[test]
fn a_slow_host_stops_the_guest_and_loses_nothing() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    let mut sent = Vec::new();
    let mut taken = 0;
    let mut credit = WINDOW;
    // A guest by the rules: it sends while it has credit.
    while credit > 0 {
        let length = credit.min(30_000);
        let chunk: Vec<u8> = (0..length)
            .map(|at| (sent.len() as u32 + at * 7) as u8)
            .collect();
        rig.send(PORTS, Op::Data, 0, &chunk);
        sent.extend(chunk);
        for (header, _) in rig.receive() {
            assert_eq!(header.op, Op::CreditUpdate);
            taken = header.forwarded;
        }
        credit = header_credit(WINDOW, sent.len(), taken);
    }
    // The socket is full, and so is the window, except for what is not worth a packet yet.
    let waiting = rig.device.muxer.waiting();
    assert!(
        (3 * WINDOW as usize / 4..=WINDOW as usize).contains(&waiting),
        "{waiting}"
    );

    // The guest closes for good: it is told at once that it may forget, the host still gets all of it.
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)]);
    let mut received = Vec::new();
    loop {
        let (bytes, ended) = drain(&mut stream);
        received.extend(bytes);
        if ended {
            break;
        }
        rig.wake();
    }
    assert!(received == sent);
    assert_eq!(rig.device.muxer.connections(), 0);
}

fn header_credit(window: u32, sent: usize, forwarded: u32) -> u32 {
    window - (sent as u32 - forwarded)
}

#[test]
fn more_than_the_credit_is_a_violation() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let stream = rig.dial(&mut listener, PORTS);
    let mut ops = Vec::new();
    for _ in 0..100 {
        rig.send(PORTS, Op::Data, 0, &vec![1; 32 << 10]);
        ops.extend(rig.receive_ops());
        assert!(rig.device.muxer.waiting() <= WINDOW as usize);
    }
    assert!(ops.contains(&(Op::Reset, 0, 0)));
    drop(stream);
}

#[test]
fn the_guests_credit_is_kept() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    stream
        .write_all(&vec![5; 2 * GUEST_BUFFER as usize])
        .unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    rig.wake();
    let ops = rig.receive_ops();
    let bytes: u32 = ops.iter().map(|(_, _, length)| length).sum();
    assert_eq!(bytes, GUEST_BUFFER);
    assert_eq!(ops.last().unwrap().0, Op::CreditRequest);
    let update = Header {
        forwarded: GUEST_BUFFER,
        ..packet(PORTS, Op::CreditUpdate)
    };
    rig.send_raw(update, &[]);
    let ops = rig.receive_ops();
    let bytes: u32 = ops.iter().map(|(_, _, length)| length).sum();
    assert_eq!(bytes, GUEST_BUFFER);
    // The end of the host's data waits for no credit once the data is out.
    rig.send_raw(
        Header {
            forwarded: 2 * GUEST_BUFFER,
            ..update
        },
        &[],
    );
    let ops = [ops, rig.receive_ops()].concat();
    assert_eq!(ops.last().unwrap(), &(Op::Shutdown, SHUTDOWN_SEND, 0));
}

#[test]
fn a_guest_that_takes_no_more_stops_the_host() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_RECEIVE, &[]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    rig.send(PORTS, Op::Data, 0, b"still");
    assert_eq!(drain(&mut stream), (b"still".to_vec(), false));
    drop(stream);
    rig.wake();
    assert_eq!(rig.receive_ops(), [(Op::Shutdown, SHUTDOWN_BOTH, 0)]);
}

#[test]
fn a_host_that_is_gone_stops_the_guest() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    drop(rig.dial(&mut listener, PORTS));
    // Before the device has seen that the host's end is closed.
    rig.send(PORTS, Op::Data, 0, b"lost");
    rig.wake();
    let ops = rig.receive_ops();
    assert_eq!(ops.last().unwrap(), &(Op::Shutdown, SHUTDOWN_BOTH, 0));
    assert_eq!(
        rig.device.muxer.connections(),
        1,
        "the guest has not confirmed"
    );
    rig.send(PORTS, Op::Reset, 0, &[]);
    assert_eq!(rig.device.muxer.connections(), 0);
}

/// What one side has sent and the other not received yet.
#[derive(Default)]
struct Pipe {
    next: u8,
    on_the_way: VecDeque<u8>,
}

impl Pipe {
    fn make(&mut self, length: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                self.next = self.next.wrapping_mul(5).wrapping_add(1);
                self.next
            })
            .collect();
        self.on_the_way.extend(&bytes);
        bytes
    }

    fn expect(&mut self, bytes: &[u8]) {
        assert!(
            self.on_the_way.len() >= bytes.len()
                && self
                    .on_the_way
                    .drain(..bytes.len())
                    .eq(bytes.iter().copied())
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Both directions, in any interleaving of a guest that keeps its credit and a host that reads when it likes: every
    /// byte arrives, in order, and then the end.
    #[test]
    fn streams_are_streams(steps in vec((0_u8..5, 1_usize..40_000), 1..120)) {
        let memory = memory();
        let mut rig = Rig::new(&memory);
        let mut listener = rig.handle.listen(1024);
        let mut stream = rig.dial(&mut listener, PORTS);
        let (mut to_host, mut to_guest) = (Pipe::default(), Pipe::default());
        let (mut sent, mut taken, mut received) = (0_u32, 0_u32, 0_u32);
        let mut host_wrote_all = true;
        let take = |packets: Vec<Packet>, to_guest: &mut Pipe, taken: &mut u32, received: &mut u32| {
            for (header, payload) in packets {
                *taken = header.forwarded;
                *received += payload.len() as u32;
                to_guest.expect(&payload);
            }
        };
        for (action, amount) in steps {
            match action {
                0 => {
                    let length = amount.min((WINDOW - (sent - taken)) as usize);
                    let bytes = to_host.make(length);
                    sent += length as u32;
                    let header = Header { length: length as u32, forwarded: received, ..packet(PORTS, Op::Data) };
                    rig.send_raw(header, &bytes);
                }
                1 => {
                    let mut bytes = vec![0; amount];
                    if let Ok(count) = stream.read(&mut bytes) {
                        to_host.expect(&bytes[..count]);
                    }
                    rig.wake();
                }
                2 if host_wrote_all => {
                    let bytes = to_guest.make(amount);
                    let written = stream.write(&bytes).unwrap_or(0);
                    to_guest.on_the_way.truncate(to_guest.on_the_way.len() - (amount - written));
                    host_wrote_all = written == amount;
                    rig.wake();
                }
                3 => {
                    let packets = rig.filled();
                    take(packets, &mut to_guest, &mut taken, &mut received);
                    rig.post(amount % 17);
                }
                _ => rig.send_raw(Header { forwarded: received, ..packet(PORTS, Op::CreditUpdate) }, &[]),
            }
            prop_assert!(rig.device.muxer.waiting() <= WINDOW as usize);
        }
        // Both close their sides; what is on the way arrives.
        rig.send_raw(Header { flags: SHUTDOWN_SEND, ..packet(PORTS, Op::Shutdown) }, &[]);
        stream.shutdown(Shutdown::Write).unwrap();
        let mut ended = (false, false);
        for _ in 0..200 {
            let (bytes, end) = drain(&mut stream);
            to_host.expect(&bytes);
            ended.0 |= end;
            rig.wake();
            let packets = rig.receive();
            ended.1 |= packets.iter().any(|(header, _)| header.op == Op::Shutdown && header.flags & SHUTDOWN_SEND != 0);
            take(packets, &mut to_guest, &mut taken, &mut received);
            rig.send_raw(Header { forwarded: received, ..packet(PORTS, Op::CreditUpdate) }, &[]);
        }
        prop_assert_eq!((to_host.on_the_way.len(), to_guest.on_the_way.len()), (0, 0));
        prop_assert_eq!(ended, (true, true));
    }
}
