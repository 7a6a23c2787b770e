#!/bin/sh
# busybox-image.sh DIR [BUSYBOX]: writes an OCI layout with a busybox image, tag "latest", made of Debian's
# busybox-static, or another one, and nothing else. The same busybox gives the same digests.
set -eu

out=$1
busybox=${2:-$(command -v busybox)}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

for dir in bin etc root home/user var/www dev proc sys; do mkdir -p "$root/$dir"; done
mkdir -m 1777 "$root/tmp"
install -m 755 "$busybox" "$root/bin/busybox"
# Hard links, as in the images that people use: who masks one applet does not mask the others.
"$root/bin/busybox" --install "$root/bin"
cat >"$root/etc/passwd" <<EOF
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/sh
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
EOF
cat >"$root/etc/group" <<EOF
root:x:0:
www-data:x:33:
user:x:1000:
extra:x:50000:user
nogroup:x:65534:
EOF
chown 1000:1000 "$root/home/user"

"$(dirname "$0")/oci-image.sh" "$root" "$out" \
    '{"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"Cmd":["sh"]}'
