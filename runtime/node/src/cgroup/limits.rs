//! Limits of a pod's own group, for pods whose parent group nobody limits.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{CgroupError, PodCgroup};

/// Period of CPU quotas, in microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;

impl PodCgroup {
    /// Lets the group use `cpus` CPUs' time; `None`: as much as there is.
    ///
    /// # Errors
    /// The node has no such controller for the group, or the parent has less (cgroup v1).
    pub fn set_cpus(&self, cpus: Option<f64>) -> Result<(), CgroupError> {
        let quota = cpus.map(|cpus| (cpus * PERIOD_US as f64).ceil() as u64);
        if let Some(file) = self.file("cpu.max") {
            let quota = quota.map_or("max".to_owned(), |quota| quota.to_string());
            return set(&file, &format!("{quota} {PERIOD_US}"));
        }
        let file = self.needed("cpu.cfs_quota_us")?;
        set(
            &file.with_file_name("cpu.cfs_period_us"),
            &PERIOD_US.to_string(),
        )?;
        set(&file, &quota.map_or("-1".to_owned(), |q| q.to_string()))
    }

    /// Lets the group use so many bytes of memory; `None`: as many as there are.
    ///
    /// # Errors
    /// It uses more now, or the node has no such controller for the group. The limit is then that of before.
    pub fn set_memory(&self, bytes: Option<u64>) -> Result<(), CgroupError> {
        let (file, usage, none) = match self.file("memory.max") {
            Some(file) => (file, "memory.current", "max"),
            None => (
                self.needed("memory.limit_in_bytes")?,
                "memory.usage_in_bytes",
                "-1",
            ),
        };
        let Some(bytes) = bytes else {
            return set(&file, none);
        };
        // Version 2 would kill processes until the limit holds.
        let usage = file.with_file_name(usage);
        let used = fs::read_to_string(&usage).map_err(CgroupError::io(&usage, "read"))?;
        if used.trim().parse().is_ok_and(|used: u64| used > bytes) {
            let problem = format!("{} bytes are in use", used.trim());
            return Err(CgroupError::io(&file, "set")(io::Error::other(problem)));
        }
        set(&file, &bytes.to_string())
    }

    /// The file of a controller, in whichever hierarchy has it.
    fn file(&self, name: &str) -> Option<PathBuf> {
        let files = self.groups.iter().map(|group| group.root.join(name));
        files.into_iter().find(|file| file.exists())
    }

    fn needed(&self, name: &str) -> Result<PathBuf, CgroupError> {
        self.file(name).ok_or_else(|| {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            CgroupError::io(Path::new(name), "find the controller")(missing)
        })
    }
}

fn set(file: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(file, value).map_err(CgroupError::io(file, "set"))
}
