//! Container events (CRI's GetContainerEvents), which kubelets follow instead of listing every second.
//!
//! Events are made where a pod changes, by comparison with what was told of it last: whoever changes a pod need not
//! know what that means to subscribers, and no change is told twice. Each carries the whole pod as it was then.
//! Who subscribes first and lists then misses nothing; who reads slower than events come is cut off, and lists again.

use std::collections::BTreeMap;
use std::sync::Arc;

use podvisor_proto::cri::{self, ContainerEventType as Kind};
use podvisor_proto::monitor;
use tokio::sync::broadcast;

use crate::daemon::now_ns;
use crate::pod::{Container, Pod};

/// Events that a subscriber may be behind. All subscribers share them, and they share what does not change of a
/// pod with it: an event is a few hundred bytes for each container of its pod.
const BACKLOG: usize = 1024;

/// One event.
#[derive(Debug)]
pub struct Event {
    /// Of the container, or of the sandbox.
    pub id: String,
    /// What happened to it.
    pub kind: Kind,
    /// Nanoseconds since the epoch.
    pub created_ns: i64,
    /// Its pod, then.
    pub view: Arc<View>,
}

/// A pod at one moment.
#[derive(Debug)]
pub struct View {
    /// What does not change.
    pub pod: Arc<Pod>,
    /// Of the sandbox.
    pub state: cri::PodSandboxState,
    /// Those that lists show, with their states.
    pub containers: Vec<(Arc<Container>, monitor::Container)>,
}

/// Where events go.
#[derive(Debug)]
pub struct Events {
    subscribers: broadcast::Sender<Arc<Event>>,
}

impl Default for Events {
    fn default() -> Self {
        let (subscribers, _) = broadcast::channel(BACKLOG);
        Self { subscribers }
    }
}

impl Events {
    /// All events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.subscribers.subscribe()
    }

    /// Tells subscribers what is new since `told`. `removed`: lists do not show the pod any more.
    pub fn publish(&self, told: &mut Told, view: View, removed: bool) {
        let now = Seen::of(&view);
        let news = told.news(now, &view.pod.id, removed);
        if news.is_empty() || self.subscribers.receiver_count() == 0 {
            return;
        }
        let view = Arc::new(view);
        for (id, kind) in news {
            // An error: the last subscriber has just gone.
            let _ = self.subscribers.send(Arc::new(Event {
                id,
                kind,
                created_ns: now_ns() as i64,
                view: Arc::clone(&view),
            }));
        }
    }
}

/// What lists show of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Seen {
    ready: bool,
    /// By id.
    containers: BTreeMap<String, Stage>,
}

/// How far a container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Created,
    Running,
    /// Whether it ever ran.
    Exited(bool),
}

impl Seen {
    fn of(view: &View) -> Self {
        let stage = |state: &monitor::Container| match state.state() {
            monitor::ContainerState::Created => Stage::Created,
            monitor::ContainerState::Running => Stage::Running,
            monitor::ContainerState::Exited => Stage::Exited(state.started_ns > 0),
        };
        let containers = view.containers.iter();
        Self {
            ready: view.state == cri::PodSandboxState::SandboxReady,
            containers: containers
                .map(|(container, state)| (container.record.id.clone(), stage(state)))
                .collect(),
        }
    }
}

/// What was told of a pod last. Whoever holds it is the one to publish.
#[derive(Debug, Default)]
pub struct Told {
    last: Option<Seen>,
    /// The pod's end, too: a monitor's late words are no news.
    everything: bool,
}

impl Told {
    /// Events that lead from what was told to `now`: of the sandbox's beginning first, of its end last.
    fn news(&mut self, now: Seen, pod: &str, removed: bool) -> Vec<(String, Kind)> {
        let mut news = Vec::new();
        if self.everything {
            return news;
        }
        let before = self.last.take().unwrap_or_else(|| {
            news.push((pod.to_owned(), Kind::ContainerCreatedEvent));
            news.push((pod.to_owned(), Kind::ContainerStartedEvent));
            Seen {
                ready: true,
                ..Seen::default()
            }
        });
        for id in before.containers.keys() {
            if removed || !now.containers.contains_key(id) {
                news.push((id.clone(), Kind::ContainerDeletedEvent));
            }
        }
        if !removed {
            for (id, stage) in &now.containers {
                for kind in steps(before.containers.get(id).copied(), *stage) {
                    news.push((id.clone(), kind));
                }
            }
        }
        if before.ready && !now.ready {
            news.push((pod.to_owned(), Kind::ContainerStoppedEvent));
        }
        if removed {
            news.push((pod.to_owned(), Kind::ContainerDeletedEvent));
        }
        self.everything = removed;
        self.last = Some(now);
        news
    }
}

/// Events that lead from one stage to a later one; a fast container may pass several at once.
fn steps(before: Option<Stage>, now: Stage) -> Vec<Kind> {
    let mut steps = Vec::new();
    if before.is_none() {
        steps.push(Kind::ContainerCreatedEvent);
    }
    let ran = matches!(now, Stage::Running | Stage::Exited(true));
    if ran && before.is_none_or(|before| before < Stage::Running) {
        steps.push(Kind::ContainerStartedEvent);
    }
    let ended = |stage| matches!(stage, Stage::Exited(_));
    if ended(now) && !before.is_some_and(ended) {
        steps.push(Kind::ContainerStoppedEvent);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREATED: Kind = Kind::ContainerCreatedEvent;
    const STARTED: Kind = Kind::ContainerStartedEvent;
    const STOPPED: Kind = Kind::ContainerStoppedEvent;
    const DELETED: Kind = Kind::ContainerDeletedEvent;

    fn seen(ready: bool, containers: &[(&str, Stage)]) -> Seen {
        let containers = containers.iter();
        Seen {
            ready,
            containers: containers
                .map(|(id, stage)| ((*id).to_owned(), *stage))
                .collect(),
        }
    }

    fn named(news: &[(String, Kind)]) -> Vec<(&str, Kind)> {
        news.iter().map(|(id, kind)| (id.as_str(), *kind)).collect()
    }

    #[test]
    fn the_life_of_a_pod() {
        let mut told = Told::default();
        let mut tell = |now: Seen, removed| told.news(now, "pod", removed);
        let news = tell(seen(true, &[]), false);
        assert_eq!(named(&news), [("pod", CREATED), ("pod", STARTED)]);
        let news = tell(seen(true, &[("c", Stage::Created)]), false);
        assert_eq!(named(&news), [("c", CREATED)]);
        let news = tell(seen(true, &[("c", Stage::Running)]), false);
        assert_eq!(named(&news), [("c", STARTED)]);
        assert_eq!(tell(seen(true, &[("c", Stage::Running)]), false), []);
        // The VM dies.
        let news = tell(seen(false, &[("c", Stage::Exited(true))]), false);
        assert_eq!(named(&news), [("c", STOPPED), ("pod", STOPPED)]);
        let news = tell(seen(false, &[]), false);
        assert_eq!(named(&news), [("c", DELETED)]);
        let news = tell(seen(false, &[]), true);
        assert_eq!(named(&news), [("pod", DELETED)]);
        // A monitor's last words.
        assert_eq!(tell(seen(true, &[("c", Stage::Running)]), false), []);
    }

    #[test]
    fn no_step_is_left_out_and_none_is_made_up() {
        assert_eq!(
            steps(None, Stage::Exited(true)),
            [CREATED, STARTED, STOPPED]
        );
        assert_eq!(
            steps(Some(Stage::Created), Stage::Exited(true)),
            [STARTED, STOPPED]
        );
        // It could not be executed.
        assert_eq!(steps(Some(Stage::Created), Stage::Exited(false)), [STOPPED]);
        assert_eq!(steps(Some(Stage::Running), Stage::Exited(true)), [STOPPED]);
        assert_eq!(steps(Some(Stage::Exited(true)), Stage::Exited(true)), []);
    }

    #[test]
    fn a_removed_pod_takes_its_containers_along() {
        let mut told = Told::default();
        told.news(seen(true, &[("c", Stage::Running)]), "pod", false);
        let news = told.news(seen(false, &[]), "pod", true);
        let expected = [("c", DELETED), ("pod", STOPPED), ("pod", DELETED)];
        assert_eq!(named(&news), expected);
    }
}
