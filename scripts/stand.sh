# Sourced by the scripts that need a registry and a podvisord of their own, all in the directory
# $work, which is made and entered. What was started ends, newest first, when the script does.
# shellcheck shell=bash
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rig=$repository/tests/rig
release=${PODVISOR_BIN_DIR:-$repository/target/release}
name=$(basename "$0")
: "${work:=$repository/target/$name}"

[ "$(id -u)" -eq 0 ] || { echo "$name: needs root: namespaces, taps and cgroups" >&2; exit 1; }

# Process ids, newest last.
children=()
end_children() {
	trap - INT TERM EXIT
	local i
	for ((i = ${#children[@]} - 1; i >= 0; i--)); do
		kill "${children[i]}" 2>/dev/null || true
		wait "${children[i]}" 2>/dev/null || true
	done
}
trap end_children EXIT
trap 'exit 130' INT TERM

mkdir -p "$work"
cd "$work"

# start NAME PATTERN COMMAND…: runs a daemon, its log in NAME.log, and waits until the log has a line
# like PATTERN. It has a session of its own, so that Ctrl-C reaches this script, which may still
# need the daemon, and not the daemon.
start() {
	local name=$1 pattern=$2 line fd
	shift 2
	rm -f "$name.fifo"
	mkfifo "$name.fifo"
	setsid "$@" 2>"$name.fifo" &
	children+=($!)
	exec {fd}<"$name.fifo"
	: >"$name.log"
	while IFS= read -r -t 60 line <&"$fd"; do
		printf '%s\n' "$line" >>"$name.log"
		# shellcheck disable=SC2254 # a pattern it is
		case $line in $pattern) cat <&"$fd" >>"$name.log" & return ;; esac
	done
	cat "$name.log" >&2
	echo "$name did not start" >&2
	exit 1
}

# start_registry: on a free port of loopback, with the image "busybox", and as the place where
# podvisord and containerd look for the images of any registry. Sets $registry to HOST:PORT.
start_registry() {
	local fd
	exec {fd}< <(exec setsid "$rig/registry.sh" "$work/registry")
	children+=($!)
	read -r registry <&"$fd"
	[ -e busybox/index.json ] || "$rig/busybox-image.sh" busybox
	"$rig/push.sh" busybox:latest "$registry/library/busybox:latest"
	mkdir -p certs.d/_default
	cat >certs.d/_default/hosts.toml <<-END
		server = "http://$registry"
		[host."http://$registry"]
		capabilities = ["pull", "resolve"]
	END
}

# start_podvisord OCTET [NAME [LINE]]: the pods' network is the bridge podvisor-OCTET with 10.OCTET.0.0/24; the
# configuration file is config.toml, with LINE in it. A second podvisord has a NAME, and all its files in a directory
# of that name.
start_podvisord() {
	local octet=$1 dir=$work${2:+/$2} line=${3:-}
	"$rig/cni.sh" "$dir/cni" "podvisor-$octet" "$octet"
	cat >"$dir/config.toml" <<-END
		run_dir = "$dir/run"
		data_dir = "$dir/data"
		$line
		[vm]
		guest_dir = "$repository/target/guest"
		[network]
		conf_dir = "$dir/cni/net.d"
		[image]
		certs_dir = "$work/certs.d"
		[cgroup]
		parent = "/podvisor-$octet"
	END
	start "${2:-podvisord}" '*ready*' "$release/podvisord" --config "$dir/config.toml"
}

# start_containerd OCTET: Debian's, with the images of the registry and 10.OCTET.0.0/24; all its files in containerd/.
start_containerd() {
	local octet=$1
	"$rig/cni.sh" "$work/containerd/cni" "podvisor-$octet" "$octet"
	cat >containerd.toml <<-END
		version = 2
		root = "$work/containerd/root"
		state = "$work/containerd/state"
		[grpc]
		address = "$work/containerd/containerd.sock"
		[plugins."io.containerd.grpc.v1.cri"]
		sandbox_image = "registry.k8s.io/pause:3.9"
		restrict_oom_score_adj = true
		[plugins."io.containerd.grpc.v1.cri".cni]
		bin_dir = "/usr/lib/cni"
		conf_dir = "$work/containerd/cni/net.d"
		[plugins."io.containerd.grpc.v1.cri".registry]
		config_path = "$work/certs.d"
	END
	start containerd '*"containerd successfully booted'* containerd --config containerd.toml
}
