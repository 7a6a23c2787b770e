# The targets of podvisor. The work is in scripts/, guest-image/ and tests/.

help:                ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t16

build:               ## everything: target/release/podvisor* and target/guest/
	+@$(MAKE) --no-print-directory -j3 kernel initramfs binaries
	install -m 755 -t target/release target/x86_64-unknown-linux-gnu/pod/podvisor-monitor target/x86_64-unknown-linux-gnu/pod/podvisor-fs

image:               ## what a pod's VM boots: target/guest/{vmlinux,bzImage,initramfs.cpio}
	+@$(MAKE) --no-print-directory -j2 kernel initramfs

# All at once, for what cargo builds ends with minutes of one linker; the kernel, which keeps all CPUs busy to its
# end, gives way. None is to count jobs with the others, or to be compiled by clippy, which optimises less (.ci/run).
kernel:
	MAKEFLAGS= nice guest-image/build $@
initramfs:
	MAKEFLAGS= RUSTC_WORKSPACE_WRAPPER= guest-image/build $@
binaries:
	MAKEFLAGS= RUSTC_WORKSPACE_WRAPPER= cargo build --locked --release -p podvisor-daemon -p podvisor-cli

run:                 ## try it: install, build, a daemon, a registry, a first pod
	scripts/run

test: build          ## unit, property and end-to-end tests (as root), critest, then the tests of VMs on real KVM
	RUST_TEST_THREADS=$$(($$(nproc) + 1)) cargo test --locked --workspace --tests --no-fail-fast
	scripts/conformance
	scripts/test-kvm

conformance: build   ## critest against podvisord on QEMU, for each handler; skipped: tests/rig/critest/skipped
	scripts/conformance

lint:                ## formatting, clippy, dependencies, shell scripts
	scripts/lint

fuzz:                ## hostile drivers against each virtio device, hostile clients of streams, MINUTES (10) each, with a nightly compiler
	scripts/fuzz $(or $(MINUTES),10)

bench: build         ## costs of a pod by phase: on QEMU, on the node beside containerd, on KVM in the nested host
	scripts/bench
	scripts/bench-handlers
	scripts/bench-streams
	scripts/bench-kvm

instructions:        ## what each virtio device takes for a request, counted by valgrind
	scripts/instructions

install: build       ## binaries, guest image and, if there is none, a configuration, below DESTDIR
	install -D -t $(DESTDIR)/usr/bin target/release/podvisord target/release/podvisor-monitor target/release/podvisor-fs target/release/podvisor
	install -D -m 644 -t $(DESTDIR)/usr/lib/podvisor target/guest/vmlinux target/guest/initramfs.cpio
	[ -e $(DESTDIR)/etc/podvisor/config.toml ] || install -D -m 644 -t $(DESTDIR)/etc/podvisor runtime/node/config.toml

deps:                ## Debian packages needed to build, run and test (as root)
	scripts/install-deps

.PHONY: help build image kernel initramfs binaries run test conformance lint fuzz bench instructions install deps
