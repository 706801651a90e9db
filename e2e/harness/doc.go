//go:build linux

// Package harness runs leasehold as its users do: the real binary against real
// etcd servers, with a witness that sees which jobs live when.
//
//	Testbed         etcd, and the network by which machines reach it
//	Cluster         etcd servers as processes: stopped, killed, paused
//	Machine         where one candidate runs: its node, its proxies, its cgroup
//	Candidate       a leasehold daemon, or a program to compare it with
//	Implementation  how candidates of one program are started and stopped
//	Network         a namespace for each node, between which packets are dropped
//	Proxy           a link to a member of etcd that can be cut without closing it
//	Child           a process that ends with the program that started it
//	Witness         every process of a job holds a connection to it while it lives
//
// The scenarios (e2e/scenario), the tests of other packages and the programs of
// e2e/cmd use it. What goes wrong is in e2e/fault; what it did to the jobs is for
// e2e/check to say. The harness knows leasehold by its interface only
// (environment, exit codes, signals, health endpoint) and imports nothing of it but
// the clock.
//
// Whatever is started here ends with the process that started it: children end
// with their parent, and the test job exits when its witness is gone.
package harness
