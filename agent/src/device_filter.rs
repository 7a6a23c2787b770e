//! Which devices a container may open or make nodes of: the spec's `linux.resources.devices` as a program
//! on its control group (BPF_PROG_TYPE_CGROUP_DEVICE, linux/bpf.h). Without it a container's root could
//! make a node of the pod's disk and read what other containers have there.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::cgroup::Cgroup;
use crate::oci::{DeviceKind, DeviceRule};

/// Most rules: far below what the kernel takes as one program.
const RULE_LIMIT: usize = 1024;

/// How often a program is given to the verifier again.
const LOAD_RETRIES: usize = 10;

/// `BPF_DEVCG_ACC_*`.
const MAKE_NODE: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MAKE_NODE | READ | WRITE;
/// `BPF_DEVCG_DEV_*`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFilterError {
    /// See [`RULE_LIMIT`].
    #[error("the spec has more than {RULE_LIMIT} device rules")]
    TooMany,
    /// Not a letter of "rwm".
    #[error("{0:?} is no access to a device")]
    Access(String),
    /// Not a device number.
    #[error("{0} is no device number")]
    Number(i64),
}

/// One rule. What is none matches everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u8,
}

/// What every container may do, whatever its spec says, as in runc: nodes may be made of anything, and
/// the devices of the spec's "Default Devices" used.
const ALWAYS: [Rule; 10] = {
    const fn device(major: i32, minor: Option<i32>) -> Rule {
        Rule {
            allow: true,
            kind: Some(CHARACTER),
            major: Some(major),
            minor,
            access: ALL,
        }
    }
    const fn nodes(kind: i32) -> Rule {
        Rule {
            allow: true,
            kind: Some(kind),
            major: None,
            minor: None,
            access: MAKE_NODE,
        }
    }
    [
        nodes(CHARACTER),
        nodes(BLOCK),
        // null, zero, full, random, urandom
        device(1, Some(3)),
        device(1, Some(5)),
        device(1, Some(7)),
        device(1, Some(8)),
        device(1, Some(9)),
        // tty, ptmx, and the terminals of devpts
        device(5, Some(0)),
        device(5, Some(2)),
        device(136, None),
    ]
};

/// A filter as the kernel takes it.
#[derive(Clone, Debug, Default)]
pub struct DeviceFilter(Vec<Instruction>);

/// linux/bpf.h, `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl DeviceFilter {
    /// Compiles the rules of a spec; without rules everything is allowed.
    pub fn compile(rules: &[DeviceRule]) -> Result<Option<Self>, DeviceFilterError> {
        if rules.is_empty() {
            return Ok(None);
        }
        if rules.len() > RULE_LIMIT {
            return Err(DeviceFilterError::TooMany);
        }
        let mut parsed = rules.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        parsed.extend(ALWAYS);
        Ok(Some(Self(compile(&parsed))))
    }

    /// Puts the filter in force for the processes of `cgroup` and below.
    pub fn attach(&self, cgroup: &Cgroup) -> io::Result<()> {
        let program = self.load()?;
        let cgroup = cgroup.open()?;
        let mut attribute = Attribute::default();
        attribute.words[0] = cgroup.as_raw_fd() as u32;
        attribute.words[1] = program.as_raw_fd() as u32;
        attribute.words[2] = BPF_CGROUP_DEVICE;
        attribute.words[3] = BPF_F_ALLOW_MULTI;
        bpf(BPF_PROG_ATTACH, &attribute).map(drop)
    }

    fn load(&self) -> io::Result<OwnedFd> {
        let license = c"Apache-2.0";
        let mut attribute = Attribute::default();
        attribute.words[0] = BPF_PROG_TYPE_CGROUP_DEVICE;
        attribute.words[1] = self.0.len() as u32;
        attribute.set_pointer(2, self.0.as_ptr() as u64);
        attribute.set_pointer(4, license.as_ptr() as u64);
        // The verifier gives up when a signal is pending, as they are when processes end. Once more is enough,
        // unless the next one has ended, too.
        let load = || bpf(BPF_PROG_LOAD, &attribute);
        let mut loaded = load();
        for _ in 0..LOAD_RETRIES {
            if !matches!(&loaded, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
                break;
            }
            loaded = load();
        }
        let fd = loaded?;
        // SAFETY: bpf has just returned this descriptor, nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

fn parse(rule: &DeviceRule) -> Result<Rule, DeviceFilterError> {
    let number = |number: Option<i64>| match number {
        // -1 is another way to write "any".
        None | Some(-1) => Ok(None),
        Some(number) => i32::try_from(number)
            .ok()
            .filter(|number| *number >= 0)
            .map(Some)
            .ok_or(DeviceFilterError::Number(number)),
    };
    let letters = rule.access.as_deref().unwrap_or("rwm");
    let mut access = 0;
    for letter in letters.chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MAKE_NODE,
            _ => return Err(DeviceFilterError::Access(letters.to_owned())),
        };
    }
    Ok(Rule {
        allow: rule.allow,
        kind: match rule.kind {
            DeviceKind::Block => Some(BLOCK),
            DeviceKind::Character => Some(CHARACTER),
            DeviceKind::Any => None,
        },
        major: number(rule.major)?,
        minor: number(rule.minor)?,
        access,
    })
}

// Registers: what the program begins with, its result, and the parts of the request.
const CONTEXT: u8 = 1;
const RESULT: u8 = 0;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

const fn instruction(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: source << 4 | target,
        offset,
        immediate,
    }
}

/// The program: the last rule that covers all of the requested access decides; none means no.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // Codes of linux/bpf_common.h and linux/bpf.h: class | size or source | operation.
    const LOAD_WORD: u8 = 0x61;
    const MOVE: u8 = 0xbc;
    const MOVE_IMMEDIATE: u8 = 0xb4;
    const AND_IMMEDIATE: u8 = 0x54;
    const SHIFT_RIGHT_IMMEDIATE: u8 = 0x74;
    const JUMP_UNLESS_EQUAL_IMMEDIATE: u8 = 0x56;
    const EXIT: u8 = 0x95;
    let decide = |allow: bool| {
        [
            instruction(MOVE_IMMEDIATE, RESULT, 0, 0, i32::from(allow)),
            instruction(EXIT, 0, 0, 0, 0),
        ]
    };

    // struct bpf_cgroup_dev_ctx: access << 16 | kind, major, minor.
    let mut program = vec![
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE, ACCESS, KIND, 0, 0),
        instruction(AND_IMMEDIATE, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_IMMEDIATE, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut conditions = Vec::new();
        for (register, value) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(value) = value {
                conditions.push(vec![instruction(
                    JUMP_UNLESS_EQUAL_IMMEDIATE,
                    register,
                    0,
                    0,
                    value,
                )]);
            }
        }
        if rule.access != ALL {
            let others = i32::from(ALL & !rule.access);
            conditions.push(vec![
                instruction(MOVE, SCRATCH, ACCESS, 0, 0),
                instruction(AND_IMMEDIATE, SCRATCH, 0, 0, others),
                instruction(JUMP_UNLESS_EQUAL_IMMEDIATE, SCRATCH, 0, 0, 0),
            ]);
        }
        let unconditional = conditions.is_empty();
        let mut block: Vec<Instruction> = conditions.concat();
        block.extend(decide(rule.allow));
        let length = block.len();
        for (index, instruction) in block.iter_mut().enumerate() {
            if instruction.code == JUMP_UNLESS_EQUAL_IMMEDIATE {
                // Relative to the next instruction. A block has at most eight.
                instruction.offset = (length - index - 1) as i16;
            }
        }
        program.extend(block);
        if unconditional {
            // The kernel refuses instructions that nothing reaches.
            return program;
        }
    }
    program.extend(decide(false));
    program
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// `union bpf_attr`, as far as it is used: everything beyond is zero.
#[repr(C, align(8))]
#[derive(Default)]
struct Attribute {
    words: [u32; 32],
}

impl Attribute {
    /// Sets two words to a pointer.
    fn set_pointer(&mut self, index: usize, pointer: u64) {
        let bytes = pointer.to_ne_bytes();
        let (low, high) = bytes.split_at(4);
        self.words[index] = u32::from_ne_bytes([low[0], low[1], low[2], low[3]]);
        self.words[index + 1] = u32::from_ne_bytes([high[0], high[1], high[2], high[3]]);
    }
}

fn bpf(command: libc::c_int, attribute: &Attribute) -> io::Result<RawFd> {
    // SAFETY: the attribute, and what it points to, live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attribute),
            size_of::<Attribute>(),
        )
    };
    Ok(Errno::result(result)? as RawFd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the program says, by running it.
    fn run(program: &[Instruction], kind: i32, access: u8, major: i32, minor: i32) -> bool {
        let context = [i32::from(access) << 16 | kind, major, minor];
        let mut registers = [0_i32; 16];
        let mut next = 0;
        loop {
            let Instruction {
                code,
                registers: pair,
                offset,
                immediate,
            } = program[next];
            let (target, source) = (usize::from(pair & 15), usize::from(pair >> 4));
            next += 1;
            match code {
                0x61 => registers[target] = context[offset as usize / 4],
                0xbc => registers[target] = registers[source],
                0xb4 => registers[target] = immediate,
                0x54 => registers[target] &= immediate,
                0x74 => registers[target] = (registers[target] as u32 >> immediate) as i32,
                0x56 if registers[target] != immediate => next += offset as usize,
                0x56 => {}
                0x95 => return registers[usize::from(RESULT)] != 0,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let number = || proptest::option::of(0..3_i32);
        let kind = proptest::option::of(BLOCK..=CHARACTER);
        (any::<bool>(), kind, number(), number(), 1..=ALL).prop_map(
            |(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            },
        )
    }

    proptest! {
        #[test]
        fn the_last_rule_that_covers_a_request_decides(
            rules in proptest::collection::vec(rule(), 0..12),
            kind in BLOCK..=CHARACTER, access in 1..=ALL, major in 0..3_i32, minor in 0..3_i32,
        ) {
            let covers = |rule: &&Rule| {
                rule.kind.is_none_or(|wanted| wanted == kind)
                    && rule.major.is_none_or(|wanted| wanted == major)
                    && rule.minor.is_none_or(|wanted| wanted == minor)
                    && access & !rule.access == 0
            };
            let expected = rules.iter().rev().find(covers).is_some_and(|rule| rule.allow);
            prop_assert_eq!(run(&compile(&rules), kind, access, major, minor), expected);
        }
    }

    fn parsed(json: &serde_json::Value) -> Result<Option<DeviceFilter>, DeviceFilterError> {
        let rules: Vec<DeviceRule> = serde_json::from_value(json.clone()).unwrap();
        DeviceFilter::compile(&rules)
    }

    #[test]
    fn a_spec_that_denies_all_leaves_the_default_devices() {
        let deny = serde_json::json!([{ "allow": false, "access": "rwm" }]);
        let DeviceFilter(program) = parsed(&deny).unwrap().unwrap();
        assert!(run(&program, CHARACTER, READ | WRITE, 1, 3));
        assert!(run(&program, BLOCK, MAKE_NODE, 254, 0));
        assert!(!run(&program, BLOCK, READ, 254, 0));
        assert!(!run(&program, CHARACTER, READ, 1, 1));
    }

    #[test]
    fn rules_that_mean_nothing_are_refused() {
        assert!(DeviceFilter::compile(&[]).unwrap().is_none());
        for wrong in [
            serde_json::json!([{ "allow": true, "access": "x" }]),
            serde_json::json!([{ "allow": true, "major": -2 }]),
            serde_json::json!([{ "allow": true, "minor": 1_i64 << 40 }]),
        ] {
            assert!(parsed(&wrong).is_err(), "{wrong}");
        }
    }
}
