#!/bin/bash
# conformance-images.sh DIR HOST:PORT: makes stand-ins for the images that critest names, in DIR, and pushes
# them to a registry on loopback. podvisord looks there for the images of any registry.
set -euo pipefail

rig=$(cd "$(dirname "$0")" && pwd)
dir=$1 registry=$2
mkdir -p "$dir"
cd "$dir"
environment='"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]'

# push LAYOUT NAME:TAG…: copies an image to the registry under each of the names.
push() {
	local layout=$1 name
	shift
	for name; do "$rig/push.sh" "$layout:latest" "$registry/$name"; done
}

# variant LAYOUT CONFIG [FILE…]: the busybox image with another `config` object and empty files in its root.
variant() {
	local layout=$1 config=$2 file
	shift 2
	rm -rf variant
	cp -a root variant
	for file; do echo "$layout" >"variant/$file"; done
	"$rig/oci-image.sh" variant "$layout" "{$environment,$config}"
}

# program NAME SOURCE: a static program in root-NAME.
program() {
	mkdir -p "root-$1"
	gcc -static -Os -o "root-$1/$1" -x c - <<<"$2"
}

# The root file system that most images share.
busybox=$("$rig/busybox-source.sh")
"$rig/busybox-image.sh" busybox "$busybox"
rm -rf root
mkdir root
layer=$(grep -o '"layers":\[{"mediaType":"[^"]*","digest":"sha256:[0-9a-f]*' busybox/blobs/sha256/* | sed 's/.*sha256://')
tar -C root -xf "busybox/blobs/sha256/$layer"
push busybox e2e-test-images/busybox:1.29-2

# nginx: Debian's.
packages=$("$rig/nginx-packages.sh")
rm -rf root-nginx
cp -a root root-nginx
cp -a "$packages/usr/sbin/nginx" root-nginx/bin/
cp -aL "$packages/lib" "$packages/lib64" root-nginx/ 2>/dev/null || true
mkdir -p root-nginx/{etc/nginx,usr/lib,var/lib/nginx,var/log/nginx,var/run,var/www,run}
cp -a "$packages/usr/lib/x86_64-linux-gnu" root-nginx/usr/lib/
rm -rf root-nginx/lib/x86_64-linux-gnu/gconv root-nginx/usr/lib/x86_64-linux-gnu/gconv
echo 'Welcome to nginx!' >root-nginx/var/www/index.html
cat >root-nginx/etc/nginx/nginx.conf <<-END
	user root;
	pid /var/run/nginx.pid;
	error_log /dev/stderr;
	events {}
	http {
	  access_log off;
	  server { listen 80; root /var/www; }
	}
END
"$rig/oci-image.sh" root-nginx nginx "{$environment,\"Cmd\":[\"nginx\",\"-g\",\"daemon off;\"]}"
push nginx e2e-test-images/nginx:1.14-2
# On the node's own network, where port 80 may be taken.
sed -i 's/listen 80;/listen 12003;/' root-nginx/etc/nginx/nginx.conf
"$rig/oci-image.sh" root-nginx hostnet-nginx "{$environment,\"Cmd\":[\"nginx\",\"-g\",\"daemon off;\"]}"
push hostnet-nginx "k8s-staging-cri-tools/hostnet-nginx-$(dpkg --print-architecture):latest"

variant httpd '"Cmd":["sh","-c","echo httpd is up; exec httpd -f -p 80"]' index.html
push httpd e2e-test-images/httpd:2.4.39-4

program nnp '#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\n", geteuid()); return 0; }'
chmod 4755 root-nnp/nnp
"$rig/oci-image.sh" root-nnp nonewprivs '{"Entrypoint":["/nnp"]}'
push nonewprivs e2e-test-images/nonewprivs:1.3

program pause '#include <unistd.h>
int main(void) { for (;;) pause(); }'
"$rig/oci-image.sh" root-pause pause '{"Entrypoint":["/pause"]}'
push pause pause:3.9

staging=k8s-staging-cri-tools/test-image
for user in uid=1002 username=www-data uid-group=1003:33 username-group=www-data:www-data; do
	variant "user-${user%=*}" "\"Cmd\":[\"sh\"],\"User\":\"${user#*=}\""
	push "user-${user%=*}" "$staging-user-${user%=*}:latest"
done
cp -a root/etc/passwd root/etc/group .
cat >root/etc/passwd <<-END
	root:x:0:0:root:/root:/bin/sh
	default-user:x:1000:1000::/home/user:/bin/sh
END
cat >root/etc/group <<-END
	root:x:0:
	default-user:x:1000:
	group-defined-in-image:x:50000:default-user
END
variant predefined-group '"Cmd":["sh"],"User":"1000"'
push predefined-group "$staging-predefined-group:latest"
mv passwd group root/etc/
for name in latest tag 1 2 3 tags; do variant "image-$name" '"Cmd":["sh"]' "is-$name"; done
push image-latest "$staging-latest:latest"
push image-tag "$staging-tag:test" "$staging-tag:all"
for name in 1 2 3; do push "image-$name" "$staging-$name:latest"; done
push image-tags "$staging-tags:1" "$staging-tags:2" "$staging-tags:3"
