//! QEMU's command line.
//!
//! QEMU opens no path of ours: everything is a file descriptor that it inherits, under the number it has in this
//! process.

use std::fmt::Write as _;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use super::Accel;
use crate::devices::fs;
use crate::vm::VmConfig;

/// Our ends of the connections are in the caller's hands; these go to QEMU.
#[derive(Debug)]
pub(super) struct Sockets {
    pub control: OwnedFd,
    pub disk: OwnedFd,
    pub vsock: OwnedFd,
    pub fs: OwnedFd,
}

/// The arguments, and the descriptors that they name.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub arguments: Vec<String>,
    pub descriptors: Vec<RawFd>,
}

impl Arguments {
    fn add<const N: usize>(&mut self, arguments: [&str; N]) {
        self.arguments.extend(arguments.map(str::to_owned));
    }

    /// Names a descriptor in an argument.
    fn pass(&mut self, fd: BorrowedFd<'_>) -> RawFd {
        self.descriptors.push(fd.as_raw_fd());
        fd.as_raw_fd()
    }
}

/// The command line for `config`, which is valid, with guest memory in the file `memory`.
pub(super) fn arguments(
    config: &VmConfig,
    accel: Accel,
    sockets: &Sockets,
    memory: BorrowedFd<'_>,
) -> Arguments {
    use std::os::fd::AsFd as _;

    let mut args = Arguments::default();
    let ram = config.ram();
    let mebibytes = ram.reserved() >> 20;
    args.add(["-name", &format!("podvisor-{}", config.id)]);
    args.add([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    args.add([
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]);

    // No ACPI, PCI or USB to probe; no firmware menus. The real-time clock stays: under TCG it is the guest's only
    // source of wall time.
    args.add([
        "-M",
        "microvm,acpi=off,pcie=off,usb=off,x-option-roms=off,memory-backend=memory",
    ]);
    match accel {
        Accel::Kvm => args.add(["-accel", "kvm", "-cpu", "host"]),
        Accel::Tcg => {
            // What the guest executes fills the cache of translated code: without a size, up to 1 GiB of the host's
            // memory.
            args.add(["-accel", "tcg,thread=multi,tb-size=128"]);
            // Without ERMS the guest's kernel copies and clears by 8 bytes, not by `rep movsb`, which TCG does a byte
            // at a time: page faults and file reads take a third.
            args.add(["-cpu", "max,-erms"]);
        }
    }
    // A machine that can have but one CPU is emulated without the memory barriers that `lock` and `xchg` are, as if
    // nobody else saw its memory. Our devices do: driver and device would each miss, now and then, that the other asks
    // to be notified, and wait for ever. There are no CPUs to be added: the guest sees those that are there.
    let most = config.vcpus.max(2);
    args.add([
        "-smp",
        &format!("{},maxcpus={most}", config.vcpus),
        "-m",
        &format!("{mebibytes}M"),
    ]);
    // Shared, so that our devices map it.
    let memory = args.pass(memory);
    args.add([
        "-object",
        &format!(
            "memory-backend-file,id=memory,size={mebibytes}M,share=on,mem-path=/proc/self/fd/{memory}"
        ),
    ]);
    // The devices take virtio-mmio slots; the guest learns of them from its command line.
    args.add(["-global", "virtio-mmio.force-legacy=false"]);

    let kernel = args.pass(config.kernel.as_fd());
    let initramfs = args.pass(config.initramfs.as_fd());
    args.add([
        "-kernel",
        &format!("/proc/self/fd/{kernel}"),
        "-initrd",
        &format!("/proc/self/fd/{initramfs}"),
    ]);
    // Without ACPI or a keyboard controller, only a triple fault resets.
    let mut cmdline = format!("reboot=t {}", config.cmdline);
    if ram.reserved() > ram.boot {
        // The kernel is not to find what it has not been given.
        let _ = write!(cmdline, " mem={}", ram.boot_end());
    }
    args.add(["-append", &cmdline]);

    let control = args.pass(sockets.control.as_fd());
    args.add([
        "-chardev",
        &format!("socket,id=control,fd={control}"),
        "-mon",
        "chardev=control,mode=control",
    ]);

    let console = args.pass(config.console.as_fd());
    args.add(["-add-fd", &format!("fd={console},set=1")]);
    // Opened to append: otherwise QEMU would truncate it, which a pipe refuses.
    args.add([
        "-chardev",
        "file,id=console,path=/dev/fdset/1,append=on",
        "-serial",
        "chardev:console",
    ]);

    let disk = args.pass(sockets.disk.as_fd());
    args.add(["-chardev", &format!("socket,id=disk,fd={disk}")]);
    args.add([
        "-device",
        "vhost-user-blk,chardev=disk,queue-size=256,config-wce=off",
    ]);

    let vsock = args.pass(sockets.vsock.as_fd());
    args.add(["-chardev", &format!("socket,id=vsock,fd={vsock}")]);
    args.add(["-device", "vhost-user-vsock-device,chardev=vsock"]);

    let fs_socket = args.pass(sockets.fs.as_fd());
    args.add(["-chardev", &format!("socket,id=fs,fd={fs_socket}")]);
    args.add([
        "-device",
        &format!(
            "vhost-user-fs-device,chardev=fs,tag={},queue-size={}",
            fs::TAG,
            fs::QUEUE_SIZES[1]
        ),
    ]);

    args.add([
        "-object",
        "rng-builtin,id=rng",
        "-device",
        "virtio-rng-device,rng=rng",
    ]);

    if let Some(net) = &config.net {
        let tap = args.pass(net.tap.as_fd());
        args.add(["-netdev", &format!("tap,id=net,fd={tap}")]);
        args.add([
            "-device",
            &format!("virtio-net-device,netdev=net,mac={}", net.mac),
        ]);
    }
    args
}
