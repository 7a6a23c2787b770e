use super::*;

fn mount() -> cri::Mount {
    cri::Mount {
        container_path: "/data/".into(),
        host_path: "/var//lib/x/.".into(),
        ..Default::default()
    }
}

fn refused(change: impl FnOnce(&mut cri::Mount)) -> (Code, String) {
    let mut mounts = [mount(), mount()];
    change(&mut mounts[1]);
    let error = parse(&mounts, true, None).expect_err("refused");
    (error.code(), error.to_string())
}

#[test]
fn paths_lose_what_means_nothing() {
    let volumes = parse(&[mount()], true, None).expect("fine").host;
    assert_eq!(volumes[0].container_path, Path::new("/data"));
    assert_eq!(volumes[0].host_path, Path::new("/var/lib/x"));
    assert!(
        !volumes[0].read_only
            && !volumes[0].recursive
            && volumes[0].propagation == Propagation::Private
    );
}

#[test]
fn what_contradicts_the_cri_names_its_field() {
    let slave = cri::MountPropagation::PropagationHostToContainer as i32;
    type Change = Box<dyn FnOnce(&mut cri::Mount)>;
    let cases: [(&str, Change); 9] = [
        (
            "container_path",
            Box::new(|m| m.container_path = "data".into()),
        ),
        ("container_path", Box::new(|m| m.container_path.clear())),
        (
            "container_path",
            Box::new(|m| m.container_path = "/a/../b".into()),
        ),
        (
            "container_path",
            Box::new(|m| m.container_path = "/".into()),
        ),
        (
            "container_path",
            Box::new(|m| m.container_path = "/proc/sys".into()),
        ),
        ("host_path", Box::new(|m| m.host_path = "x".into())),
        (
            "host_path",
            Box::new(|m| m.host_path = "/x/../../etc".into()),
        ),
        (
            "recursive_read_only",
            Box::new(|m| m.recursive_read_only = true),
        ),
        (
            "recursive_read_only",
            Box::new(move |m| {
                m.recursive_read_only = true;
                m.readonly = true;
                m.propagation = slave;
            }),
        ),
    ];
    for (field, change) in cases {
        let (code, message) = refused(change);
        assert_eq!(code, Code::InvalidArgument, "{message}");
        let path = format!("config.mounts[1].{field}: ");
        assert!(message.starts_with(&path), "{message}");
    }
}

#[test]
fn a_vm_cannot_mount_on_the_host() {
    let shared = cri::MountPropagation::PropagationBidirectional as i32;
    let (code, message) = refused(|mount| mount.propagation = shared);
    assert_eq!(code, Code::FailedPrecondition);
    assert!(
        message.contains("config.mounts[1].propagation"),
        "{message}"
    );
}

#[test]
fn inner_mounts_come_after_outer_ones() {
    let paths = ["/a/b/c", "/a", "/z/y"];
    let mounts = paths.map(|path| cri::Mount {
        container_path: path.into(),
        ..mount()
    });
    let source = || Source {
        tree: std::fs::File::open("/").expect("root").into(),
        is_directory: true,
        writable_below: vec!["sub/mount".into()],
    };
    let volumes = parse(&mounts, true, None).expect("fine").host.into_iter();
    let volumes: Vec<_> = volumes.map(|volume| (volume, source())).collect();
    let mounts = spec_mounts("c0ffee", &volumes, &[]).expect("mounts");
    let destinations: Vec<_> = mounts.iter().map(Mount::destination).collect();
    assert_eq!(
        destinations,
        [
            Path::new("/a"),
            Path::new("/z/y"),
            Path::new("/a/b/c"),
            Path::new("/a/sub/mount"),
            Path::new("/z/y/sub/mount"),
            Path::new("/a/b/c/sub/mount"),
        ]
    );
    assert_eq!(mounts[0].source().as_deref(), Some(Path::new("c0ffee/1")));
    let below = Path::new("c0ffee/1/sub/mount");
    assert_eq!(mounts[3].source().as_deref(), Some(below));
}
