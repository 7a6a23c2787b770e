#!/bin/bash
# kernel.sh: fetches the kernel of the nested host, Debian's linux-image-cloud-amd64, once, into
# target/nested-host. Prints the directory: vmlinuz and lib/modules/VERSION.
#
# Unpacked, not installed: installing it would make it the kernel that a developer's machine boots
# next, and brings initramfs-tools.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$here/../../../target/nested-host
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
kernel=$cache/kernel

# Several may ask at the same time: one fetches, the others wait for it.
exec 9>"$cache/.kernel.lock"
flock 9
if [ ! -e "$kernel/vmlinuz" ]; then
	package() {
		apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p'
	}
	[ -n "$(package)" ] || apt-get update -qq
	echo "nested-host: fetching $(package)" >&2
	rm -rf "$kernel" "$kernel.new"
	mkdir "$kernel.new"
	cd "$kernel.new"
	# As this user: apt's own may not write here.
	apt-get download -qq -o APT::Sandbox::User= "$(package)"
	dpkg-deb --fsys-tarfile ./*.deb | tar -x ./lib ./boot
	rm ./*.deb
	mv boot/vmlinuz-* vmlinuz
	rm -r boot
	depmod --basedir "$PWD" "$(ls lib/modules)"
	mv "$kernel.new" "$kernel"
fi
echo "$kernel"
