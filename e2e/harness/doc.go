//go:build linux

// Package harness runs leasehold as its users do: the real binary against real
// etcd servers, with a witness that knows which jobs lived when.
//
//	Cluster    etcd servers as processes on loopback: stopped, killed, paused
//	Proxy      a road to an etcd member that can be cut without closing it
//	Network    a namespace for each process, between which packets are dropped
//	Candidate  a leasehold daemon (or a program to compare it with)
//	Witness    every process of a job holds a connection to it while it lives
//
// Its files that are no tests serve the tests of other packages and the
// commands beside it: demo, run, bench, faults, soak, scale. It knows leasehold by its interface only (environment, exit
// codes, signals, health endpoint) and imports none of its packages.
//
// Whatever is started here ends with the process that started it: children
// die with their parent, and the test job exits when its witness is gone.
package harness
