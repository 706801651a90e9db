//go:build linux

// Leasehold keeps a job running on exactly one machine. Each machine runs the daemon. The daemons
// campaign in one election in etcd. The winner runs the job, and kills it before its lease can pass
// to another machine.
//
// Promised: at most one job is alive over all machines, as long as the kernel schedules the guard
// and carries out its kills within the margin, and clock rates differ by less than the margin
// allows.
//
// Not promised: anything outside of these two conditions. There the fencing token protects the
// storage that checks it. Work that the job hands to another service is not covered either.
package main

import (
	"os"

	"leasehold/app"
)

// Set by the build.
var (
	version = "dev"
	commit  = "unknown"
	date    = "unknown" // of the commit
)

func main() {
	os.Exit(app.Main(os.Args[1:], app.Build{Version: version, Commit: commit, Date: date}))
}
