//! Files as they are on both sides.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::libc;
use nix::unistd::{Gid, Uid, chown};
use podvisor_tests::crictl::shell;
use podvisor_tests::logs;
use podvisor_tests::machine::slowness;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};

use super::{Rig, node, read_only, volume};

#[test]
fn node_and_pod_see_each_others_changes_at_once() {
    let rig = Rig::new("shared");
    let data = rig.directory("data");
    fs::write(data.join("before"), "node").expect("writes");
    let c = rig.container("c", &[volume(&data, "/made/for/it")]);
    assert_eq!(rig.sh(&c, "cat /made/for/it/before"), "node");

    rig.sh(
        &c,
        "cd /made/for/it && echo pod >new && mkdir dir && mv before dir/after && ln new dir/hard &&
         ln -s dir/after soft && echo more >>new && chmod 640 new",
    );
    let read = |name: &str| fs::read_to_string(data.join(name)).expect(name);
    assert_eq!(read("new"), "pod\nmore\n");
    assert_eq!(read("dir/after"), "node");
    assert_eq!(read("soft"), "node");
    assert!(!data.join("before").exists());
    let (new, hard) = (data.join("new"), data.join("dir/hard"));
    let (new, hard) = (new.metadata().unwrap(), hard.metadata().unwrap());
    assert_eq!(
        (new.ino(), new.nlink(), new.mode() & 0o7777),
        (hard.ino(), 2, 0o640)
    );

    // Names, contents and sizes that the pod has just looked at.
    rig.sh(&c, "cd /made/for/it; cat new; ls -l dir; test ! -e later");
    fs::write(data.join("new"), "the node's").expect("writes");
    fs::rename(data.join("dir/after"), data.join("dir/again")).expect("renames");
    fs::write(data.join("later"), "").expect("writes");
    let seen = rig.sh(
        &c,
        "cd /made/for/it; cat new; echo; ls dir; stat -c %s later",
    );
    assert_eq!(seen, "the node's\nagain\nhard\n0");
    rig.sh(&c, "cd /made/for/it; rm -r dir new soft later");
    assert_eq!(fs::read_dir(&data).expect("reads").count(), 0);

    // What a process has open grows under it.
    fs::write(data.join("log"), "1\n").expect("writes");
    let follow = "tail -f /v/log & read line </v/stop; kill $!";
    let mut config = shell("tail", &busybox(), follow);
    config["mounts"] = json!([volume(&data, "/v")]);
    nix::unistd::mkfifo(&data.join("stop"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    rig.daemon.create_started(&rig.id, &rig.pod, &config);
    logs::wait_for(&rig.pod.log("tail"), "1");
    let mut log = fs::File::options()
        .append(true)
        .open(data.join("log"))
        .expect("there");
    log.write_all(b"2\n").expect("writes");
    logs::wait_for(&rig.pod.log("tail"), "2");

    rig.daemon.cri().remove_container(&c);
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
    assert_eq!(
        fs::read_to_string(data.join("log")).expect("there"),
        "1\n2\n"
    );
}

#[test]
fn files_are_mounted_as_files() {
    let rig = Rig::new("files");
    let hosts = rig.path("hosts");
    let message = rig.path("message");
    fs::write(&hosts, "1.2.3.4 kubelet\n").expect("writes");
    fs::write(&message, "").expect("writes");
    let target = rig.directory("target");
    fs::write(target.join("x"), "x").expect("writes");
    let link = rig.path("link");
    symlink(&target, &link).expect("links");
    let c = rig.container(
        "c",
        &[
            volume(&hosts, "/etc/hosts"),
            volume(&message, "/dev/termination-log"),
            volume(&link, "/linked"),
        ],
    );
    assert_eq!(rig.sh(&c, "cat /etc/hosts /linked/x"), "1.2.3.4 kubelet\nx");
    rig.sh(&c, "echo the end >/dev/termination-log");
    assert_eq!(fs::read_to_string(&message).expect("reads"), "the end\n");
    fs::write(&hosts, "5.6.7.8 later\n").expect("writes");
    assert_eq!(rig.sh(&c, "cat /etc/hosts"), "5.6.7.8 later");
}

/// As the kubelet lays out a ConfigMap: `..data` is a link to a folder with a new name each time.
#[test]
fn a_config_map_changes_at_once_and_as_a_whole() {
    let rig = Rig::new("configmap");
    let map = rig.directory("map");
    let update = |generation: u32| {
        let folder = format!("..2026_{generation}");
        fs::create_dir(map.join(&folder)).expect("a directory");
        for key in ["a", "b"] {
            fs::write(map.join(&folder).join(key), generation.to_string()).expect("writes");
        }
        symlink(&folder, map.join("..data_tmp")).expect("links");
        fs::rename(map.join("..data_tmp"), map.join("..data")).expect("renames");
    };
    update(1);
    for key in ["a", "b"] {
        symlink(format!("..data/{key}"), map.join(key)).expect("links");
    }
    let c = rig.container(
        "c",
        &[
            read_only(&map, "/map"),
            read_only(&map.join("..data/a"), "/sub"),
        ],
    );
    assert_eq!(rig.sh(&c, "cat /map/a /map/b /sub"), "111");
    for generation in 2..5 {
        update(generation);
        fs::remove_dir_all(map.join(format!("..2026_{}", generation - 1))).expect("removes");
        // A subPath stays what it was, as everywhere.
        assert_eq!(
            rig.sh(&c, "cat /map/a /map/b"),
            generation.to_string().repeat(2)
        );
    }
    assert_eq!(rig.sh(&c, "cat /sub"), "1");
}

#[test]
fn owners_and_modes_are_the_nodes() {
    let rig = Rig::new("owners");
    let data = rig.directory("data");
    // As a volume with fsGroup 2000 is.
    chown(&data, Some(Uid::from_raw(0)), Some(Gid::from_raw(2000))).expect("chown");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o2770)).expect("chmod");
    let security = json!({
        "run_as_user": {"value": 1234},
        "run_as_group": {"value": 99},
        "supplemental_groups": [2000],
    });
    let c = rig.container_with("c", &[volume(&data, "/v")], security);
    rig.sh(
        &c,
        "umask 027; mkdir /v/dir; echo x >/v/file; mkfifo /v/dir/fifo; ln -s x /v/link",
    );
    for (name, mode) in [
        ("dir", 0o42750),
        ("file", 0o100_640),
        ("dir/fifo", 0o10640),
        ("link", 0o120_777),
    ] {
        let made = fs::symlink_metadata(data.join(name)).expect(name);
        assert_eq!(
            (made.uid(), made.gid(), made.mode()),
            (1234, 2000, mode),
            "{name}"
        );
    }
    fs::write(data.join("secret"), "x").expect("writes");
    fs::set_permissions(data.join("secret"), fs::Permissions::from_mode(0o600)).expect("chmod");
    assert!(
        rig.sh(&c, "cat /v/secret 2>&1 || true")
            .contains("Permission denied")
    );
    assert_eq!(
        rig.sh(&c, "stat -c '%u %g %a' /v /v/secret"),
        "0 2000 2770\n0 2000 600"
    );
    // A write takes the set-uid bit, wherever it is made.
    let suid = data.join("suid");
    fs::write(&suid, "x").expect("writes");
    chown(&suid, Some(Uid::from_raw(1234)), None).expect("chown");
    fs::set_permissions(&suid, fs::Permissions::from_mode(0o4777)).expect("chmod");
    rig.sh(&c, "echo y >>/v/suid");
    assert_eq!(suid.metadata().expect("there").mode() & 0o7777, 0o777);
}

/// From its third write on a file is written to by the monitor, and not by podvisor-fs.
#[test]
fn a_file_that_is_written_often_is_as_any_other() {
    let rig = Rig::new("often");
    let data = rig.directory("data");
    let script = "mkfifo /v/lines; exec 3<>/v/file 4<>/v/lines; echo begun
        while read line <&4; do echo $line >&3 && echo $line; done";
    let mut config = shell("writer", &busybox(), script);
    config["mounts"] = json!([volume(&data, "/v")]);
    let c = rig.daemon.create_started(&rig.id, &rig.pod, &config);
    let log = rig.pod.log("writer");
    logs::wait_for(&log, "begun");
    let write = |line: u32| {
        rig.sh(&c, &format!("echo {line} >/v/lines"));
        logs::wait_for(&log, &line.to_string());
    };
    let file = data.join("file");
    let read = || fs::read(&file).expect("there");
    (1..=4).for_each(write);
    assert_eq!(read(), b"1\n2\n3\n4\n");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4777)).expect("chmod");
    write(5);
    assert_eq!(file.metadata().expect("there").mode() & 0o7777, 0o777);
    // Made shorter meanwhile, it has a hole.
    let other = fs::File::options().write(true).open(&file);
    other.and_then(|other| other.set_len(0)).expect("truncates");
    write(6);
    assert_eq!(read(), b"\0\0\0\0\0\0\0\0\0\x006\n");
    // Removed, it goes on as what is open.
    let other = fs::File::open(&file).expect("there");
    fs::remove_file(&file).expect("removes");
    write(7);
    assert_eq!(other.metadata().expect("open").len(), 14);
}

#[test]
fn a_file_that_gets_too_large_says_so() {
    const MOST: u64 = 1 << 20;
    let rig = Rig::new("large");
    let data = rig.directory("data");
    let c = rig.container("c", &[volume(&data, "/v")]);
    let processes = rig.daemon.instance.processes();
    let servers = processes.iter().filter(|(_, command)| {
        ["podvisor-monitor", "podvisor-fs"].map(|name| command.contains(name)) != [false; 2]
    });
    let limit = libc::rlimit {
        rlim_cur: MOST,
        rlim_max: MOST,
    };
    for (pid, _) in servers {
        // SAFETY: a limit that lasts as long, and nowhere to put the old one.
        let set = unsafe {
            libc::prlimit(
                pid.as_raw(),
                libc::RLIMIT_FSIZE,
                &raw const limit,
                std::ptr::null_mut(),
            )
        };
        assert_eq!(set, 0);
    }
    let said = rig.sh(
        &c,
        "dd if=/dev/zero of=/v/x bs=256k count=8 2>&1; echo more >>/v/x || true",
    );
    assert!(said.contains("File too large"), "{said}");
    assert_eq!(data.join("x").metadata().expect("there").len(), MOST);
    assert_eq!(rig.sh(&c, "echo lives >/v/y; cat /v/y"), "lives");
}

#[test]
fn a_full_volume_says_so() {
    let mut rig = Rig::new("full");
    let small = rig.tmpfs("small", "64k");
    let c = rig.container("c", &[volume(&small, "/v")]);
    let said = rig.sh(
        &c,
        "dd if=/dev/zero of=/v/x bs=4k count=100 2>&1; stat -c %s /v/x; df -k /v | tail -1",
    );
    assert!(said.contains("No space left on device"), "{said}");
    assert!(
        said.contains("\n65536\n") && said.contains("100%"),
        "{said}"
    );
}

#[test]
fn a_quota_is_the_nodes() {
    let mut rig = Rig::new("quota");
    let Some(data) = rig.ext4_with_quota("quota", 1234, 64) else {
        println!("SKIPPED: the node's kernel has no quotas (CONFIG_QFMT_V2)");
        return;
    };
    chown(&data, Some(Uid::from_raw(1234)), None).expect("chown");
    let security = json!({"run_as_user": {"value": 1234}});
    let c = rig.container_with("c", &[volume(&data, "/v")], security);
    let said = rig.sh(
        &c,
        "dd if=/dev/zero of=/v/x bs=4k count=100 2>&1; stat -c %s /v/x",
    );
    assert!(said.contains("quota exceeded"), "{said}");
    assert!(data.join("x").metadata().expect("there").len() <= 64 << 10);
}

#[test]
fn containers_of_a_pod_share_files_pipes_and_sockets() {
    let rig = Rig::new("between");
    let data = rig.directory("data");
    let one = rig.container("one", &[volume(&data, "/one")]);
    let two = rig.container("two", &[volume(&data, "/two"), read_only(&data, "/ro")]);
    rig.sh(&one, "mkfifo /one/fifo; (echo through >/one/fifo) &");
    assert_eq!(rig.sh(&two, "cat /two/fifo"), "through");
    assert!(
        data.join("fifo")
            .metadata()
            .expect("there")
            .file_type()
            .is_fifo()
    );
    // First seen read-only, still to be written by its other name.
    fs::write(data.join("both"), "x").expect("writes");
    assert_eq!(
        rig.sh(&two, "cat /ro/both; echo y >/two/both; cat /ro/both"),
        "xy"
    );
}

/// Two containers and what only programs do: locks, maps, sockets. In Python, the node's own.
#[test]
fn a_file_is_one_file_in_all_containers() {
    const ONE: &str = r#"
import fcntl, mmap, os, socket, time
fcntl.flock(os.open("flock", os.O_RDONLY), fcntl.LOCK_EX)
posix = os.open("posix", os.O_RDWR)
fcntl.lockf(posix, fcntl.LOCK_EX)
shared = mmap.mmap(os.open("map", os.O_RDWR), 4096)
shared[:5] = b"first"
listener = socket.socket(socket.AF_UNIX)
listener.bind("socket")
listener.listen()
print("ready", flush=True)
listener.accept()[0].sendall(shared[:6])
time.sleep(1000)
"#;
    const TWO: &str = r#"
import fcntl, mmap, os, socket, sys
def fails(kind, call, *arguments):
    try: call(*arguments)
    except kind: pass
    else: raise AssertionError(call)
now = fcntl.LOCK_EX | fcntl.LOCK_NB
for directory in sys.argv[1:]:
    fails(BlockingIOError, fcntl.flock, os.open(directory + "/flock", os.O_RDONLY), now)
fails(BlockingIOError, fcntl.lockf, os.open("posix", os.O_RDWR), now)
shared = mmap.mmap(os.open("map", os.O_RDWR), 4096)
assert shared[:5] == b"first"
shared[:6] = b"second"
client = socket.socket(socket.AF_UNIX)
client.connect("socket")
assert client.recv(9) == b"second"
# Behind the node's socket is a process of the node.
fails(ConnectionRefusedError, socket.socket(socket.AF_UNIX).connect, "node")
print("as it should be")
"#;
    let rig = Rig::new("one");
    let (data, other) = (rig.directory("data"), rig.directory("other"));
    for name in ["flock", "posix"] {
        fs::write(data.join(name), "").expect("writes");
    }
    fs::write(data.join("map"), [0; 4096]).expect("writes");
    fs::write(data.join("one"), ONE).expect("writes");
    fs::write(data.join("two"), TWO).expect("writes");
    let _node = UnixListener::bind(data.join("node")).expect("listens");
    // Where the node has these folders too: only there can they be mounted below its read-only root.
    let inside = |path: &Path| format!("/node{}", path.display());
    let python = |script: &str| {
        let (data, other) = (data.display(), other.display());
        format!(
            "chroot /node /bin/sh -c 'cd {data} && exec python3 {script} {data} {other}' 2>&1 || true"
        )
    };
    let mut config = shell("one", &busybox(), &python("one"));
    config["mounts"] = json!([node(), volume(&data, &inside(&data))]);
    rig.daemon.create_started(&rig.id, &rig.pod, &config);
    logs::wait_for(&rig.pod.log("one"), "ready");
    let two = rig.container(
        "two",
        &[
            node(),
            volume(&data, &inside(&data)),
            read_only(&data, &inside(&other)),
        ],
    );
    assert_eq!(rig.sh(&two, &python("two")), "as it should be");
}

/// What containers do to a file is told to containers, what one does in a directory to itself; what the node does is not.
#[test]
fn inotify_tells_of_the_pod() {
    const WATCH: &str = r#"
import ctypes, os
libc = ctypes.CDLL(None)
events = libc.inotify_init()
IN_MODIFY, IN_CREATE = 2, 0x100
assert libc.inotify_add_watch(events, b"file", IN_MODIFY) > 0
assert libc.inotify_add_watch(events, b".", IN_CREATE) > 0
print("watching", flush=True)
while True:
    # `struct inotify_event`: four numbers and a name, filled up with NUL.
    name = os.read(events, 4096)[16:].rstrip(b"\0").decode()
    print("created " + name if name else "modified", flush=True)
"#;
    let rig = Rig::new("inotify");
    let data = rig.directory("data");
    fs::write(data.join("watch"), WATCH).expect("writes");
    fs::write(data.join("file"), "").expect("writes");
    let inside = data.display();
    let watches = format!("chroot /node /bin/sh -c 'cd {inside} && exec python3 watch' 2>&1");
    let mut config = shell("watch", &busybox(), &watches);
    config["mounts"] = json!([node(), volume(&data, &format!("/node{inside}"))]);
    let watch = rig.daemon.create_started(&rig.id, &rig.pod, &config);
    let log = rig.pod.log("watch");
    logs::wait_for(&log, "watching");
    let other = rig.container("other", &[volume(&data, "/v")]);
    fs::write(data.join("file"), "of the node\n").expect("writes");
    fs::write(data.join("of-the-node"), "").expect("writes");
    rig.sh(&other, "cat /v/of-the-node; echo more >>/v/file");
    logs::wait_for(&log, "modified");
    rig.sh(&watch, &format!("echo >/node{inside}/new"));
    logs::wait_for(&log, "created new");
    let told = logs::stdout(&log);
    assert_eq!(told, ["watching", "modified", "created new"]);
}

/// An emptyDir in memory, as kubelets mount it, in the place of /dev/shm.
#[test]
fn memory_of_the_node_is_a_volume() {
    let mut rig = Rig::new("memory");
    let memory = rig.tmpfs("memory", "3m");
    let one = rig.container("one", &[volume(&memory, "/dev/shm")]);
    let two = rig.container("two", &[volume(&memory, "/v")]);
    rig.sh(
        &one,
        "dd if=/dev/zero of=/dev/shm/x bs=1M count=2 2>/dev/null",
    );
    let size = "df -k /v | awk 'END { print $2, $3 }'";
    assert_eq!(
        rig.sh(&two, &format!("stat -c %s /v/x; {size}")),
        "2097152\n3072 2048"
    );
}

/// What shells cannot do, in Python: the node's own, from its root, which the container has as a volume.
#[test]
fn files_behave_as_on_a_local_disk() {
    const SCRIPT: &str = r#"
import errno, fcntl, mmap, os, socket, struct, sys
os.chdir(sys.argv[1])
def fails(code, call, *arguments):
    try: call(*arguments)
    except OSError as error: assert error.errno == code, error
    else: raise AssertionError(call)
fd = os.open("file", os.O_RDWR | os.O_CREAT | os.O_EXCL)
fails(errno.EEXIST, os.open, "file", os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.pwrite(fd, b"x" * 10000, 5000)
assert os.pread(fd, 6000, 0) == b"\0" * 5000 + b"x" * 1000
os.ftruncate(fd, 4096 * 4)
# Mapped, shared: two maps and the file are one.
one, two = (mmap.mmap(fd, 4096 * 4) for _ in range(2))
one[100:104] = b"maps"
assert two[100:104] == b"maps" and os.pread(fd, 4, 100) == b"maps"
one.flush()
# Direct I/O, on an aligned buffer.
direct = os.open("file", os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
assert os.preadv(direct, [page], 0) == 4096 and page[100:104] == b"maps"
page[:4] = b"DIO!"
assert os.pwritev(direct, [page], 4096) == 4096 and os.pread(fd, 4, 4096) == b"DIO!"
# Append: at the end, wherever that is.
append = os.open("file", os.O_WRONLY | os.O_APPEND)
os.write(append, b"end"); os.write(append, b"END")
assert os.stat("file").st_size == 4096 * 4 + 6
# Locks between processes: POSIX, open file description, flock.
def child(work):
    pid = os.fork()
    if pid == 0:
        try: work(); os._exit(0)
        except BaseException as error: print(error); os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
def other():
    fd = os.open("file", os.O_RDWR)
    fails(errno.EAGAIN, fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 5)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100)
child(other)
fcntl.flock(direct, fcntl.LOCK_SH)
fails(errno.EAGAIN, fcntl.flock, append, fcntl.LOCK_EX | fcntl.LOCK_NB)
# Extended attributes, where the node has them.
if sys.argv[2] == "true":
    os.setxattr("file", "user.a", b"value", os.XATTR_CREATE)
    fails(errno.EEXIST, os.setxattr, "file", "user.a", b"x", os.XATTR_CREATE)
    assert os.listxattr("file") == ["user.a"] and os.getxattr("file", "user.a") == b"value"
    os.removexattr("file", "user.a")
    fails(errno.ENODATA, os.getxattr, "file", "user.a")
    os.setxattr("file", "user.kept", b"for the node")
else:
    fails(errno.ENOTSUP, os.setxattr, "file", "user.a", b"value")
# Renames, unlinked files that are open, holes.
os.mkdir("a"); os.mkdir("b"); open("b/x", "w").close()
fails(errno.ENOTEMPTY, os.rename, "a", "b")
os.rename("b", "c"); os.replace("file", "c/file")
gone = os.open("gone", os.O_RDWR | os.O_CREAT); os.unlink("gone")
os.write(gone, b"still"); assert os.pread(gone, 5, 0) == b"still" and os.fstat(gone).st_nlink == 0
os.ftruncate(gone, 1 << 20); os.pwrite(gone, b"z", 1 << 19)
assert os.lseek(gone, 8192, os.SEEK_DATA) == 1 << 19
os.posix_fallocate(gone, 0, 1 << 20)
os.utime("c", ns=(1_000_000_001, 2_000_000_002))
assert os.stat("c").st_mtime_ns == 2_000_000_002
os.link("c/file", "c/hard"); assert os.stat("c/hard").st_ino == os.stat("c/file").st_ino
# A unix socket.
listener = socket.socket(socket.AF_UNIX); listener.bind("socket"); listener.listen()
client = socket.socket(socket.AF_UNIX); client.connect("socket"); client.send(b"through")
assert listener.accept()[0].recv(9) == b"through"
for fd in (fd, direct, append): os.fsync(fd)
dir = os.open("c", os.O_DIRECTORY); os.fsync(dir)
assert sorted(e.name for e in os.scandir(".")) == ["a", "c", "script", "socket"]
print("as it should be")
"#;
    let rig = Rig::new("local");
    let data = rig.directory("data");
    fs::write(data.join("script"), SCRIPT).expect("writes");
    let inside = data.to_str().expect("a path");
    // The nested host's temporary files are on a tmpfs, which has had them since Linux 6.6.
    let attributes = Command::new("python3")
        .args([
            "-c",
            "import os, sys; os.setxattr(sys.argv[1], 'user.a', b'')",
        ])
        .arg(&data)
        .stderr(Stdio::null())
        .status()
        .expect("python3")
        .success();
    // Below the other one: the longer path comes later, whatever was asked first.
    let below = volume(&data, &format!("/node{inside}"));
    let c = rig.container("c", &[below, node()]);
    let script =
        format!("chroot /node /usr/bin/python3 {inside}/script {inside} {attributes} 2>&1 || true");
    assert_eq!(rig.sh(&c, &script), "as it should be");
    assert!(
        data.join("socket")
            .metadata()
            .expect("there")
            .file_type()
            .is_socket()
    );
    let content = fs::read(data.join("c/file")).expect("there");
    assert!(
        content.len() == 4096 * 4 + 6
            && content.ends_with(b"endEND")
            && &content[100..104] == b"maps"
    );
    let said = rig.sh(&c, "echo x 2>&1 >/node/etc/passwd || true");
    assert!(said.contains("Read-only file system"), "{said}");
}

#[test]
fn a_hundred_thousand_files() {
    let rig = Rig::new("hundred");
    let data = rig.directory("data");
    for folder in 0..100 {
        let folder = data.join(folder.to_string());
        fs::create_dir(&folder).expect("a directory");
        for file in 0..1000 {
            fs::File::create(folder.join(file.to_string())).expect("a file");
        }
    }
    let c = rig.container("c", &[volume(&data, "/v")]);
    let list = "n=0; for d in /v/*; do set -- $d/*; n=$((n + $#)); done; echo $n";
    assert_eq!(rig.sh(&c, list), "100000");
    // `ls` looks each file up besides. The server is the same everywhere: where all is slow, some are enough.
    let (folders, files) = match slowness() {
        1 => ("*", "100000"),
        _ => ("?", "10000"),
    };
    let look_up = format!("for d in /v/{folders}; do ls $d; done | wc -l");
    assert_eq!(rig.sh(&c, &look_up), files);
}

#[test]
fn three_hundred_mounts() {
    let rig = Rig::new("many");
    let mounts: Vec<Value> = (0..300)
        .map(|n| {
            let data = rig.directory(&n.to_string());
            fs::write(data.join("n"), format!("{n}\n")).expect("writes");
            volume(&data, &format!("/v/{n}"))
        })
        .collect();
    let c = rig.container("c", &mounts);
    let expected: Vec<String> = (0..300).map(|n| n.to_string()).collect();
    let read = rig.sh(&c, "for n in $(seq 0 299); do cat /v/$n/n; done");
    assert_eq!(read.lines().collect::<Vec<_>>(), expected);
}
