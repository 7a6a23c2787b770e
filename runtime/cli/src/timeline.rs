//! How long each phase of a pod's start took.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::text::Table;

/// Columns of the bars.
const BAR: f64 = 40.0;

/// A phase; milliseconds since podvisord got the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name.
    #[serde(rename = "phase")]
    pub name: String,
    /// When it began.
    pub start_ms: f64,
    /// When it ended.
    pub end_ms: f64,
}

impl Phase {
    /// How long it took.
    pub fn duration_ms(&self) -> f64 {
        self.end_ms - self.start_ms
    }
}

/// The timeline in the verbose answer of `PodSandboxStatus`; empty when there is none.
pub fn from_info(info: &HashMap<String, String>) -> Vec<Phase> {
    info.get("timeline")
        .and_then(|json| serde_json::from_str(json).ok())
        .unwrap_or_default()
}

/// From the VMM's start to the agent's call, in milliseconds: the monitor's phases "vm start" to
/// "agent".
pub fn boot_ms(phases: &[Phase]) -> Option<f64> {
    let find = |name| phases.iter().find(|phase| phase.name == name);
    Some(find("agent")?.end_ms - find("vm start")?.start_ms)
}

/// The phases as a table with a bar for each, to the same scale.
pub fn render(phases: &[Phase]) -> String {
    let end = phases.iter().map(|phase| phase.end_ms).fold(0.0, f64::max);
    let mut table = Table::new(&["PHASE", ">START MS", ">MS", ""]);
    for phase in phases {
        table.row([
            phase.name.clone(),
            format!("{:.1}", phase.start_ms),
            format!("{:.1}", phase.duration_ms()),
            bar(phase, end),
        ]);
    }
    table.render()
}

fn bar(phase: &Phase, end: f64) -> String {
    if end <= 0.0 {
        return String::new();
    }
    let column = |ms: f64| (ms.clamp(0.0, end) / end * BAR).round() as usize;
    let (from, to) = (column(phase.start_ms), column(phase.end_ms));
    // A phase too short for a column is still somewhere.
    let mark = if to > from {
        "█".repeat(to - from)
    } else {
        "▏".to_owned()
    };
    format!("{}{mark}", " ".repeat(from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_drawn_to_one_scale() {
        let info = HashMap::from([(
            "timeline".to_owned(),
            r#"[{"phase":"network","start_ms":0.0,"end_ms":100.0},
                {"phase":"boot","start_ms":100.0,"end_ms":400.0},
                {"phase":"ready","start_ms":400.0,"end_ms":400.2}]"#
                .to_owned(),
        )]);
        let text = render(&from_info(&info));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[1].matches('█').count(), 10);
        assert_eq!(lines[2].matches('█').count(), 30);
        assert!(lines[2].contains("300.0"), "{text}");
        assert!(lines[3].ends_with('▏'), "{text}");
    }

    #[test]
    fn the_boot_is_from_the_vmm_to_the_agent() {
        let phase = |name: &str, start_ms, end_ms| Phase {
            name: name.into(),
            start_ms,
            end_ms,
        };
        let mut phases = vec![
            phase("vm start", 50.0, 150.0),
            phase("guest kernel", 150.0, 500.0),
            phase("agent", 500.0, 540.0),
        ];
        assert_eq!(boot_ms(&phases), Some(490.0));
        phases.pop();
        assert_eq!(boot_ms(&phases), None);
    }

    #[test]
    fn a_missing_or_broken_timeline_is_empty() {
        assert!(from_info(&HashMap::new()).is_empty());
        assert!(from_info(&HashMap::from([("timeline".to_owned(), "{".to_owned())])).is_empty());
        assert_eq!(render(&[]).lines().count(), 1);
    }
}
