//go:build tools

// Never built: it keeps metrics-server in go.mod.
package main

import _ "sigs.k8s.io/metrics-server/cmd/metrics-server"
