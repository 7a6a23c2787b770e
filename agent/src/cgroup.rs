//! Control groups (v2). `agent` holds PID 1 and its helpers, `containers/<id>` each container, with a
//! child for each exec: nothing distributes resources below a container, so processes may live in both
//! (Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint").

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where the hierarchy is mounted. Containers see their own part of it there too.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// Parent of all containers' groups, below the mount point.
const CONTAINERS: &str = "containers";
/// Prefix of an exec's group.
const EXEC: &str = "exec-";

/// One group.
#[derive(Clone, Debug)]
pub struct Cgroup(PathBuf);

/// Makes the top of the tree: the agent in a leaf of its own, all controllers for containers.
pub fn set_up() -> io::Result<()> {
    let root = Path::new(MOUNT_POINT);
    let agent = root.join("agent");
    std::fs::create_dir_all(&agent)?;
    std::fs::write(agent.join("cgroup.procs"), "0")?;
    let available = std::fs::read_to_string(root.join("cgroup.controllers"))?;
    let controllers: Vec<String> = available
        .split_whitespace()
        .map(|controller| format!("+{controller}"))
        .collect();
    let controllers = controllers.join(" ");
    let containers = root.join(CONTAINERS);
    std::fs::create_dir_all(&containers)?;
    for group in [root, &containers] {
        std::fs::write(group.join("cgroup.subtree_control"), &controllers)?;
    }
    Ok(())
}

impl Cgroup {
    /// The group that all containers are below.
    pub fn all_containers() -> Self {
        Self(Path::new(MOUNT_POINT).join(CONTAINERS))
    }

    /// Makes the group of a container.
    pub fn create_for_container(id: &str) -> io::Result<Self> {
        let group = Self(Self::all_containers().0.join(id));
        group.create()?;
        Ok(group)
    }

    /// Makes a group for an exec, below its container's.
    pub fn create_for_exec(&self, exec_id: &str) -> io::Result<Self> {
        let group = Self(self.0.join(format!("{EXEC}{exec_id}")));
        group.create()?;
        Ok(group)
    }

    fn create(&self) -> io::Result<()> {
        match std::fs::create_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    /// The group's directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A file of the group.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Whether `other` is below this group.
    pub fn is_above(&self, other: &Self) -> bool {
        other.0.starts_with(&self.0)
    }

    /// The group's directory, for `clone3` with `CLONE_INTO_CGROUP`.
    pub fn open(&self) -> io::Result<OwnedFd> {
        Ok(File::open(&self.0)?.into())
    }

    /// Lets the user `owner` manage what is below the group, but not its limits (cgroup-v2.rst, "Model of
    /// Delegation").
    pub fn delegate_to(&self, owner: u32) -> io::Result<()> {
        chown(&self.0, Some(owner), None)?;
        for name in ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            chown(self.file(name), Some(owner), None)?;
        }
        Ok(())
    }

    /// How many processes of the group the kernel has killed for want of memory.
    pub fn out_of_memory_kills(&self) -> u64 {
        std::fs::read_to_string(self.file("memory.events"))
            .ok()
            .and_then(|text| {
                text.lines()
                    .find_map(|line| line.strip_prefix("oom_kill "))
                    .and_then(|count| count.trim().parse().ok())
            })
            .unwrap_or(0)
    }

    /// Kills every process of the group and of those below it, also ones that fork meanwhile.
    pub fn kill(&self) -> io::Result<()> {
        match std::fs::write(self.file("cgroup.kill"), "1") {
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        }
    }

    /// Sends `signal` to every process of the group and of those below it.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if signal == Signal::SIGKILL {
            return self.kill();
        }
        for group in self.subtree()? {
            let processes = match std::fs::read_to_string(group.file("cgroup.procs")) {
                Ok(processes) => processes,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            // 0 stands for processes that this pid namespace does not see; there are none.
            for pid in processes
                .lines()
                .filter_map(|line| line.parse().ok())
                .filter(|pid| *pid > 0)
            {
                match kill(Pid::from_raw(pid), signal) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Whether a process lives in the group or below it.
    pub fn is_populated(&self) -> bool {
        std::fs::read_to_string(self.file("cgroup.events"))
            .is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
    }

    /// Kills all processes, waits for their end, takes the group and those below it away. Blocks.
    ///
    /// # Errors
    /// Processes outlive `limit` (one that hangs in the kernel can).
    pub fn destroy(&self, limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            self.kill()?;
            self.wait_until_empty(deadline)?;
            match self.remove() {
                // A process has joined since.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                result => return result,
            }
        }
    }

    /// Kills all processes of the groups below this one and waits for their end. Blocks.
    pub fn kill_and_wait(&self, limit: Duration) -> io::Result<()> {
        self.kill()?;
        self.wait_until_empty(Instant::now() + limit)
    }

    /// Takes the group and those below it away; they must be empty.
    pub fn remove(&self) -> io::Result<()> {
        let mut groups = self.subtree()?;
        // Children come after their parents.
        groups.reverse();
        for group in groups {
            match std::fs::remove_dir(&group.0) {
                Err(error) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn wait_until_empty(&self, deadline: Instant) -> io::Result<()> {
        let events = match File::open(self.file("cgroup.events")) {
            Ok(events) => events,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        // The kernel raises POLLPRI when the file's content changes after it was last read from this
        // descriptor's opening on; so look after each wake-up, never before a wait without a look.
        while self.is_populated() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut file = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut file, timeout) {
                Ok(_) | Err(Errno::EINTR) => {
                    // Reading from this descriptor re-arms it.
                    let mut text = [0; 64];
                    nix::sys::uio::pread(&events, &mut text, 0).or_else(|error| match error {
                        Errno::ENODEV => Ok(0),
                        other => Err(other),
                    })?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// This group and all below it, parents before children.
    fn subtree(&self) -> io::Result<Vec<Self>> {
        let mut groups = vec![self.clone()];
        let mut next = 0;
        while let Some(group) = groups.get(next).cloned() {
            next += 1;
            let entries = match std::fs::read_dir(&group.0) {
                Ok(entries) => entries,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    groups.push(Self(entry.path()));
                }
            }
        }
        Ok(groups)
    }
}

/// The group was removed, before or while it was looked at.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}
