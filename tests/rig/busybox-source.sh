#!/bin/sh
# busybox-source.sh: builds a static busybox from Debian's source package, into target/tools, once per content of
# this script, by a name under which nothing else finds it. Prints its path. Unlike Debian's binary it executes
# itself anew for each applet, so that what a container may not execute or read shows, and it has ipcs.
set -eu

# What critest and our stand-ins for its images run, and what helps to look into one. All of busybox takes two minutes.
applets="BUSYBOX ASH SH_IS_ASH BRCTL CAT CHMOD CHOWN DATE DD DF DMESG ECHO ENV FALSE GREP HEAD HOSTNAME HTTPD ID IP IPCS KILL LN LS
MKDIR MKNOD MOUNT MV NETSTAT NSLOOKUP PGREP PIDOF PING PING6 PRINTF PS PWD RM SED SLEEP STAT TAIL TEST TEST1 TOP TOUCH
TRUE UMOUNT UNAME WC WGET WHOAMI"

here=$(cd "$(dirname "$0")" && pwd)
tools=$here/../../target/tools
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)
busybox=$tools/critest-busybox-$(sha256sum <"$0" | cut -c1-16)
exec 9>"$tools/.busybox.lock"
flock 9
if [ ! -x "$busybox" ]; then
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
    {
        echo FEATURE_SH_STANDALONE FEATURE_SH_NOFORK FEATURE_PREFER_APPLETS | tr ' ' '\n'
        grep -rhoE --include='*.c' '^//applet:IF_[A-Z0-9_]+' . | sed 's/.*:IF_//' |
            grep -vxF "$(echo "$applets" | tr ' ' '\n')"
    } | sed 's/.*/s,^CONFIG_&=y,# CONFIG_& is not set,/' >unwanted.sed
    sed -i -f unwanted.sed -e 's/^# CONFIG_STATIC is not set/CONFIG_STATIC=y/' .config
    yes '' | make -s oldconfig >/dev/null
    make -s -j"$(nproc)" EXTRA_CFLAGS=-w busybox >&2
    rm -f "$tools"/critest-busybox*
    install -m 755 busybox "$busybox.new"
    mv "$busybox.new" "$busybox"
fi
echo "$busybox"
