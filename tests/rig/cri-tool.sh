#!/bin/sh
# cri-tool.sh crictl|critest|ginkgo: builds that program from the Go module that crictl/go.mod or critest/go.mod
# pins, once per content of that module, into target/tools. Prints the path of the binary.
set -eu

name=$1
case $name in
crictl) module=crictl build=build package=sigs.k8s.io/cri-tools/cmd/crictl ;;
critest) module=critest build='test -c' package=sigs.k8s.io/cri-tools/cmd/critest ;; # a package of tests
ginkgo) module=critest build=build package=github.com/onsi/ginkgo/v2/ginkgo ;; # runs critest in parallel
*) echo "usage: cri-tool.sh crictl|critest|ginkgo" >&2; exit 2 ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
tools=$here/../../target/tools
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)
key=$( (cat "$0" "$here/$module/go.mod" "$here/$module/go.sum"; go version) | sha256sum | cut -c1-16)

# Test binaries may ask at the same time: one builds, the others wait for it.
exec 9>"$tools/.$name.lock"
flock 9
if [ ! -x "$tools/$name-$key" ]; then
    echo "building $name (about 45 s, once)" >&2
    # Static and without symbols, as cri-tools releases them; so the compiler need not write DWARF either.
    # shellcheck disable=SC2086 # two words
    (cd "$here/$module" && CGO_ENABLED=0 go $build -trimpath -gcflags=all=-dwarf=false -ldflags '-s -w' -o "$tools/$name-$key.new" "$package") >&2
    rm -f "$tools/$name"-????????????????
    mv "$tools/$name-$key.new" "$tools/$name-$key"
fi
ln -sfn "$name-$key" "$tools/$name"
echo "$tools/$name-$key"
