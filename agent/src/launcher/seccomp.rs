//! System call filters, from the spec's `linux.seccomp` by libseccomp.

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::process::Failure;

/// Filters the calling process's system calls from now on. It needs CAP_SYS_ADMIN or no_new_privs.
pub fn load(spec: &LinuxSeccomp) -> Result<(), Failure> {
    try_load(spec).map_err(|error| Failure::other("loading the seccomp filter", &error))
}

/// Why a filter cannot be loaded.
#[derive(Debug, thiserror::Error)]
enum FilterError {
    /// It needs somebody who answers, which no pod has.
    #[error("SCMP_ACT_NOTIFY is not supported")]
    Notify,
    /// libseccomp or the kernel refused.
    #[error(transparent)]
    Refused(#[from] SeccompError),
}

fn try_load(spec: &LinuxSeccomp) -> Result<(), FilterError> {
    let default = action(spec.default_action(), spec.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default)?;
    // Whether privileges can grow is the spec's own matter.
    filter.set_ctl_nnp(false)?;
    for flag in spec.flags().iter().flatten() {
        match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => filter.set_ctl_log(true)?,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => filter.set_ctl_tsync(true)?,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => filter.set_ctl_ssb(true)?,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                filter.set_ctl_waitkill(true)?
            }
        };
    }
    for architecture in spec.architectures().iter().flatten() {
        filter.add_arch(match architecture {
            Arch::ScmpArchNative => ScmpArch::Native,
            Arch::ScmpArchX86_64 => ScmpArch::X8664,
            Arch::ScmpArchX86 => ScmpArch::X86,
            Arch::ScmpArchX32 => ScmpArch::X32,
            // No program of another one runs here.
            _ => continue,
        })?;
    }
    for rule in spec.syscalls().iter().flatten() {
        add(&mut filter, rule, default)?;
    }
    Ok(filter.load()?)
}

fn add(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), FilterError> {
    let action = action(rule.action(), rule.errno_ret())?;
    // libseccomp refuses rules that say nothing new.
    if action == default {
        return Ok(());
    }
    let arguments: Vec<ScmpArgCompare> = rule.args().iter().flatten().map(comparison).collect();
    let mut indexes: Vec<usize> = rule
        .args()
        .iter()
        .flatten()
        .map(LinuxSeccompArg::index)
        .collect();
    indexes.sort_unstable();
    let repeated = indexes.windows(2).any(|pair| pair[0] == pair[1]);
    for name in rule.names() {
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

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, FilterError> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno as i32),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno as u16),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => return Err(FilterError::Notify),
    })
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let (index, value) = (argument.index() as u32, argument.value());
    let compare = |operator| ScmpArgCompare::new(index, operator, value);
    match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => compare(ScmpCompareOp::NotEqual),
        LinuxSeccompOperator::ScmpCmpLt => compare(ScmpCompareOp::Less),
        LinuxSeccompOperator::ScmpCmpLe => compare(ScmpCompareOp::LessOrEqual),
        LinuxSeccompOperator::ScmpCmpEq => compare(ScmpCompareOp::Equal),
        LinuxSeccompOperator::ScmpCmpGe => compare(ScmpCompareOp::GreaterEqual),
        LinuxSeccompOperator::ScmpCmpGt => compare(ScmpCompareOp::Greater),
        // The first value is the mask (seccomp_rule_add(3), runtime-spec: valueTwo).
        LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpArgCompare::new(
            index,
            ScmpCompareOp::MaskedEqual(value),
            argument.value_two().unwrap_or(0),
        ),
    }
}
