#!/bin/sh
# Prints the paths of the upstream api.proto files that ours is compared with, one a line: the
# newest release, and the first version with CheckpointPod and RestorePod.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
for version in v0.36 v0.38; do
    cd "$here/cri-api/$version"
    go mod download k8s.io/cri-api >&2
    echo "$(go list -m -f '{{.Dir}}' k8s.io/cri-api)/pkg/apis/runtime/v1/api.proto"
done
