//go:build linux

// Leasehold keeps a job running on exactly one machine. Each machine runs the daemon; the daemons
// campaign on one election key in etcd under a session lease; the winner runs the job as its child
// and kills it before its lease can pass to another.
//
// Promised: at most one job alive over all machines, as long as the kernel schedules the guard and
// carries out its kills within the margin, and clock rates differ by less than the margin allows.
// Not promised: that nothing overlaps outside of that; there the fencing token protects whatever
// storage checks it. Work that the job hands to another daemon is not covered.
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
