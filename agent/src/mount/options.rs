//! Mount options as an OCI spec writes them (runtime-spec, config.md, "Linux mount options").

use super::Attributes;

/// What the options of one mount mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// It is a bind mount.
    pub bind: bool,
    /// With all that is mounted below.
    pub bind_recursive: bool,
    /// Of the mount itself.
    pub attributes: Attributes,
    /// Of the mount and those below it.
    pub recursive: Attributes,
    /// For the file system.
    pub data: Vec<String>,
}

impl Options {
    /// Later ones count, where they contradict.
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Self {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option);
        }
        parsed
    }

    fn add(&mut self, option: &str) {
        match option {
            "" | "defaults" => {}
            "bind" => self.bind = true,
            "rbind" => {
                self.bind = true;
                self.bind_recursive = true;
            }
            _ => {
                if let Some(change) = attribute(option) {
                    self.attributes.add(change);
                } else if let Some(propagation) = propagation(option) {
                    self.attributes.propagation = propagation;
                } else if let Some(change) = option.strip_prefix('r').and_then(attribute) {
                    self.recursive.add(change);
                } else if let Some(propagation) = option.strip_prefix('r').and_then(propagation) {
                    self.recursive.propagation = propagation;
                } else {
                    self.data.push(option.to_owned());
                }
            }
        }
    }
}

impl Attributes {
    fn add(&mut self, change: Change) {
        match change {
            Change::Set(bits) => {
                self.set |= bits;
                self.clear &= !bits;
            }
            Change::Clear(bits) => {
                self.clear |= bits;
                self.set &= !bits;
            }
            // These bits are a number: it is set as a whole (mount_setattr(2)).
            Change::AccessTime(value) => {
                self.set = self.set & !libc::MOUNT_ATTR__ATIME | value;
                self.clear |= libc::MOUNT_ATTR__ATIME;
            }
        }
    }
}

/// What an option does to the attributes of a mount.
enum Change {
    Set(u64),
    Clear(u64),
    AccessTime(u64),
}

fn attribute(option: &str) -> Option<Change> {
    use Change::{AccessTime, Clear, Set};
    Some(match option {
        "ro" => Set(libc::MOUNT_ATTR_RDONLY),
        "rw" => Clear(libc::MOUNT_ATTR_RDONLY),
        "nosuid" => Set(libc::MOUNT_ATTR_NOSUID),
        "suid" => Clear(libc::MOUNT_ATTR_NOSUID),
        "nodev" => Set(libc::MOUNT_ATTR_NODEV),
        "dev" => Clear(libc::MOUNT_ATTR_NODEV),
        "noexec" => Set(libc::MOUNT_ATTR_NOEXEC),
        "exec" => Clear(libc::MOUNT_ATTR_NOEXEC),
        "nosymfollow" => Set(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => Clear(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "nodiratime" => Set(libc::MOUNT_ATTR_NODIRATIME),
        "diratime" => Clear(libc::MOUNT_ATTR_NODIRATIME),
        "noatime" => AccessTime(libc::MOUNT_ATTR_NOATIME),
        "strictatime" => AccessTime(libc::MOUNT_ATTR_STRICTATIME),
        // The kernel's default.
        "relatime" | "atime" | "norelatime" | "nostrictatime" => {
            AccessTime(libc::MOUNT_ATTR_RELATIME)
        }
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<u64> {
    Some(match option {
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "private" => libc::MS_PRIVATE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_attributes_propagation_or_data() {
        let options = Options::parse([
            "nosuid",
            "strictatime",
            "mode=755",
            "size=65536k",
            "ro",
            "rw",
            "noexec",
        ]);
        let attributes = Attributes {
            set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME | libc::MOUNT_ATTR_NOEXEC,
            clear: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR__ATIME,
            propagation: 0,
        };
        let expected = Options {
            attributes,
            data: vec!["mode=755".to_owned(), "size=65536k".to_owned()],
            ..Options::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn an_r_means_all_that_is_below() {
        let options = Options::parse(["rbind", "rprivate", "ro", "rnosuid", "relatime"]);
        assert!(options.bind && options.bind_recursive && options.data.is_empty());
        assert_eq!(options.recursive.propagation, libc::MS_PRIVATE);
        assert_eq!(options.recursive.set, libc::MOUNT_ATTR_NOSUID);
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(options.attributes.clear, libc::MOUNT_ATTR__ATIME);
    }

    #[test]
    fn the_last_access_time_counts() {
        let options = Options::parse(["noatime", "strictatime"]);
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_STRICTATIME);
    }
}
