#!/bin/sh
# busybox-source.sh: builds a static busybox from Debian's source package, into target/tools, once. Prints
# its path. Unlike Debian's binary it executes itself anew for each applet, so that what a container may
# not execute or read shows, and it has ipcs.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=$here/../../target/tools
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)
exec 9>"$tools/.busybox.lock"
flock 9
if [ ! -x "$tools/busybox" ]; then
    echo "building busybox (about 30 s, once)" >&2
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    # The machine's own sources, as sources of source packages.
    mkdir lists
    sed 's/^Types: .*/Types: deb-src/' /etc/apt/sources.list.d/debian.sources >source.sources
    apt="-qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$work/parts -o Dir::State::lists=$work/lists -o APT::Sandbox::User=root"
    mkdir parts
    mv source.sources parts/
    # shellcheck disable=SC2086 # words they are
    apt-get $apt update >&2
    # shellcheck disable=SC2086
    apt-get $apt source busybox >&2
    cd busybox-*/
    make -s defconfig >/dev/null
    for option in FEATURE_SH_STANDALONE FEATURE_SH_NOFORK FEATURE_PREFER_APPLETS TC; do
        sed -i "s/^CONFIG_$option=y/# CONFIG_$option is not set/" .config
    done
    sed -i 's/^# CONFIG_STATIC is not set/CONFIG_STATIC=y/' .config
    yes '' | make -s oldconfig >/dev/null
    make -s -j"$(nproc)" busybox >&2
    install -m 755 busybox "$tools/busybox.new"
    mv "$tools/busybox.new" "$tools/busybox"
fi
echo "$tools/busybox"
