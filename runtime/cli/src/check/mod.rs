//! `podvisor check`: whether this machine can run pods, and whether anything was left behind.
//!
//! - [`host`]: the kernel and the rights.
//! - [`parts`]: the programs and files podvisor needs, and podvisord itself.
//! - [`leaks`]: `podvisor check --leaks`.
//!
//! What can be tried is tried, with the code that pods use; nothing is concluded from versions
//! where a trial is possible.

mod host;
mod leaks;
mod parts;

use std::process::ExitCode;

use serde::Serialize;

use crate::text::{self, Colour, paint};
use crate::{Context, Output};

/// Options of `podvisor check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Instead, list what podvisor has on this machine for no sandbox, one line each: nothing, and
    /// exit code 0, when all is well. Pods and pulls that are under way show
    #[arg(long)]
    leaks: bool,
}

/// What was found of one prerequisite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// The prerequisite.
    name: &'static str,
    /// How it stands.
    state: State,
    /// What is there.
    found: String,
    /// What podvisor uses it for.
    why: &'static str,
    /// What to do about it, if it is not as it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// How a prerequisite stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// There.
    Ok,
    /// Pods run without it, but not as well, or nothing is known of it yet.
    Note,
    /// Pods do not run without it.
    Missing,
}

impl Finding {
    fn ok(name: &'static str, why: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            why,
            remedy: None,
        }
    }

    fn note(
        name: &'static str,
        why: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            state: State::Note,
            remedy: Some(remedy.into()),
            ..Self::ok(name, why, found)
        }
    }

    fn missing(
        name: &'static str,
        why: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            state: State::Missing,
            remedy: Some(remedy.into()),
            ..Self::ok(name, why, found)
        }
    }
}

/// Reports; the exit code is 1 when something that is needed is missing, or something has leaked.
pub async fn check(context: &Context, args: CheckArgs) -> anyhow::Result<ExitCode> {
    if args.leaks {
        return leaks::leaks(context).await;
    }
    let mut findings = host::check(context).await;
    findings.extend(parts::check(context).await);
    match context.output {
        Output::Text => {
            let colour = text::colours(&std::io::stdout());
            print!("{}", render(&findings, colour));
        }
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
    }
    let missing = findings
        .iter()
        .any(|finding| finding.state == State::Missing);
    Ok(ExitCode::from(u8::from(missing)))
}

fn render(findings: &[Finding], colour: bool) -> String {
    let width = findings
        .iter()
        .map(|finding| finding.name.len())
        .max()
        .unwrap_or(0);
    let indent = " ".repeat(8 + width + 2);
    let mut lines = Vec::new();
    for finding in findings {
        let (mark, mark_colour) = match finding.state {
            State::Ok => ("ok     ", Colour::Green),
            State::Note => ("note   ", Colour::Yellow),
            State::Missing => ("MISSING", Colour::Red),
        };
        let mark = paint(mark, mark_colour, colour);
        let why = format!("for {}", finding.why);
        lines.push(format!("{mark} {:width$}  {}", finding.name, finding.found));
        lines.push(format!("{indent}{}", paint(&why, Colour::Dim, colour)));
        if let Some(remedy) = &finding.remedy {
            lines.push(format!("{indent}→ {remedy}"));
        }
    }
    let missing: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.state == State::Missing)
        .map(|finding| finding.name)
        .collect();
    lines.push(if missing.is_empty() {
        "pods can run here".to_owned()
    } else {
        format!("pods cannot run here: {}", missing.join(", "))
    });
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings() -> Vec<Finding> {
        vec![
            Finding::ok("root", "everything", "uid 0"),
            Finding::note("kvm", "speed", "no /dev/kvm", "load kvm"),
            Finding::missing("qemu", "the VMs", "not found", "install it"),
        ]
    }

    #[test]
    fn a_report_names_what_is_missing_and_what_to_do() {
        let text = render(&findings(), false);
        assert!(!text.contains('\x1b'));
        assert!(text.contains("MISSING qemu  not found\n"), "{text}");
        assert!(text.contains("→ install it\n"), "{text}");
        assert!(text.ends_with("pods cannot run here: qemu\n"), "{text}");
        assert!(render(&findings()[..2], true).ends_with("pods can run here\n"));
        assert!(render(&findings()[..1], true).contains("\x1b[32m"));
    }

    #[test]
    fn json_has_a_remedy_only_where_there_is_one() {
        let json = serde_json::to_value(findings()).unwrap();
        assert_eq!(json[2]["state"], "missing");
        assert_eq!(json[2]["remedy"], "install it");
        assert!(json[0].get("remedy").is_none());
    }
}
