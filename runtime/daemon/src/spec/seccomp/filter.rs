//! A profile as the kernel takes it: compiled by libseccomp here, once per content, and only installed in the guest.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::sync::{LazyLock, Mutex, PoisonError};

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use podvisor_proto::agent::SeccompFilter;

/// What the kernel takes (linux/bpf_common.h, `BPF_MAXINSNS`).
const LIMIT: usize = 4096;
/// Bytes of an instruction, `struct sock_filter`.
const INSTRUCTION: usize = 8;
/// linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Numbers of x32's system calls begin here (asm/unistd.h, `__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;
/// Offsets in linux/seccomp.h, `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// Filters that are kept: a node's pods have a few profiles, and the default by sets of capabilities.
const KEPT: usize = 64;

/// By the profile's text.
static COMPILED: LazyLock<Mutex<HashMap<Vec<u8>, SeccompFilter>>> = LazyLock::new(Mutex::default);

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The profile contradicts itself.
    #[error("the seccomp profile cannot be compiled: {0}")]
    Compile(#[from] SeccompError),
    /// See [`LIMIT`].
    #[error("the seccomp profile has {0} instructions, more than {LIMIT}")]
    TooLarge(usize),
    /// Memory, or a descriptor, for it.
    #[error("the seccomp profile cannot be compiled: {0}")]
    Io(#[from] io::Error),
}

/// The filter of a profile, from before if there is one. Blocks: tens of milliseconds for a long profile.
///
/// # Errors
/// See [`FilterError`].
pub fn compile(profile: &LinuxSeccomp) -> Result<SeccompFilter, FilterError> {
    let text = serde_json::to_vec(profile).map_err(io::Error::from)?;
    let compiled = || COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(filter) = compiled().get(&text) {
        return Ok(filter.clone());
    }
    let filter = SeccompFilter {
        program: program(profile)?,
        flags: flags(profile.flags().iter().flatten()),
    };
    let mut compiled = compiled();
    if compiled.len() >= KEPT {
        compiled.clear();
    }
    compiled.insert(text, filter.clone());
    Ok(filter)
}

/// Flags that matter to a process with one thread and to filters that notify nobody.
fn flags<'a>(flags: impl Iterator<Item = &'a LinuxSeccompFilterFlag>) -> u32 {
    flags.fold(0, |all, flag| {
        all | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG as u32,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32
            }
            _ => 0,
        }
    })
}

fn program(profile: &LinuxSeccomp) -> Result<Vec<u8>, FilterError> {
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut filter = ScmpFilterContext::new(default)?;
    for architecture in architectures(profile) {
        filter.add_arch(architecture)?;
    }
    for rule in profile.syscalls().iter().flatten() {
        add(&mut filter, rule, default)?;
    }
    let mut file =
        File::from(memfd_create(c"filter", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    filter.export_bpf(&file)?;
    let start = unknown_calls_do_not_exist(profile);
    let mut program: Vec<u8> = start.into_iter().flat_map(encode).collect();
    file.rewind()?;
    file.read_to_end(&mut program)?;
    match program.len() / INSTRUCTION {
        instructions if instructions > LIMIT => Err(FilterError::TooLarge(instructions)),
        _ => Ok(program),
    }
}

/// Architectures besides the native one that a program in a guest can be of.
fn architectures(profile: &LinuxSeccomp) -> Vec<ScmpArch> {
    let known = |architecture: &Arch| match architecture {
        Arch::ScmpArchX86_64 => Some(ScmpArch::X8664),
        Arch::ScmpArchX86 => Some(ScmpArch::X86),
        Arch::ScmpArchX32 => Some(ScmpArch::X32),
        _ => None,
    };
    let named = profile.architectures().iter().flatten();
    named.filter_map(known).collect()
}

/// The beginning of a filter that refuses what it does not name: a system call that is newer than all
/// that the profile names returns ENOSYS, as on a kernel that does not have it, so that a libc falls back
/// to an older one. The profile's own error would read as "forbidden". runc does so, too.
fn unknown_calls_do_not_exist(profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    if matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace
    ) {
        return Vec::new();
    }
    let last = |architecture| {
        let rules = profile.syscalls().iter().flatten();
        rules
            .flat_map(LinuxSyscall::names)
            .filter_map(|name| ScmpSyscall::from_name_by_arch(name, architecture).ok())
            // Calls that the architecture does not have are negative.
            .filter_map(|call| u32::try_from(i32::from(call)).ok())
            .max()
    };
    let mut program = vec![load(ARCHITECTURE)];
    if let Some(last) = last(ScmpArch::X8664) {
        program.extend([
            jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 0, 4),
            load(NUMBER),
            jump(libc::BPF_JGE, X32, 2, 0),
            jump(libc::BPF_JGT, last, 0, 1),
            not_there(),
            load(ARCHITECTURE),
        ]);
    }
    if architectures(profile).contains(&ScmpArch::X86)
        && let Some(last) = last(ScmpArch::X86)
    {
        program.extend([
            jump(libc::BPF_JEQ, AUDIT_ARCH_I386, 0, 3),
            load(NUMBER),
            jump(libc::BPF_JGT, last, 0, 1),
            not_there(),
        ]);
    }
    program
}

fn load(offset: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn not_there() -> libc::sock_filter {
    let errno = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    statement(libc::BPF_RET | libc::BPF_K, errno)
}

fn statement(code: libc::c_uint, operand: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: operand,
    }
}

/// Skips so many instructions if the comparison with `operand` is true, or false.
fn jump(
    comparison: libc::c_uint,
    operand: u32,
    when_true: u8,
    when_false: u8,
) -> libc::sock_filter {
    libc::sock_filter {
        jt: when_true,
        jf: when_false,
        ..statement(libc::BPF_JMP | comparison | libc::BPF_K, operand)
    }
}

fn encode(instruction: libc::sock_filter) -> [u8; INSTRUCTION] {
    let [code0, code1] = instruction.code.to_ne_bytes();
    let [k0, k1, k2, k3] = instruction.k.to_ne_bytes();
    [code0, code1, instruction.jt, instruction.jf, k0, k1, k2, k3]
}

fn add(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), SeccompError> {
    let action = action(rule.action(), rule.errno_ret());
    // libseccomp refuses rules that say nothing new.
    if action == default {
        return Ok(());
    }
    let comparisons = || rule.args().iter().flatten();
    let arguments: Vec<ScmpArgCompare> = comparisons().map(comparison).collect();
    let mut indexes: Vec<usize> = comparisons().map(LinuxSeccompArg::index).collect();
    indexes.sort_unstable();
    let repeated = indexes.windows(2).any(|pair| pair[0] == pair[1]);
    for name in rule.names() {
        // A name that is not known here is that of a call that no program in a guest can make.
        let Ok(call) = ScmpSyscall::from_name(name) else {
            continue;
        };
        if repeated {
            // One rule compares an argument once. As runc does, each comparison is a rule then.
            for argument in arguments.chunks(1) {
                filter.add_rule_conditional(action, call, argument)?;
            }
        } else {
            filter.add_rule_conditional(action, call, &arguments)?;
        }
    }
    Ok(())
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno as i32),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno as u16),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        // Refused before (`Profile::check`).
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
    }
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let index = argument.index() as u32;
    let compare = |operator| ScmpArgCompare::new(index, operator, argument.value());
    match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => compare(ScmpCompareOp::NotEqual),
        LinuxSeccompOperator::ScmpCmpLt => compare(ScmpCompareOp::Less),
        LinuxSeccompOperator::ScmpCmpLe => compare(ScmpCompareOp::LessOrEqual),
        LinuxSeccompOperator::ScmpCmpEq => compare(ScmpCompareOp::Equal),
        LinuxSeccompOperator::ScmpCmpGe => compare(ScmpCompareOp::GreaterEqual),
        LinuxSeccompOperator::ScmpCmpGt => compare(ScmpCompareOp::Greater),
        // The first value is the mask (seccomp_rule_add(3)).
        LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpArgCompare::new(
            index,
            ScmpCompareOp::MaskedEqual(argument.value()),
            argument.value_two().unwrap_or_default(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use serde_json::{Value, json};

    fn compiled(profile: &Value) -> SeccompFilter {
        let profile: LinuxSeccomp = serde_json::from_value(profile.clone()).unwrap();
        compile(&profile).unwrap()
    }

    /// Installs a filter in a thread of its own, which it is the end of, and makes a call with its numbers.
    fn errno_of(profile: &Value, call: libc::c_long, arguments: [libc::c_long; 2]) -> i32 {
        let filter = compiled(profile);
        std::thread::spawn(move || {
            let mut instructions: Vec<u64> = Vec::new();
            let (chunks, rest) = filter.program.as_chunks::<INSTRUCTION>();
            assert!(rest.is_empty());
            instructions.extend(chunks.iter().map(|one| u64::from_ne_bytes(*one)));
            let program = libc::sock_fprog {
                len: instructions.len() as libc::c_ushort,
                filter: instructions.as_mut_ptr().cast(),
            };
            nix::sys::prctl::set_no_new_privs().unwrap();
            // SAFETY: the kernel reads as many instructions as `len` says; the calls of these tests take numbers and
            // null pointers.
            unsafe {
                let mode = libc::SECCOMP_SET_MODE_FILTER;
                let installed =
                    libc::syscall(libc::SYS_seccomp, mode, filter.flags, &raw const program);
                assert_eq!(installed, 0, "{}", Errno::last());
                match libc::syscall(call, arguments[0], arguments[1]) {
                    -1 => Errno::last_raw(),
                    _ => 0,
                }
            }
        })
        .join()
        .unwrap()
    }

    #[test]
    fn what_is_not_named_is_refused_and_what_is_newer_does_not_exist() {
        let profile = json!({ "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5 }] });
        assert_eq!(errno_of(&profile, libc::SYS_getpriority, [0, 0]), 5);
        assert_eq!(errno_of(&profile, 9999, [0, 0]), libc::ENOSYS);
        // All that a thread needs to end, and no more.
        let strict = json!({ "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"],
            "syscalls": [{ "names": ["exit", "exit_group", "futex", "futex_waitv", "madvise", "munmap", "mmap",
                "mprotect", "brk", "rt_sigprocmask", "sigaltstack", "write", "no_such_call"],
                "action": "SCMP_ACT_ALLOW" }] });
        let call = |number| errno_of(&strict, number, [0, 0]);
        assert_eq!(call(libc::SYS_getpriority), libc::EPERM);
        assert_eq!(call(9999), libc::ENOSYS);
        assert_eq!(call(libc::SYS_futex_waitv + 1), libc::ENOSYS);
    }

    #[test]
    fn arguments_are_compared() {
        let masked =
            json!({ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 0xf0, "valueTwo": 0x10 });
        let twice = [0, 3].map(|value| json!({ "index": 0, "op": "SCMP_CMP_EQ", "value": value }));
        let errno = |arguments: Value, number| {
            let rule =
                json!({ "names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "args": arguments });
            let profile = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] });
            errno_of(&profile, libc::SYS_getpriority, [number, 0])
        };
        assert_eq!(errno(json!([masked]), 0x1f), libc::EPERM);
        assert_eq!(errno(json!([masked]), 0x2f), libc::EINVAL);
        assert_eq!(errno(json!(twice), 0), libc::EPERM);
        assert_eq!(errno(json!(twice), 3), libc::EPERM);
        assert_eq!(errno(json!(twice), 1), 0);
    }

    #[test]
    fn actions_and_flags_are_the_kernels() {
        let returned = |action: &str| {
            let profile = json!({ "defaultAction": action, "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"] });
            let filter = compiled(&profile);
            assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_LOG as u32);
            // Every path ends in a return; the first is that of what no rule is about.
            let (instructions, _) = filter.program.as_chunks::<INSTRUCTION>();
            let mut values = instructions.iter().filter_map(|one| {
                let [code0, code1, _, _, k @ ..] = *one;
                let is_return =
                    u16::from_ne_bytes([code0, code1]) == (libc::BPF_RET | libc::BPF_K) as u16;
                is_return.then(|| u32::from_ne_bytes(k))
            });
            values.next().unwrap()
        };
        for (action, value) in [
            ("SCMP_ACT_ALLOW", libc::SECCOMP_RET_ALLOW),
            ("SCMP_ACT_LOG", libc::SECCOMP_RET_LOG),
            ("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE | 1),
            ("SCMP_ACT_TRAP", libc::SECCOMP_RET_TRAP),
            ("SCMP_ACT_ERRNO", libc::SECCOMP_RET_ERRNO | 1),
            ("SCMP_ACT_KILL", libc::SECCOMP_RET_KILL_THREAD),
            ("SCMP_ACT_KILL_PROCESS", libc::SECCOMP_RET_KILL_PROCESS),
        ] {
            assert_eq!(returned(action), value, "{action}");
        }
    }

    #[test]
    fn what_no_kernel_takes_is_refused() {
        // A comparison for each of many values: more instructions than a filter may have.
        let rule = |value: u32| {
            json!({ "names": ["getpriority"], "action": "SCMP_ACT_ERRNO",
                "args": [{ "index": 0, "op": "SCMP_CMP_EQ", "value": value }] })
        };
        let rules: Vec<Value> = (0..LIMIT as u32).map(rule).collect();
        let profile = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules });
        let profile: LinuxSeccomp = serde_json::from_value(profile).unwrap();
        let refused = compile(&profile).err();
        assert!(
            matches!(refused, Some(FilterError::TooLarge(_))),
            "{refused:?}"
        );
    }
}
