//! System call filters: the spec's `linux.seccomp`, compiled by libseccomp once, when the container is
//! created, and loaded as it is by each of its processes.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::PathBuf;

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::oci::{Action, Argument, FilterFlag, Operator, Seccomp, SyscallRule};

/// What the kernel takes (linux/bpf_common.h, `BPF_MAXINSNS`).
const LIMIT: usize = 4096;
/// linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Numbers of x32's system calls begin here (asm/unistd.h, `__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;
/// Offsets in linux/seccomp.h, `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompFilterError {
    /// The profile contradicts itself.
    #[error("the seccomp profile cannot be compiled: {0}")]
    Compile(#[from] SeccompError),
    /// See [`LIMIT`].
    #[error("the seccomp profile has {0} instructions, more than {LIMIT}")]
    TooLarge(usize),
    /// Somewhere to keep it.
    #[error("the seccomp filter cannot be written: {0}")]
    Write(#[from] io::Error),
}

/// A filter in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredFilter {
    path: PathBuf,
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u32,
}

/// A filter as seccomp(2) takes it.
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: u32,
}

impl StoredFilter {
    /// Compiles a profile into the file `path`.
    pub fn compile(profile: &Seccomp, path: PathBuf) -> Result<Self, SeccompFilterError> {
        let program = program(profile)?;
        let bytes: Vec<u8> = program.into_iter().flat_map(encode).collect();
        fs::write(&path, bytes)?;
        Ok(Self {
            path,
            flags: flags(&profile.flags),
        })
    }

    /// Reads it back.
    pub fn read(&self) -> io::Result<Filter> {
        let program = decode(&fs::read(&self.path)?);
        let flags = self.flags;
        Ok(Filter { program, flags })
    }
}

impl Filter {
    /// Filters the calling process's system calls from now on. It needs CAP_SYS_ADMIN or no_new_privs.
    pub fn load(&self) -> nix::Result<()> {
        let program = libc::sock_fprog {
            // At most `LIMIT`.
            len: self.program.len() as libc::c_ushort,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads as many instructions as `len` says, and writes none.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        Errno::result(result).map(drop)
    }
}

/// Flags that matter to a process with one thread and to filters that notify nobody.
fn flags(flags: &[FilterFlag]) -> u32 {
    flags.iter().fold(0, |all, flag| {
        all | match flag {
            FilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG as u32,
            FilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32,
            FilterFlag::SeccompFilterFlagTsync | FilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        }
    })
}

fn program(profile: &Seccomp) -> Result<Vec<libc::sock_filter>, SeccompFilterError> {
    let default = action(profile.default_action, profile.default_errno_ret);
    let mut filter = ScmpFilterContext::new(default)?;
    for architecture in architectures(profile) {
        filter.add_arch(architecture)?;
    }
    for rule in &profile.syscalls {
        add(&mut filter, rule, default)?;
    }
    let mut file =
        File::from(memfd_create(c"filter", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    filter.export_bpf(&file)?;
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    let mut program = unknown_calls_do_not_exist(profile);
    program.extend(decode(&bytes));
    if program.len() > LIMIT {
        return Err(SeccompFilterError::TooLarge(program.len()));
    }
    Ok(program)
}

/// Architectures besides the native one that a program here can be of.
fn architectures(profile: &Seccomp) -> Vec<ScmpArch> {
    let known = |name: &String| match name.as_str() {
        "SCMP_ARCH_X86_64" => Some(ScmpArch::X8664),
        "SCMP_ARCH_X86" => Some(ScmpArch::X86),
        "SCMP_ARCH_X32" => Some(ScmpArch::X32),
        _ => None,
    };
    profile.architectures.iter().filter_map(known).collect()
}

/// The beginning of a filter that refuses what it does not name: a system call that is newer than all
/// that the profile names returns ENOSYS, as on a kernel that does not have it, so that a libc falls back
/// to an older one. The profile's own error would read as "forbidden". runc does so, too.
fn unknown_calls_do_not_exist(profile: &Seccomp) -> Vec<libc::sock_filter> {
    if matches!(
        profile.default_action,
        Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace
    ) {
        return Vec::new();
    }
    let last = |architecture| {
        let names = profile.syscalls.iter().flat_map(|rule| &rule.names);
        names
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

fn encode(instruction: libc::sock_filter) -> [u8; 8] {
    let [code0, code1] = instruction.code.to_ne_bytes();
    let [k0, k1, k2, k3] = instruction.k.to_ne_bytes();
    [code0, code1, instruction.jt, instruction.jf, k0, k1, k2, k3]
}

fn decode(bytes: &[u8]) -> Vec<libc::sock_filter> {
    let (instructions, _) = bytes.as_chunks();
    let decode = |&[code0, code1, jt, jf, k0, k1, k2, k3]: &[u8; 8]| libc::sock_filter {
        code: u16::from_ne_bytes([code0, code1]),
        jt,
        jf,
        k: u32::from_ne_bytes([k0, k1, k2, k3]),
    };
    instructions.iter().map(decode).collect()
}

fn add(
    filter: &mut ScmpFilterContext,
    rule: &SyscallRule,
    default: ScmpAction,
) -> Result<(), SeccompError> {
    let action = action(rule.action, rule.errno_ret);
    // libseccomp refuses rules that say nothing new.
    if action == default {
        return Ok(());
    }
    let arguments: Vec<ScmpArgCompare> = rule.args.iter().map(comparison).collect();
    let mut indexes: Vec<u32> = rule.args.iter().map(|argument| argument.index).collect();
    indexes.sort_unstable();
    let repeated = indexes.windows(2).any(|pair| pair[0] == pair[1]);
    for name in &rule.names {
        // A name that is not known here is that of a call that no program here can make.
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

fn action(action: Action, errno: Option<u32>) -> ScmpAction {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActErrno => ScmpAction::Errno(errno as i32),
        Action::ScmpActTrace => ScmpAction::Trace(errno as u16),
        Action::ScmpActAllow => ScmpAction::Allow,
        Action::ScmpActLog => ScmpAction::Log,
    }
}

fn comparison(argument: &Argument) -> ScmpArgCompare {
    let compare = |operator| ScmpArgCompare::new(argument.index, operator, argument.value);
    match argument.op {
        Operator::ScmpCmpNe => compare(ScmpCompareOp::NotEqual),
        Operator::ScmpCmpLt => compare(ScmpCompareOp::Less),
        Operator::ScmpCmpLe => compare(ScmpCompareOp::LessOrEqual),
        Operator::ScmpCmpEq => compare(ScmpCompareOp::Equal),
        Operator::ScmpCmpGe => compare(ScmpCompareOp::GreaterEqual),
        Operator::ScmpCmpGt => compare(ScmpCompareOp::Greater),
        // The first value is the mask (seccomp_rule_add(3)).
        Operator::ScmpCmpMaskedEq => ScmpArgCompare::new(
            argument.index,
            ScmpCompareOp::MaskedEqual(argument.value),
            argument.value_two,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn compiled(profile: Value) -> Filter {
        let profile: Seccomp = serde_json::from_value(profile).unwrap();
        let path = std::env::temp_dir().join(format!(
            "podvisor-filter-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let stored = StoredFilter::compile(&profile, path).unwrap();
        let filter = stored.read().unwrap();
        fs::remove_file(&stored.path).unwrap();
        filter
    }

    /// Loads a filter in a thread of its own, which it is the end of, and makes a call with its numbers.
    fn errno_of(filter: Filter, call: libc::c_long, arguments: [libc::c_long; 2]) -> i32 {
        std::thread::spawn(move || {
            nix::sys::prctl::set_no_new_privs().unwrap();
            filter.load().unwrap();
            // SAFETY: the calls of these tests take numbers and null pointers.
            let result = unsafe { libc::syscall(call, arguments[0], arguments[1]) };
            if result == -1 { Errno::last_raw() } else { 0 }
        })
        .join()
        .unwrap()
    }

    #[test]
    fn what_is_not_named_is_refused_and_what_is_newer_does_not_exist() {
        let profile = || {
            json!({ "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5 }] })
        };
        assert_eq!(
            errno_of(compiled(profile()), libc::SYS_getpriority, [0, 0]),
            5
        );
        assert_eq!(errno_of(compiled(profile()), 9999, [0, 0]), libc::ENOSYS);
        // All that a thread needs to end, and no more.
        let strict = || {
            json!({ "defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"],
                "syscalls": [{ "names": ["exit", "exit_group", "futex", "futex_waitv", "madvise", "munmap", "mmap",
                    "mprotect", "brk", "rt_sigprocmask", "sigaltstack", "write", "no_such_call"],
                    "action": "SCMP_ACT_ALLOW" }] })
        };
        let call = |number| errno_of(compiled(strict()), number, [0, 0]);
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
            errno_of(compiled(profile), libc::SYS_getpriority, [number, 0])
        };
        assert_eq!(errno(json!([masked]), 0x1f), libc::EPERM);
        assert_eq!(errno(json!([masked]), 0x2f), libc::EINVAL);
        assert_eq!(errno(json!(twice), 0), libc::EPERM);
        assert_eq!(errno(json!(twice), 3), libc::EPERM);
        assert_eq!(errno(json!(twice), 1), 0);
    }
}
