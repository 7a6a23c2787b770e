//! Capabilities of the calling thread (capabilities(7)).

use nix::errno::Errno;

use crate::oci::{Capabilities, Capability};

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h): sets of 64 bits in two halves.
const VERSION: u32 = 0x2008_0522;

/// linux/capability.h, `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// linux/capability.h, `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Reduces all sets to what the spec says.
pub fn restrict(spec: &Capabilities) -> nix::Result<()> {
    let (bounding, ambient) = (bits(&spec.bounding), bits(&spec.ambient));
    // A change of user has taken the effective set away, and the bounding set shrinks only with
    // CAP_SETPCAP.
    raise_permitted()?;
    for_each(|capability| {
        if bounding & bit(capability) == 0 {
            prctl(libc::PR_CAPBSET_DROP, capability, 0)?;
        }
        Ok(())
    })?;
    set(
        bits(&spec.effective),
        bits(&spec.permitted),
        bits(&spec.inheritable),
    )?;
    for_each(|capability| {
        if ambient & bit(capability) != 0 {
            let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
            prctl(libc::PR_CAP_AMBIENT, raise, capability)?;
        }
        Ok(())
    })
}

/// Calls `work` for each capability that the kernel knows.
fn for_each(mut work: impl FnMut(libc::c_ulong) -> nix::Result<()>) -> nix::Result<()> {
    for capability in 0..u64::BITS as libc::c_ulong {
        match prctl(libc::PR_CAPBSET_READ, capability, 0) {
            Err(Errno::EINVAL) => break,
            read => read.and_then(|()| work(capability))?,
        }
    }
    Ok(())
}

fn raise_permitted() -> nix::Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut halves = [Half::default(); 2];
    // SAFETY: a header and room for as many halves as its version has.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw const header, &raw mut halves) })?;
    for half in &mut halves {
        half.effective = half.permitted;
    }
    write(&halves)
}

fn set(effective: u64, permitted: u64, inheritable: u64) -> nix::Result<()> {
    write(&[0, 32].map(|shift| Half {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: (inheritable >> shift) as u32,
    }))
}

fn write(halves: &[Half; 2]) -> nix::Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    // SAFETY: a header and as many halves as its version has.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) };
    Errno::result(result).map(drop)
}

fn prctl(operation: libc::c_int, first: libc::c_ulong, second: libc::c_ulong) -> nix::Result<()> {
    // SAFETY: numbers.
    let result = unsafe { libc::prctl(operation, first, second, 0, 0) };
    Errno::result(result).map(drop)
}

fn bits(set: &[Capability]) -> u64 {
    set.iter().fold(0, |bits, capability| {
        bits | bit(*capability as libc::c_ulong)
    })
}

const fn bit(capability: libc::c_ulong) -> u64 {
    1 << capability
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_the_kernels_numbers() {
        let set: Vec<Capability> =
            serde_json::from_str(r#"["CAP_CHOWN", "CAP_SETFCAP", "CAP_BPF"]"#).unwrap();
        assert_eq!(bits(&set), 1 | 1 << 31 | 1 << 39);
    }

    #[test]
    fn sets_shrink_to_what_is_named() {
        let (one, two) = (Capability::CapChown, Capability::CapBpf);
        let spec = Capabilities {
            bounding: vec![one, two],
            permitted: vec![one, two],
            effective: vec![one],
            inheritable: vec![one],
            ambient: vec![one],
        };
        // Of a thread of its own: what is gone does not come back.
        let status = std::thread::spawn(move || {
            restrict(&spec).unwrap();
            std::fs::read_to_string("/proc/thread-self/status").unwrap()
        })
        .join()
        .unwrap();
        for (set, expected) in [
            ("CapInh", "0000000000000001"),
            ("CapPrm", "0000008000000001"),
            ("CapEff", "0000000000000001"),
            ("CapBnd", "0000008000000001"),
            ("CapAmb", "0000000000000001"),
        ] {
            assert!(
                status.contains(&format!("{set}:\t{expected}\n")),
                "{status}"
            );
        }
    }
}
