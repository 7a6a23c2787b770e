#!/bin/sh
# registry.sh DIR [PORT [USER PASSWORD]]: becomes Debian's docker-registry on 127.0.0.1, its storage,
# configuration and log in DIR, with basic auth if a user is given. Port 0, the default: a free one.
# With $TLS_CERTIFICATE, $TLS_KEY and $TLS_CLIENT_CA (PEM files): TLS, for clients with a certificate of that authority.
# Prints HOST:PORT, one line, when it listens.
set -eu

dir=$1 port=${2:-0} user=${3:-} password=${4:-}
mkdir -p "$dir/storage"

cat >"$dir/config.yml" <<EOF
version: 0.1
log: {accesslog: {disabled: true}, level: info}
storage:
  filesystem: {rootdirectory: "$dir/storage"}
  delete: {enabled: true}
http:
  addr: "127.0.0.1:$port"
  secret: "not a secret"
EOF
if [ -n "${TLS_CERTIFICATE:-}" ]; then
    echo "  tls: {certificate: \"$TLS_CERTIFICATE\", key: \"$TLS_KEY\", clientcas: [\"$TLS_CLIENT_CA\"]}" >>"$dir/config.yml"
fi
if [ -n "$user" ]; then
    # The registry accepts bcrypt alone; perl is on every Debian, htpasswd is not.
    hash=$(PASSWORD=$password perl -e 'print crypt($ENV{PASSWORD}, q($2y$05$abcdefghijklmnopqrstuu))')
    echo "$user:$hash" >"$dir/htpasswd"
    echo "auth: {htpasswd: {realm: test, path: \"$dir/htpasswd\"}}" >>"$dir/config.yml"
fi

# Its log tells the port: pass that on, keep the rest. A fifo, because this process becomes the
# registry, so that the caller's child is the registry itself.
fifo=$dir/log.fifo
rm -f "$fifo"
mkfifo "$fifo"
while read -r line; do
    echo "$line" >&3
    case $line in
    *"listening on 127.0.0.1:"*) echo "$line" | sed -E 's/.*listening on ([0-9.:]+).*/\1/'; exec >&3 ;;
    esac
done <"$fifo" 3>"$dir/registry.log" &
exec docker-registry serve "$dir/config.yml" >"$fifo" 2>&1
