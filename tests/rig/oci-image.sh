#!/bin/sh
# oci-image.sh ROOT OUT CONFIG: writes an OCI layout OUT with one image, tag "latest", whose one layer is the
# directory ROOT and whose `config` object is CONFIG. The same files give the same digests.
set -eu

root=$1 out=$2 config=$3
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
{"architecture":"amd64","os":"linux","config":$config,"rootfs":{"type":"layers","diff_ids":["$diff_id"]}}
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
