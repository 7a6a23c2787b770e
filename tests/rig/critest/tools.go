//go:build tools

// Package tools pins the version of critest, the CRI's conformance tests.
package tools

import _ "sigs.k8s.io/cri-tools/pkg/validate"
