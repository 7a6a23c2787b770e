//! Guest images that do not work.

use std::fs;
use std::path::{Path, PathBuf};

use crate::built;

/// What is wrong with a guest image.
#[derive(Debug, Clone, Copy)]
pub enum Flaw {
    /// The kernel is a file of random bytes.
    Garbage,
    /// The initramfs is empty: the kernel panics.
    NoInit,
    /// The initramfs has an init that says [`SILENT`] to the kernel's log, and nothing to podvisor.
    SilentInit,
}

/// What [`Flaw::SilentInit`] says.
pub const SILENT: &str = "podvisor-test: this init never calls";

/// Writes a guest image with a flaw into `dir`, and returns `dir`.
pub fn flawed(dir: PathBuf, flaw: Flaw) -> PathBuf {
    let whole = built("PODVISOR_GUEST_DIR", "guest");
    fs::create_dir_all(&dir).expect("ours");
    let kernel = dir.join("vmlinux");
    if let Flaw::Garbage = flaw {
        fs::write(&kernel, vec![0x5a; 1 << 20]).expect("ours");
    } else {
        fs::copy(whole.join("vmlinux"), &kernel).expect("the guest image is built");
    }
    let mut cpio = Cpio::default();
    if let Flaw::SilentInit = flaw {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
        let busybox = busybox.iter().find(|path| path.exists());
        let busybox = fs::read(busybox.expect("busybox-static is installed")).expect("readable");
        let init = format!("#!/busybox sh\necho '<0>{SILENT}' > /kmsg\nexec /busybox sleep 1000\n");
        cpio.add("kmsg", 0o020_600, (1, 11), &[]);
        cpio.add("busybox", 0o100_755, (0, 0), &busybox);
        cpio.add("init", 0o100_755, (0, 0), init.as_bytes());
    }
    cpio.add("TRAILER!!!", 0, (0, 0), &[]);
    fs::write(dir.join("initramfs.cpio"), cpio.0).expect("ours");
    dir
}

/// The "newc" format, Documentation/driver-api/early-userspace/buffer-format.rst.
#[derive(Default)]
struct Cpio(Vec<u8>);

impl Cpio {
    /// `device`: major and minor number of a device node.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        let inode = self.0.len() as u32;
        self.0.extend_from_slice(b"070701");
        let size = data.len() as u32;
        let name_size = name.len() as u32 + 1;
        let (major, minor) = device;
        for field in [
            inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0,
        ] {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
