//! Volumes: what of the node's files a container sees, and what the node sees of what it does there.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown};
use podvisor_tests::crictl::{Pod, shell};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::oci::{Image, Layer};
use podvisor_tests::registry::{Registry, busybox};
use podvisor_tests::{eventually, logs};
use serde_json::{Value, json};

/// A daemon with a pod, and a folder of the node's.
struct Rig {
    // Unmounted before the folder goes.
    mounts: Vec<PathBuf>,
    dir: PathBuf,
    pod: Pod,
    id: String,
    daemon: Daemon,
}

/// Waits to be stopped.
const WAITS: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

impl Rig {
    fn new(name: &str) -> Self {
        let daemon = Daemon::start();
        daemon.crictl(&["pull", &busybox()]).ok();
        let dir =
            std::env::temp_dir().join(format!("podvisor-volumes-{name}-{}", std::process::id()));
        fs::create_dir(&dir).expect("a fresh directory");
        let pod = daemon.pod(name);
        let id = daemon.run_pod(&pod);
        Self {
            mounts: Vec::new(),
            dir,
            pod,
            id,
            daemon,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).expect("a fresh directory");
        path
    }

    /// Mounts a tmpfs in the folder, on the node.
    fn tmpfs(&mut self, name: &str, size: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a directory");
        let options = format!("size={size}");
        let flags = MsFlags::empty();
        mount(Some("test"), &path, Some("tmpfs"), flags, Some(&*options)).expect("mounts");
        self.mounts.push(path.clone());
        path
    }

    /// A container with these mounts, which waits.
    fn container(&self, name: &str, mounts: &[Value]) -> String {
        self.container_with(name, mounts, json!({}))
    }

    fn container_with(&self, name: &str, mounts: &[Value], security: Value) -> String {
        let mut config = shell(name, &busybox(), WAITS);
        config["mounts"] = json!(mounts);
        config["linux"]["security_context"] = security;
        self.daemon.create_started(&self.id, &self.pod, &config)
    }

    /// What a script in a container prints.
    fn sh(&self, container: &str, script: &str) -> String {
        self.daemon.exec(container, &["sh", "-c", script])
    }

    /// What crictl says of a container that cannot be created.
    fn refused(&self, mounts: &[Value]) -> String {
        let mut config = shell("refused", &busybox(), "true");
        config["mounts"] = json!(mounts);
        let ran = self.daemon.try_create(&self.id, &self.pod, &config);
        assert_ne!(ran.code, 0, "{}", ran.stdout);
        ran.stderr
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for path in self.mounts.iter().rev() {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn volume(host: &Path, container: &str) -> Value {
    json!({"host_path": host, "container_path": container})
}

fn read_only(host: &Path, container: &str) -> Value {
    json!({"host_path": host, "container_path": container, "readonly": true})
}

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

    rig.daemon.crictl(&["rm", "-f", &c]).ok();
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

#[test]
fn read_only_volumes() {
    let mut rig = Rig::new("readonly");
    let data = rig.directory("data");
    fs::write(data.join("file"), "x").expect("writes");
    rig.tmpfs("data/below", "1m");
    let recursive = json!({"host_path": data, "container_path": "/rro", "readonly": true, "recursive_read_only": true});
    let c = rig.container(
        "c",
        &[read_only(&data, "/ro"), recursive, volume(&data, "/rw")],
    );
    let try_write = |path: &str| rig.sh(&c, &format!("echo y 2>&1 >{path} || true"));
    for path in ["/ro/file", "/ro/new", "/rro/file", "/rro/below/new"] {
        let said = try_write(path);
        assert!(said.contains("Read-only file system"), "{path}: {said}");
    }
    // Of itself alone: what is mounted below is what it is.
    assert_eq!(try_write("/ro/below/through-ro"), "");
    assert_eq!(try_write("/rw/through-rw"), "");
    assert_eq!(
        rig.sh(&c, "ls /rro/below /rro"),
        "/rro:\nbelow\nfile\nthrough-rw\n\n/rro/below:\nthrough-ro"
    );
    assert!(data.join("below/through-ro").exists() && data.join("through-rw").exists());
}

#[test]
fn later_mounts_of_the_node_are_seen_as_asked() {
    let mut rig = Rig::new("propagation");
    let base = rig.tmpfs("base", "1m");
    let nothing = None::<&str>;
    mount(nothing, &base, nothing, MsFlags::MS_SHARED, nothing).expect("shares");
    fs::create_dir(base.join("below")).expect("a directory");
    let follows = json!({"host_path": base, "container_path": "/slave", "propagation": 1});
    let c = rig.container("c", &[volume(&base, "/private"), follows]);
    let below = rig.tmpfs("base/below", "1m");
    fs::write(below.join("seen"), "").expect("writes");
    assert_eq!(rig.sh(&c, "ls /slave/below; ls /private/below"), "seen");
    umount2(&below, MntFlags::empty()).expect("nothing of the pod's holds it");
    assert_eq!(rig.sh(&c, "ls /slave/below"), "");
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

/// The node's root, for programs that the image has not.
fn node() -> Value {
    json!({"host_path": "/", "container_path": "/node", "readonly": true, "recursive_read_only": true})
}

#[test]
fn a_lock_is_one_lock_in_all_containers() {
    let rig = Rig::new("locks");
    let (data, other) = (rig.directory("data"), rig.directory("other"));
    fs::write(data.join("lock"), "").expect("writes");
    // Where the node has these folders too: only there can they be mounted below its read-only root.
    let inside = |path: &Path| format!("/node{}", path.display());
    let flock = |path: PathBuf, then: &str| {
        let path = path.display();
        format!(
            "chroot /node /usr/bin/python3 -c '
import fcntl, os, time
fcntl.flock(os.open(\"{path}\", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
{then}' 2>&1 || true"
        )
    };
    let locks = flock(
        data.join("lock"),
        "print(\"locked\", flush=True); time.sleep(1000)",
    );
    let mut config = shell("locks", &busybox(), &locks);
    config["mounts"] = json!([node(), volume(&data, &inside(&data))]);
    rig.daemon.create_started(&rig.id, &rig.pod, &config);
    logs::wait_for(&rig.pod.log("locks"), "locked");
    let tries = rig.container(
        "tries",
        &[
            node(),
            volume(&data, &inside(&data)),
            read_only(&data, &inside(&other)),
        ],
    );
    for name in [data.join("lock"), other.join("lock")] {
        let said = rig.sh(&tries, &flock(name, "print(\"free\")"));
        assert!(said.contains("BlockingIOError"), "{said}");
    }
}

#[test]
fn what_cannot_be_mounted_is_refused_and_leaves_nothing() {
    let rig = Rig::new("refused");
    let data = rig.directory("data");
    let fine = volume(&data, "/fine");
    for (mount, field) in [
        (
            json!({"host_path": "data", "container_path": "/x"}),
            "host_path",
        ),
        (
            json!({"host_path": data, "container_path": "x"}),
            "container_path",
        ),
        (
            json!({"host_path": "", "container_path": "/x"}),
            "host_path",
        ),
        (volume(&rig.path("missing"), "/x"), "host_path"),
        (volume(&data.join("../data"), "/x"), "host_path"),
        (volume(&data, "/proc"), "container_path"),
        (volume(&data, "/proc/sys/net"), "container_path"),
        (volume(&data, "/"), "container_path"),
        (
            json!({"host_path": data, "container_path": "/x", "propagation": 2}),
            "propagation",
        ),
        (
            json!({"host_path": data, "container_path": "/x", "recursive_read_only": true}),
            "recursive_read_only",
        ),
        (
            json!({"host_path": data, "container_path": "/x", "readonly": true,
                "recursive_read_only": true, "propagation": 1}),
            "recursive_read_only",
        ),
    ] {
        let said = rig.refused(&[fine.clone(), mount.clone()]);
        let path = format!("config.mounts[1].{field}: ");
        assert!(said.contains(&path), "{mount}: {said}");
    }
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
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

#[test]
fn volumes_outlive_the_daemon() {
    let mut rig = Rig::new("outlive");
    let data = rig.directory("data");
    let c = rig.container("c", &[volume(&data, "/v")]);
    let gone = rig.container("gone", &[volume(&data, "/v")]);
    rig.daemon.kill();
    // The pod works on without podvisord; whether it does is asked when podvisord is back.
    rig.daemon.restart();
    rig.sh(&c, "echo still >/v/there");
    assert_eq!(
        fs::read_to_string(data.join("there")).expect("there"),
        "still\n"
    );
    rig.daemon.crictl(&["rm", "-f", &gone]).ok();
    let later = rig.container("later", &[volume(&data, "/w")]);
    assert_eq!(rig.sh(&later, "cat /w/there"), "still");
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}

#[test]
fn a_container_can_be_created_again_when_the_server_died() {
    let rig = Rig::new("died");
    let data = rig.directory("data");
    fs::write(data.join("x"), "x").expect("writes");
    let c = rig.container("c", &[volume(&data, "/v")]);
    let server = rig.daemon.pod_resources().into_iter().find_map(|line| {
        let process = line.strip_prefix("process: ")?;
        let (pid, command) = process.split_once(' ')?;
        command
            .contains("podvisor-fs")
            .then(|| pid.parse().expect("a number"))
    });
    kill(Pid::from_raw(server.expect("it runs")), Signal::SIGKILL).expect("kills");
    // Nothing hangs.
    eventually("the volume says that it is gone", || {
        let said = rig.sh(&c, "cat /v/x 2>&1 || true");
        (said != "x").then_some(())
    });
    let again = rig.container("again", &[volume(&data, "/v")]);
    assert_eq!(rig.sh(&again, "cat /v/x; echo y >/v/y"), "x");
    assert_eq!(fs::read_to_string(data.join("y")).expect("there"), "y\n");
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
# Extended attributes.
os.setxattr("file", "user.a", b"value", os.XATTR_CREATE)
fails(errno.EEXIST, os.setxattr, "file", "user.a", b"x", os.XATTR_CREATE)
assert os.listxattr("file") == ["user.a"] and os.getxattr("file", "user.a") == b"value"
os.removexattr("file", "user.a")
fails(errno.ENODATA, os.getxattr, "file", "user.a")
os.setxattr("file", "user.kept", b"for the node")
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
    // Below the other one: the longer path comes later, whatever was asked first.
    let below = volume(&data, &format!("/node{inside}"));
    let c = rig.container("c", &[below, node()]);
    let script = format!("chroot /node /usr/bin/python3 {inside}/script {inside} 2>&1 || true");
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
    assert_eq!(
        rig.sh(&c, "for d in /v/*; do ls $d; done | wc -l"),
        "100000"
    );
}

#[test]
fn image_volumes() {
    let rig = Rig::new("image");
    let registry = Registry::shared();
    let name = registry.name("volume-image:1");
    let lower = Layer::new()
        .dir("dir")
        .file("dir/file", "lower")
        .file("only", "here");
    let upper = Layer::new()
        .dir("dir")
        .file("dir/file", "upper")
        .symlink("out", "/../../run/podvisor");
    registry.push("volume-image:1", &Image::busybox_and(vec![lower, upper]));
    rig.daemon.crictl(&["pull", &name]).ok();
    let image = |path: &str, sub: &str| json!({"image": {"image": name}, "container_path": path, "readonly": true, "image_sub_path": sub});
    let c = rig.container(
        "c",
        &[
            image("/all", ""),
            image("/dir", "dir"),
            image("/one", "dir/file"),
        ],
    );
    assert_eq!(
        rig.sh(&c, "cat /all/dir/file /all/only /dir/file /one"),
        "upperhereupperupper"
    );
    let said = rig.sh(
        &c,
        "echo x 2>&1 >/all/new || true; /all/bin/busybox echo runs",
    );
    assert!(
        said.contains("Read-only file system") && said.contains("runs"),
        "{said}"
    );
    let mounts = &rig.daemon.inspect(&c)["mounts"];
    let id = rig
        .daemon
        .crictl(&["images", "-q", "--no-trunc", &name])
        .ok();
    assert_eq!(mounts[0]["image"]["imageRef"], json!(id.trim()), "{mounts}");

    for (mount, problem) in [
        (image("/x", "missing"), "ImageVolumeMountFailed"),
        (image("/x", "out/hosts"), "ImageVolumeMountFailed"),
        (image("/x", "../dir"), "config.mounts[0].image_sub_path: "),
        (
            json!({"image": {"image": "no/such:image"}, "container_path": "/x", "readonly": true}),
            "ImageVolumeMountFailed",
        ),
        (
            json!({"image": {"image": name}, "container_path": "/x"}),
            "config.mounts[0].readonly: ",
        ),
    ] {
        let said = rig.refused(std::slice::from_ref(&mount));
        assert!(said.contains(problem), "{mount}: {said}");
    }
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}

/// A loop device, which is gone when it is dropped.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Self {
        let device =
            podvisor_tests::output_of(Command::new("losetup").args(["--find", "--show"]).arg(file));
        Self(device.trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn raw_block_devices() {
    let rig = Rig::new("block");
    let file = rig.path("disk");
    let mut content = vec![0; 8 << 20];
    content[..5].copy_from_slice(b"node\n");
    fs::write(&file, &content).expect("writes");
    let device = Loop::new(&file);
    let create = |name: &str, devices: Value| {
        let mut config = shell(name, &busybox(), WAITS);
        config["devices"] = devices;
        rig.daemon.try_create(&rig.id, &rig.pod, &config)
    };
    let c = create(
        "c",
        json!([
            {"host_path": device.0, "container_path": "/dev/raw", "permissions": "rwm"},
            {"host_path": device.0, "container_path": "/dev/sub/readonly", "permissions": "r"},
        ]),
    )
    .ok();
    let c = c.trim();
    rig.daemon.crictl(&["start", c]).ok();
    let size = "dd if=/dev/raw bs=1M 2>/dev/null | wc -c";
    assert_eq!(
        rig.sh(c, &format!("head -n 1 /dev/raw; {size}")),
        "node\n8388608"
    );
    rig.sh(
        c,
        "printf pod | dd of=/dev/raw bs=1 seek=4096 conv=fsync,notrunc 2>/dev/null",
    );
    let written = fs::read(&file).expect("reads");
    assert_eq!(&written[4096..4099], b"pod");
    let said = rig.sh(
        c,
        "dd if=/dev/zero of=/dev/sub/readonly bs=4k count=1 conv=fsync 2>&1 || true",
    );
    assert!(
        said.contains("error") || said.contains("not permitted"),
        "{said}"
    );
    // Free for others when the container is gone.
    rig.daemon.crictl(&["rm", "-f", c]).ok();
    nix::fcntl::open(
        Path::new(&device.0),
        nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_EXCL,
        nix::sys::stat::Mode::empty(),
    )
    .expect("nobody has it");

    for (wrong, field) in [
        (
            json!({"host_path": "/dev/missing", "container_path": "/dev/x"}),
            "host_path",
        ),
        (
            json!({"host_path": "/dev/null", "container_path": "/dev/x"}),
            "host_path",
        ),
        (
            json!({"host_path": device.0, "container_path": "x"}),
            "container_path",
        ),
        (
            json!({"host_path": device.0, "container_path": "/x", "permissions": "rx"}),
            "permissions",
        ),
    ] {
        let ran = create("refused", json!([wrong]));
        let path = format!("config.devices[0].{field}: ");
        assert!(
            ran.code != 0 && ran.stderr.contains(&path),
            "{wrong}: {}",
            ran.stderr
        );
    }
}
