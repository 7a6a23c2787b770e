#!/bin/sh
# busybox-image.sh DIR: writes an OCI layout with a busybox image, tag "latest", made of Debian's
# busybox-static and nothing else. The same busybox gives the same digests.
set -eu

out=$1
busybox=$(command -v busybox)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

for dir in bin etc root home/user var/www dev proc sys; do mkdir -p "$root/$dir"; done
mkdir -m 1777 "$root/tmp"
install -m 755 "$busybox" "$root/bin/busybox"
# Only names that are a path of one component: "[" is one of them.
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
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

rm -rf "$out"
mkdir -p "$out/blobs/sha256"
# blob FILE: moves it into the layout, prints "DIGEST SIZE".
blob() {
    digest=$(sha256sum "$1" | cut -d' ' -f1)
    size=$(stat -c %s "$1")
    mv "$1" "$out/blobs/sha256/$digest"
    echo "sha256:$digest $size"
}

tar --sort=name --mtime=@0 --numeric-owner --format=gnu -C "$root" -cf "$out/layer.tar" .
diff_id=sha256:$(sha256sum "$out/layer.tar" | cut -d' ' -f1)
gzip -n "$out/layer.tar"
read -r layer layer_size <<EOF
$(blob "$out/layer.tar.gz")
EOF

cat >"$out/config" <<EOF
{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":["$diff_id"]}}
EOF
read -r config config_size <<EOF
$(blob "$out/config")
EOF

cat >"$out/manifest" <<EOF
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"$config","size":$config_size},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"$layer","size":$layer_size}]}
EOF
read -r manifest manifest_size <<EOF
$(blob "$out/manifest")
EOF

echo '{"imageLayoutVersion":"1.0.0"}' >"$out/oci-layout"
cat >"$out/index.json" <<EOF
{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"$manifest","size":$manifest_size,"annotations":{"org.opencontainers.image.ref.name":"latest"}}]}
EOF
