use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::devices::vsock::packet::TYPE_STREAM;

fn header(op: Op) -> Header {
    Header {
        source_cid: 3,
        destination_cid: 2,
        source_port: 1000,
        destination_port: 1024,
        length: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buffer: 1000,
        forwarded: 0,
    }
}

fn data(length: u32) -> Header {
    Header {
        length,
        ..header(Op::Data)
    }
}

/// Everything that is due besides data.
fn controls(connection: &mut Connection, host_has_data: bool) -> Vec<(Op, u32)> {
    std::iter::from_fn(|| {
        let control = connection.next_control(host_has_data)?;
        connection.stamp(0);
        Some((control.op, control.flags))
    })
    .collect()
}

fn established() -> Connection {
    let mut connection = Connection::incoming(&header(Op::Request));
    assert_eq!(controls(&mut connection, false), [(Op::Response, 0)]);
    connection
}

#[test]
fn a_request_is_answered_or_refused() {
    let mut connection = Connection::outgoing();
    assert!(connection.unknown_to_guest() && connection.requested());
    assert_eq!(controls(&mut connection, true), [(Op::Request, 0)]);
    assert!(!connection.unknown_to_guest() && connection.requested());
    assert!(!connection.wants_to_send(true), "no data before the answer");
    assert_eq!(connection.packet(&header(Op::Response)), Verdict::Accepted);
    assert_eq!(connection.data_budget(true), 1000);
    assert_eq!(connection.packet(&header(Op::Response)), Verdict::Violation);

    let mut refused = Connection::outgoing();
    assert_eq!(refused.packet(&header(Op::Reset)), Verdict::Gone);
    for op in [
        Op::Request,
        Op::Data,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::Unknown(9),
    ] {
        assert_eq!(
            Connection::outgoing().packet(&header(op)),
            Verdict::Violation,
            "{op:?}"
        );
    }
}

#[test]
fn credit_of_the_guest_limits_what_is_sent() {
    let mut connection = established();
    assert_eq!(connection.data_budget(true), 1000);
    assert_eq!(connection.data_budget(false), 0);
    connection.stamp(1000);
    assert_eq!(connection.data_budget(true), 0);
    assert_eq!(
        controls(&mut connection, true),
        [(Op::CreditRequest, 0)],
        "asked once"
    );
    assert!(!connection.wants_to_send(true));
    let update = Header {
        forwarded: 600,
        ..header(Op::CreditUpdate)
    };
    assert_eq!(connection.packet(&update), Verdict::Nothing);
    assert_eq!(connection.data_budget(true), 600);
    // A guest that claims to have taken more than it got has no credit.
    connection.packet(&Header {
        forwarded: 1001,
        ..update
    });
    assert_eq!(connection.data_budget(true), 0);
}

#[test]
fn credit_of_ours_limits_the_guest() {
    let mut connection = established();
    assert_eq!(connection.packet(&data(WINDOW)), Verdict::Deliver);
    assert_eq!(connection.packet(&data(1)), Verdict::Violation);
    let mut connection = established();
    assert_eq!(connection.packet(&data(WINDOW)), Verdict::Deliver);
    connection.forwarded(WINDOW as usize / 4 - 1);
    assert!(!connection.wants_to_send(false), "not worth a packet yet");
    connection.forwarded(1);
    assert_eq!(
        connection.next_control(false),
        Some(Control {
            op: Op::CreditUpdate,
            flags: 0
        })
    );
    assert_eq!(connection.stamp(0), (WINDOW, WINDOW / 4));
    assert_eq!(connection.packet(&data(WINDOW / 4)), Verdict::Deliver);
    assert_eq!(connection.packet(&data(1)), Verdict::Violation);
}

#[test]
fn answers_a_credit_request() {
    let mut connection = established();
    assert_eq!(
        connection.packet(&header(Op::CreditRequest)),
        Verdict::Nothing
    );
    assert_eq!(controls(&mut connection, false), [(Op::CreditUpdate, 0)]);
}

#[test]
fn half_closes_are_kept_apart() {
    let mut connection = established();
    let shutdown = |flags| Header {
        flags,
        ..header(Op::Shutdown)
    };
    assert_eq!(
        connection.packet(&shutdown(SHUTDOWN_SEND)),
        Verdict::Shutdown
    );
    assert!(!connection.guest_sends() && connection.guest_receives());
    assert_eq!(connection.data_budget(true), 1000);
    assert_eq!(
        connection.packet(&shutdown(SHUTDOWN_RECEIVE)),
        Verdict::Finished,
        "flags add up"
    );

    let mut connection = established();
    assert_eq!(
        connection.packet(&shutdown(SHUTDOWN_SEND)),
        Verdict::Shutdown
    );
    assert_eq!(connection.packet(&data(1)), Verdict::Violation);
    let mut connection = established();
    assert_eq!(
        connection.packet(&shutdown(SHUTDOWN_RECEIVE)),
        Verdict::Shutdown
    );
    assert_eq!(connection.data_budget(true), 0);
    assert_eq!(connection.packet(&data(1)), Verdict::Deliver);

    let mut connection = established();
    connection.host_stops_sending();
    connection.host_stops_sending();
    assert_eq!(
        controls(&mut connection, true),
        [(Op::Shutdown, SHUTDOWN_SEND)],
        "said once"
    );
    connection.host_stops_receiving();
    assert_eq!(
        controls(&mut connection, true),
        [(Op::Shutdown, SHUTDOWN_BOTH)]
    );
    assert_eq!(
        connection.packet(&data(WINDOW)),
        Verdict::Nothing,
        "nobody takes it"
    );
    assert_eq!(connection.packet(&data(WINDOW)), Verdict::Nothing);
}

#[derive(Debug, Clone)]
enum Step {
    Packet(Header),
    Forward(u32),
    Send(u32),
    HostStopsSending,
    HostStopsReceiving,
}

fn step() -> impl Strategy<Value = Step> {
    let op = (0_u16..9).prop_map(|op| {
        let mut bytes = [0; 44];
        bytes[30] = op as u8;
        Header::from_bytes(&bytes).op
    });
    let number = || prop_oneof![0_u32..70_000, any::<u32>()];
    let packet = (op, 0_u32..70_000, number(), number(), number()).prop_map(
        |(op, length, flags, buffer, forwarded)| {
            Step::Packet(Header {
                length,
                flags,
                buffer,
                forwarded,
                ..header(op)
            })
        },
    );
    prop_oneof![
        6 => packet,
        3 => (0_u32..70_000).prop_map(Step::Forward),
        3 => any::<u32>().prop_map(Step::Send),
        1 => Just(Step::HostStopsSending),
        1 => Just(Step::HostStopsReceiving),
    ]
}

proptest! {
    /// Whatever the guest says and the host does: no more is kept than the window, no more is sent than the guest
    /// allows, and what is announced is what was taken.
    #[test]
    fn credit_holds(steps in vec(step(), 1..200)) {
        let mut connection = established();
        let mut waiting = 0_u32;
        for step in steps {
            match step {
                Step::Packet(header) => match connection.packet(&header) {
                    Verdict::Deliver => waiting += header.length,
                    Verdict::Nothing | Verdict::Shutdown => {}
                    Verdict::Accepted => prop_assert!(false, "accepted twice"),
                    Verdict::Finished | Verdict::Gone | Verdict::Violation => break,
                },
                Step::Forward(count) if connection.host_receives() => {
                    let count = count.min(waiting);
                    waiting -= count;
                    connection.forwarded(count as usize);
                }
                Step::Forward(_) => {}
                Step::Send(length) => {
                    while connection.next_control(true).is_some() {
                        connection.stamp(0);
                    }
                    let length = length.min(connection.data_budget(true));
                    let credit = connection.credit();
                    let (window, forwarded) = connection.stamp(length);
                    prop_assert_eq!(window, WINDOW);
                    prop_assert_eq!(forwarded, connection.forwarded.0);
                    prop_assert_eq!(connection.credit(), credit - length);
                }
                Step::HostStopsSending => connection.host_stops_sending(),
                Step::HostStopsReceiving => {
                    waiting = 0;
                    connection.host_stops_receiving();
                }
            }
            prop_assert!(waiting <= WINDOW);
            prop_assert_eq!((connection.received - connection.forwarded).0, waiting);
        }
    }
}
