//go:build linux

package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// About says where and with what something was measured.
type About struct {
	Date   string `json:"date"`
	Etcd   string `json:"etcd"`
	Go     string `json:"go"`
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
	Root   bool   `json:"root"`
}

// AboutThisRun describes this machine and the given etcd.
func AboutThisRun(ctx context.Context, etcd Etcd) (About, error) {
	version, err := exec.CommandContext(ctx, etcd.Server, "--version").Output()
	if err != nil {
		return About{}, fmt.Errorf("ask %s for its version: %w", etcd.Server, err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return About{}, err
	}
	first, _, _ := strings.Cut(string(version), "\n")
	return About{
		Date: time.Now().UTC().Format(time.DateOnly),
		Etcd: strings.TrimPrefix(first, "etcd Version: "), Go: runtime.Version(),
		Kernel: unix.ByteSliceToString(name.Release[:]), CPUs: runtime.NumCPU(),
		Root: os.Geteuid() == 0,
	}, nil
}
