//go:build linux

// Package proctree finds, kills and proves the exit of everything that descends from a process.
//
// A Scanner reads /proc. A Cgroup is the job's own, where there is one: it kills in one stroke and
// shows whether anything is left. Both serve the kill path of the guard: what runs there allocates
// nothing and makes raw system calls, which the runtime can't hold up.
package proctree
