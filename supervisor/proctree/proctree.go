//go:build linux

// Package proctree finds, kills and proves the exit of everything that descends from a process.
//
// A Scanner reads /proc. A Cgroup is the job's own, if the job has one: it kills everything in it
// at once and shows whether anything is left. The guard's kill path uses both. So they allocate
// nothing there, and make raw system calls, which Go's runtime can't delay.
package proctree
