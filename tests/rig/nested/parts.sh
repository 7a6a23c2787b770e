#!/bin/bash
# parts.sh: fetches what the nested host is made of, once, and prints the directory (in target/):
#
#   kernel/vmlinuz, kernel/lib/modules   Debian's linux-image-cloud-amd64
#   qemu/                                QEMU of Debian's backports
#
# Unpacked, not installed: an installed kernel is the one that a developer's machine boots next. And
# Debian 12's own QEMU, 7.2, hangs the machine now and then: a CPU runs its old translation of a
# kernel instruction that another CPU has patched, for ever. KVM patches when the first VM of a
# machine is made and when the last one ends. QEMU 8.1 and later lock a page while they translate it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
parts=$here/../../../target/nested-host
mkdir -p "$parts"
parts=$(cd "$parts" && pwd)

# fetch DIRECTORY "APT OPTIONS" PACKAGE…: unpacks packages into a new directory and enters it.
fetch() {
	local directory=$1 options=$2 package
	shift 2
	echo "nested-host: fetching $*" >&2
	rm -rf "$directory"
	mkdir "$directory"
	cd "$directory"
	# As this user: apt's own may not write here.
	# shellcheck disable=SC2086 # several words
	apt-get download -qq -o APT::Sandbox::User= $options "$@"
	for package in *.deb; do dpkg-deb --extract "$package" .; done
	rm ./*.deb
}

# The package that the kernel's metapackage stands for.
kernel_package() {
	apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p'
}

fetch_kernel() {
	[ -n "$(kernel_package)" ] || apt-get update -qq
	fetch "$parts/kernel.new" '' "$(kernel_package)"
	mv boot/vmlinuz-* vmlinuz
	depmod --basedir "$PWD" "$(ls lib/modules)"
	mv "$PWD" "$parts/kernel"
}

# From backports, without making them one of the machine's own sources.
fetch_qemu() {
	local mirror options apt=$parts/apt
	# shellcheck disable=SC2016 # apt's
	mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' | awk '$2 == "bookworm" { print $1; exit }')
	mkdir -p "$apt"/{lists,cache/archives}/partial
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm-backports main" >"$apt/sources.list"
	options="-o Dir::Etc::sourcelist=$apt/sources.list -o Dir::Etc::sourceparts=/dev/null
		-o Dir::State::lists=$apt/lists -o Dir::Cache=$apt/cache -o APT::Default-Release=bookworm-backports"
	# shellcheck disable=SC2086 # several words
	apt-get update -qq -o APT::Sandbox::User= $options
	fetch "$parts/qemu.new" "$options" qemu-system-x86 qemu-system-data
	mv "$PWD" "$parts/qemu"
}

# Several may ask at the same time: one fetches, the others wait for it.
exec 9>"$parts/.lock"
flock 9
[ -e "$parts/kernel" ] || (fetch_kernel)
[ -e "$parts/qemu" ] || (fetch_qemu)
echo "$parts"
