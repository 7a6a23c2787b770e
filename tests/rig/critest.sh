#!/bin/sh
# Builds critest from the Go module that critest/go.mod pins, once per content of that module, into
# target/tools. Prints the path of the binary.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=$here/../../target/tools
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)
key=$( (cat "$here/critest/go.mod" "$here/critest/go.sum"; go version) | sha256sum | cut -c1-16)
exec 9>"$tools/.critest.lock"
flock 9
if [ ! -x "$tools/critest-$key" ]; then
    echo "building critest (about 45 s, once)" >&2
    (cd "$here/critest" && go test -c -trimpath -o "$tools/critest-$key.new" sigs.k8s.io/cri-tools/cmd/critest) >&2
    rm -f "$tools"/critest-????????????????
    mv "$tools/critest-$key.new" "$tools/critest-$key"
fi
echo "$tools/critest-$key"
