#!/bin/sh
# Builds crictl from the Go module that crictl/go.mod pins, once per content of that module, into
# target/tools. Prints the path of the binary.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=$here/../../target/tools
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)
key=$( (cat "$here/crictl/go.mod" "$here/crictl/go.sum"; go version) | sha256sum | cut -c1-16)

# Test binaries may ask at the same time: one builds, the others wait for it.
exec 9>"$tools/.crictl.lock"
flock 9
if [ ! -x "$tools/crictl-$key" ]; then
    echo "building crictl (about 45 s, once)" >&2
    (cd "$here/crictl" && go build -trimpath -o "$tools/crictl-$key.new" sigs.k8s.io/cri-tools/cmd/crictl) >&2
    rm -f "$tools"/crictl-????????????????
    mv "$tools/crictl-$key.new" "$tools/crictl-$key"
fi
ln -sfn "crictl-$key" "$tools/crictl"
echo "$tools/crictl"
