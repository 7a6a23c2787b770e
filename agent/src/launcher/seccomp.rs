//! System call filters, from the spec's `linux.seccomp` by libseccomp.

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};

use super::process::Failure;
use crate::oci::{Action, Argument, FilterFlag, Operator, Seccomp, SyscallRule};

/// Filters the calling process's system calls from now on. It needs CAP_SYS_ADMIN or no_new_privs.
pub fn load(spec: &Seccomp) -> Result<(), Failure> {
    try_load(spec).map_err(|error| Failure::other("loading the seccomp filter", &error))
}

fn try_load(spec: &Seccomp) -> Result<(), SeccompError> {
    let default = action(spec.default_action, spec.default_errno_ret);
    let mut filter = ScmpFilterContext::new(default)?;
    // Whether privileges can grow is the spec's own matter.
    filter.set_ctl_nnp(false)?;
    for flag in &spec.flags {
        match flag {
            FilterFlag::SeccompFilterFlagLog => filter.set_ctl_log(true)?,
            FilterFlag::SeccompFilterFlagTsync => filter.set_ctl_tsync(true)?,
            FilterFlag::SeccompFilterFlagSpecAllow => filter.set_ctl_ssb(true)?,
            FilterFlag::SeccompFilterFlagWaitKillableRecv => filter.set_ctl_waitkill(true)?,
        };
    }
    for architecture in &spec.architectures {
        filter.add_arch(match architecture.as_str() {
            "SCMP_ARCH_X86_64" => ScmpArch::X8664,
            "SCMP_ARCH_X86" => ScmpArch::X86,
            "SCMP_ARCH_X32" => ScmpArch::X32,
            // No program of another one runs here.
            _ => continue,
        })?;
    }
    for rule in &spec.syscalls {
        add(&mut filter, rule, default)?;
    }
    filter.load()
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
