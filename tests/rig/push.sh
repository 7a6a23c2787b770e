#!/bin/sh
# push.sh LAYOUT[:TAG] HOST:PORT/NAME:TAG [skopeo options…]: copies an image from an OCI layout to a
# registry on loopback, all bytes as they are: an index with all its images, layers not recompressed.
set -eu

layout=$1 destination=$2
shift 2
exec skopeo copy --quiet --insecure-policy --all --preserve-digests --dest-tls-verify=false "$@" \
    "oci:$layout" "docker://$destination"
