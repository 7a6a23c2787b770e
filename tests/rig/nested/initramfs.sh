#!/bin/bash
# initramfs.sh KERNEL: makes the initramfs of the nested host for a kernel of kernel.sh: busybox,
# init, and the modules that reach the root file system. Prints its path.
set -euo pipefail

kernel=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=$(ls "$kernel/lib/modules")
busybox=$(command -v busybox)

# modprobe's own order: what a module needs comes before it.
modules() {
	local module
	for module in virtio_pci virtiofs overlay; do
		modprobe --dirname "$kernel" --set-version "$version" --show-depends "$module"
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

mapfile -t files < <(modules)
key=$(cat "${BASH_SOURCE[0]}" "$here/init" "$busybox" "${files[@]}" | sha256sum | cut -c1-16)
initramfs=$kernel/initramfs-$key.cpio
if [ ! -e "$initramfs" ]; then
	root=$(mktemp -d)
	trap 'rm -rf "$root"' EXIT
	mkdir "$root"/{bin,dev,proc,sys,modules,share,upper,root}
	install -m 755 "$busybox" "$root/bin/busybox"
	install -m 755 "$here/init" "$root/init"
	for i in "${!files[@]}"; do
		install -m 644 "${files[i]}" "$root/modules/$(printf %02d "$i")-$(basename "${files[i]}")"
	done
	rm -f "$kernel"/initramfs-*.cpio
	(cd "$root" && find . -mindepth 1 -printf '%P\0' | sort -z |
		cpio --null --create --format=newc --owner=+0:+0 --quiet) >"$initramfs.$$"
	mv "$initramfs.$$" "$initramfs"
fi
echo "$initramfs"
