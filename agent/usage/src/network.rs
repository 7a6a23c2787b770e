//! Interfaces of a network namespace, from `/proc/PID/net/dev` (proc(5)).

use std::fs;

use podvisor_proto::agent::{InterfaceCounters, InterfaceSample};

/// Interfaces of the network namespace of a process ("self" or a number), without the loopback interface.
pub fn interfaces(process: &str) -> Vec<InterfaceSample> {
    parse(&fs::read_to_string(format!("/proc/{process}/net/dev")).unwrap_or_default())
}

/// Two lines of headings, then "NAME: BYTES PACKETS ERRORS DROPPED …", eight numbers of what was received and eight of
/// what was sent.
fn parse(text: &str) -> Vec<InterfaceSample> {
    let parse = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map_while(|number| number.parse().ok())
            .collect();
        let counters = |first: usize| {
            let [bytes, packets, errors, dropped] = *numbers.get(first..first + 4)? else {
                return None;
            };
            Some(InterfaceCounters {
                bytes,
                packets,
                errors,
                dropped,
            })
        };
        let name = name.trim();
        (name != "lo").then_some(InterfaceSample {
            name: name.to_owned(),
            received: Some(counters(0)?),
            sent: Some(counters(8)?),
        })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_the_kernel_writes() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n  \
            eth0: 1286 15 2 3 0 0 0 0 1026 13 4 5 0 0 0 0\n";
        let interfaces = parse(text);
        assert_eq!(interfaces.len(), 1);
        assert_eq!(interfaces[0].name, "eth0");
        let received = interfaces[0].received.unwrap();
        let sent = interfaces[0].sent.unwrap();
        assert_eq!(
            (
                received.bytes,
                received.packets,
                received.errors,
                received.dropped
            ),
            (1286, 15, 2, 3)
        );
        assert_eq!(
            (sent.bytes, sent.packets, sent.errors, sent.dropped),
            (1026, 13, 4, 5)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _ = parse(&text);
        }
    }
}
