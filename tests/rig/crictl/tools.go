//go:build tools

// Package tools pins the version of crictl: the end-to-end tests drive podvisord with the real
// client, built from the Go module proxy.
package tools

import _ "sigs.k8s.io/cri-tools/cmd/crictl"
