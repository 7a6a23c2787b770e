#!/bin/sh
# cni.sh DIR NAME OCTET [bridge]: writes a conflist to DIR/net.d as nodes have it, its plugins Debian's: a
# bridge NAME with 10.OCTET.0.0/24 and fd00:OCTET::/64 that masquerades, portmap and bandwidth; or the bridge
# alone. Addresses are kept in DIR/ipam. Each daemon of a machine needs its own NAME (at most 15 bytes) and OCTET.
set -eu

dir=$1 name=$2 octet=$3
masquerades=true others=',
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}'
[ "${4-}" != bridge ] || masquerades=false others=''
mkdir -p "$dir/net.d" "$dir/ipam"
cat >"$dir/net.d/10-$name.conflist" <<EOF
{
  "cniVersion": "1.0.0",
  "name": "$name",
  "plugins": [
    {
      "type": "bridge", "bridge": "$name", "isGateway": true, "ipMasq": $masquerades, "hairpinMode": true,
      "ipam": {
        "type": "host-local", "dataDir": "$dir/ipam",
        "ranges": [[{"subnet": "10.$octet.0.0/24"}], [{"subnet": "fd00:$octet::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
      }
    }$others
  ]
}
EOF
