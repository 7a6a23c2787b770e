module podvisor/tests/rig/cri-api

go 1.26

require k8s.io/cri-api v0.36.3
