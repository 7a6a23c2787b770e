//! Connections begin and end, from either side.

use super::*;

#[test]
fn the_guest_dials() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);

    rig.send(PORTS, Op::Data, 0, b"hello");
    assert_eq!(drain(&mut stream), (b"hello".to_vec(), false));
    stream.write_all(b"world").unwrap();
    rig.wake();
    let packets = rig.receive();
    assert_eq!(packets.len(), 1);
    assert_eq!(
        (packets[0].0.op, &packets[0].1[..]),
        (Op::Data, &b"world"[..])
    );
    assert_eq!((packets[0].0.buffer, packets[0].0.forwarded), (WINDOW, 5));

    // The guest is done sending, the host is not.
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_SEND, &[]);
    assert_eq!(drain(&mut stream), (vec![], true));
    stream.write_all(b"bye").unwrap();
    drop(stream);
    rig.wake();
    assert_eq!(
        rig.receive_ops(),
        [(Op::Data, 0, 3), (Op::Shutdown, SHUTDOWN_BOTH, 0)]
    );
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)]);
    rig.send(PORTS, Op::Reset, 0, &[]);
    assert_eq!(rig.receive_ops(), [], "a reset is not answered");
}

/// A shutdown is an event of the host's end too: it must not cause the next one, for ever.
#[test]
fn a_half_closed_connection_is_quiet() {
    for side in [SHUTDOWN_SEND, SHUTDOWN_RECEIVE] {
        let memory = memory();
        let mut rig = Rig::new(&memory);
        let mut listener = rig.handle.listen(1024);
        let mut stream = rig.dial(&mut listener, PORTS);
        rig.send(PORTS, Op::Shutdown, side, &[]);
        rig.wake();
        rig.wake();
        let events = rig.device.epoll.wait(0, &mut [EpollEvent::default()]);
        assert_eq!(events.unwrap(), 0, "shut down: {side}");

        // The other direction goes on.
        if side == SHUTDOWN_SEND {
            stream.write_all(b"still").unwrap();
            rig.wake();
            assert_eq!(rig.receive_ops(), [(Op::Data, 0, 5)]);
        } else {
            rig.send(PORTS, Op::Data, 0, b"still");
            assert_eq!(drain(&mut stream), (b"still".to_vec(), false));
        }
    }
}

#[test]
fn the_host_dials() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut answered = rig.connect(77, 1025);
    let packets = rig.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.destination_port),
        (Op::Request, 1025)
    );
    let ports = (packets[0].0.source_port, 1025);
    assert!(answered.try_recv().is_err());
    rig.send(ports, Op::Response, 0, &[]);
    let mut stream = answered.try_recv().unwrap().unwrap();
    stream.write_all(b"x").unwrap();
    rig.wake();
    assert_eq!(rig.receive_ops(), [(Op::Data, 0, 1)]);

    let mut refused = rig.connect(78, 1026);
    let port = rig.receive()[0].0.source_port;
    rig.send((port, 1026), Op::Reset, 0, &[]);
    assert_eq!(
        refused.try_recv().unwrap().unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );

    // Taken back: before the guest knows of it, nothing; after, a reset.
    let posted = rig.idle.len();
    assert_eq!(posted, 0);
    drop(rig.connect(79, 1027));
    let port = rig.receive()[0].0.source_port;
    rig.device
        .shared
        .submit(Command::Cancel { id: 79 })
        .unwrap();
    rig.wake();
    let packets = rig.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.source_port),
        (Op::Reset, port)
    );
    rig.send((port, 1027), Op::Response, 0, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)], "too late");

    // Nobody waits any more when the guest accepts.
    drop(rig.connect(80, 1028));
    let port = rig.receive()[0].0.source_port;
    rig.send((port, 1028), Op::Response, 0, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)]);
    assert_eq!(rig.device.muxer.connections(), 1, "only the first is left");
}

#[test]
fn a_process_dials() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    rig.handle
        .serve(std::os::unix::net::UnixListener::bind(&path).unwrap())
        .unwrap();
    rig.wake();
    let mut process = UnixStream::connect(&path).unwrap();
    process.set_nonblocking(true).unwrap();
    process.write_all(b"CONNECT 10").unwrap();
    rig.wake();
    rig.wake();
    assert_eq!(rig.receive_ops(), []);
    process.write_all(b"25\nearly").unwrap();
    rig.wake();
    let packets = rig.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.destination_port),
        (Op::Request, 1025)
    );
    let ports = (packets[0].0.source_port, 1025);
    rig.send(ports, Op::Response, 0, &[]);
    assert_eq!(
        drain(&mut process),
        (format!("OK {}\n", ports.0).into_bytes(), false)
    );
    rig.wake();
    assert_eq!(rig.receive_ops(), [(Op::Data, 0, 5)]);
    rig.send(ports, Op::Data, 0, b"answer");
    assert_eq!(drain(&mut process), (b"answer".to_vec(), false));

    // Refused, wrong, and gone before the answer.
    let dial = |rig: &mut Rig<'_>, line: &str| {
        let mut process = UnixStream::connect(&path).unwrap();
        process.set_nonblocking(true).unwrap();
        process.write_all(line.as_bytes()).unwrap();
        rig.wake();
        rig.wake();
        process
    };
    let mut refused = dial(&mut rig, "CONNECT 9\n");
    let port = rig.receive()[0].0.source_port;
    rig.send((port, 9), Op::Reset, 0, &[]);
    assert_eq!(drain(&mut refused), (vec![], true));
    let mut wrong = dial(&mut rig, "GET / HTTP/1.1\r\n");
    assert_eq!(drain(&mut wrong), (vec![], true));
    drop(dial(&mut rig, "CONNECT 8\n"));
    rig.wake();
    let ops: Vec<_> = rig.receive().iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [Op::Request, Op::Reset]);
    assert_eq!(rig.device.muxer.connections(), 1);
}

#[test]
fn a_reset_drops_connections_but_not_requests_to_come() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    rig.rx.queue.set_ready(false);
    let mut answered = rig.connect(77, 1025);
    rig.device.reset();
    assert_eq!(drain(&mut stream), (vec![], true));
    rig.rx.queue.set_ready(true);
    rig.post(0);
    assert_eq!(rig.receive_ops(), [(Op::Request, 0, 0)]);
    drop(rig.device);
    assert!(matches!(
        answered.try_recv(),
        Err(oneshot::error::TryRecvError::Closed)
    ));
    assert!(listener.try_accept().is_none());
}
