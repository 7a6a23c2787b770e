#!/bin/sh
# nginx-packages.sh: Debian's nginx with the libraries that it needs, unpacked into target/tools/nginx, once; not
# installed. Prints its path.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
tools=$here/../../target/tools
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)
exec 9>"$tools/.nginx.lock"
flock 9
if [ ! -e "$tools/nginx" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    apt-get -qq -o APT::Sandbox::User=root download nginx libpcre2-8-0 libcrypt1 libssl3 zlib1g libc6 >&2
    rm -rf "$tools/nginx.new"
    for package in *.deb; do dpkg -x "$package" "$tools/nginx.new"; done
    mv "$tools/nginx.new" "$tools/nginx"
fi
echo "$tools/nginx"
