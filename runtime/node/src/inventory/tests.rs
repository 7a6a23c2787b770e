//! On this machine: real processes, mounts and groups, in folders made for each test.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount, umount};

use super::*;
use crate::cgroup::PodCgroup;

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

struct Instance {
    temp: tempfile::TempDir,
    places: Places,
}

impl Instance {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let places = Places {
            run_dir: temp.path().join("run"),
            data_dir: temp.path().join("data"),
            cni_cache_dir: temp.path().join("data/cni"),
        };
        for dir in [
            "run/sandboxes",
            "run/netns",
            "data/scratch",
            "data/cni",
            "data/images/tmp",
        ] {
            fs::create_dir_all(temp.path().join(dir)).unwrap();
        }
        Self { temp, places }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn write(&self, name: &str) {
        fs::write(self.path(name), "").unwrap();
    }

    fn kinds(&self) -> Vec<Kind> {
        scan(&self.places)
            .unwrap()
            .into_iter()
            .map(|r| r.kind)
            .collect()
    }

    /// Something with the name of a monitor.
    fn monitor(&self) -> Child {
        let folder = self.path("run/sandboxes").join(ID);
        Command::new("sh")
            .arg0("podvisor-monitor")
            // Without a child: that would have the same command line for a moment.
            .args(["-c", "read line", "sh"])
            .arg(folder)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap()
    }
}

/// Kills what a test has started, with its children.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

#[test]
fn an_empty_instance_has_nothing() {
    let instance = Instance::new();
    assert_eq!(scan(&instance.places).unwrap(), []);
    let nowhere = Path::new("/nonexistent");
    let places = Places {
        run_dir: nowhere.into(),
        data_dir: nowhere.into(),
        cni_cache_dir: nowhere.into(),
    };
    assert_eq!(scan(&places).unwrap(), []);
}

#[test]
fn files_are_found_by_name_and_removed() {
    let instance = Instance::new();
    fs::create_dir(instance.path(&format!("run/sandboxes/{ID}"))).unwrap();
    fs::create_dir(instance.path(&format!("data/scratch/{ID}"))).unwrap();
    for file in [
        format!("data/scratch/{ID}/written"),
        format!("run/sandboxes/{ID}/monitor.sock"),
        format!("run/netns/{ID}"),
        format!("data/scratch/{ID}.img"),
        format!("data/cni/{ID}.json"),
        format!("data/cni/.{ID}.tmp"),
        "data/images/tmp/layer".into(),
        // Not ours to judge.
        format!("run/sandboxes/{ID}.old"),
        "run/netns/cni-1234".into(),
        format!("data/scratch/{ID}.old"),
        "data/cni/README".into(),
    ] {
        instance.write(&file);
    }

    let found = scan(&instance.places).unwrap();
    let kinds: Vec<_> = found.iter().map(|r| r.kind.clone()).collect();
    assert_eq!(
        kinds,
        [
            Kind::NetworkAttachment,
            Kind::Netns,
            Kind::Folder,
            Kind::Scratch,
            Kind::Scratch,
            Kind::TemporaryFile,
            Kind::TemporaryFile,
        ]
    );
    assert!(
        found
            .iter()
            .all(|r| r.sandbox_id == ID || r.path.ends_with("images/tmp/layer"))
    );
    for resource in &found {
        assert!(resource.path.exists(), "{resource}");
        if resource.kind == Kind::NetworkAttachment {
            assert!(matches!(
                remove(resource),
                Err(RemoveError::NetworkAttachment { .. })
            ));
            assert!(resource.path.exists());
        } else {
            remove(resource).unwrap();
            assert!(!resource.path.exists(), "{resource}");
            remove(resource).unwrap();
        }
    }
    assert_eq!(instance.kinds(), [Kind::NetworkAttachment]);
    assert!(instance.path("data/cni/README").exists());
}

#[test]
fn processes_are_found_and_ended() {
    let (instance, other) = (Instance::new(), Instance::new());
    let monitor = Group(instance.monitor());
    // The program takes over its command line when it has been started.
    let started = Instant::now();
    while instance.kinds().is_empty() && started.elapsed() < Duration::from_mins(1) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let found = scan(&instance.places).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(matches!(found[0].kind, Kind::Process { pid, .. } if pid == monitor.0.id()));
    assert_eq!(found[0].sandbox_id, ID);
    assert_eq!(other.kinds(), [], "another instance's");

    // The number of a process that has ended may be another's.
    let mut stale = found[0].clone();
    if let Kind::Process { start_time, .. } = &mut stale.kind {
        *start_time -= 1;
    }
    remove(&stale).unwrap();
    assert_eq!(instance.kinds().len(), 1, "killed by number alone");

    remove(&found[0]).unwrap();
    assert_eq!(instance.kinds(), []);
    remove(&found[0]).unwrap();
}

#[test]
fn a_pods_group_tells_all_its_processes() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let (instance, other) = (Instance::new(), Instance::new());
    let parent = format!("/podvisor-test-inventory-{}", std::process::id());
    let leaf = cgroup_leaf(&instance.places.run_dir, ID);
    let group = PodCgroup::create(&parent, &leaf).unwrap();
    let sleeper = Group(
        Command::new("sleep")
            .arg("1000")
            .process_group(0)
            .spawn()
            .unwrap(),
    );
    group.add(sleeper.0.id()).unwrap();

    let found = scan(&instance.places).unwrap();
    assert!(matches!(found[0].kind, Kind::Process { pid, .. } if pid == sleeper.0.id()));
    let groups = found.iter().filter(|r| r.kind == Kind::Cgroup).count();
    assert_eq!(groups, found.len() - 1);
    assert_eq!(groups, hierarchy::mounted().unwrap().len());
    assert!(found.iter().all(|r| r.sandbox_id == ID));
    assert_eq!(other.kinds(), [], "another instance's");

    for resource in &found {
        remove(resource).unwrap();
        remove(resource).unwrap();
    }
    assert_eq!(instance.kinds(), []);
    PodCgroup::at("/", &parent[1..])
        .unwrap()
        .remove(Duration::ZERO)
        .unwrap();
}

#[test]
fn mounts_are_found_and_never_deleted_through() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    // In a mount namespace that ends with this thread.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();

    let instance = Instance::new();
    let share = instance.path(&format!("run/sandboxes/{ID}/shares/volume"));
    let volume = instance.path("volume");
    fs::create_dir_all(&share).unwrap();
    fs::create_dir(&volume).unwrap();
    instance.write("volume/precious");
    let bind = MsFlags::MS_BIND;
    mount(Some(&volume), &share, None::<&str>, bind, None::<&str>).unwrap();
    // One that is no sandbox's.
    mount(
        Some(&volume),
        &instance.path("data/images/tmp"),
        None::<&str>,
        bind,
        None::<&str>,
    )
    .unwrap();

    let found = scan(&instance.places).unwrap();
    let mounts: Vec<_> = found.iter().filter(|r| r.kind == Kind::Mount).collect();
    assert_eq!(mounts.len(), 1);
    assert_eq!(
        (mounts[0].path.as_path(), mounts[0].sandbox_id.as_str()),
        (share.as_path(), ID)
    );
    let folder = found.iter().find(|r| r.kind == Kind::Folder).unwrap();
    assert!(matches!(remove(folder), Err(RemoveError::Mounted { .. })));
    assert!(instance.path("volume/precious").exists());

    remove(mounts[0]).unwrap();
    remove(mounts[0]).unwrap();
    remove(folder).unwrap();
    assert!(!folder.path.exists() && instance.path("volume/precious").exists());
    umount(&instance.path("data/images/tmp")).unwrap();
}

#[test]
fn tags_are_of_the_folder_and_not_of_its_spelling() {
    let instance = Instance::new();
    let run_dir = &instance.places.run_dir;
    let tag = instance_tag(run_dir);
    assert_eq!(tag.len(), 8);
    std::os::unix::fs::symlink(run_dir, instance.path("link")).unwrap();
    assert_eq!(instance_tag(&instance.path("link")), tag);
    assert_eq!(instance_tag(&run_dir.join("../run")), tag);
    assert_ne!(instance_tag(&instance.places.data_dir), tag);
    // For ever: groups made by older versions must be found.
    assert_eq!(instance_tag(Path::new("/nonexistent/podvisor")), "aaa0862c");
}
