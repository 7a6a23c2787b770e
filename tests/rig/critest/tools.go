//go:build tools

// Package tools pins the version of critest, the CRI's conformance tests, and of the program that runs them in parallel.
package tools

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)
