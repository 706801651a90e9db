//go:build linux

// Package nofile keeps the limit of open files that this process was started with. Go's syscall
// package raises the soft limit when it is initialized, and restores it only in the processes that
// it starts itself.
//
// This package must be initialized before syscall. It imports nothing that has to be initialized.
// Among the packages that are ready Go takes the first by import path
// (https://go.dev/ref/spec#Program_initialization), so this one comes before syscall.
package nofile

import "unsafe"

//go:linkname rawSyscall6 syscall.RawSyscall6
func rawSyscall6(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2, errno uintptr)

// Limit is struct rlimit of getrlimit(2).
type Limit struct{ Soft, Hard uint64 }

// Original is the limit as it was, or zero where it could not be read.
var Original = read()

func read() (l Limit) {
	const rlimitNofile = 7 // asm-generic/resource.h
	_, _, errno := rawSyscall6(sysPrlimit64, 0, rlimitNofile, 0, uintptr(unsafe.Pointer(&l)), 0, 0)
	if errno != 0 {
		return Limit{}
	}
	return l
}
