//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr,
		"leasehold runs on Linux: it kills a job by means that only the Linux kernel has")
	os.Exit(1)
}
