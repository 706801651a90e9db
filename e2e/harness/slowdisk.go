//go:build linux

package harness

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// SlowDisk makes each of the member's syncs of a file to its disk begin that much later, until end
// is called or the member has ended. The member must not run with --unsafe-no-fsync, for then it
// never syncs. It is done by strace (Debian's package strace), under which nothing else of etcd is
// slow enough to notice.
func (m *Member) SlowDisk(ctx context.Context, delay time.Duration) (end func(), err error) {
	cmd := exec.Command("strace", "-f", "-o", "/dev/null",
		"-p", strconv.Itoa(m.cmd.Process.Pid), "-e", "trace=fdatasync,fsync",
		"-e", fmt.Sprintf("inject=fdatasync,fsync:delay_enter=%d", delay.Microseconds()))
	c, err := StartChild("strace", nil, cmd)
	if err != nil {
		return nil, fmt.Errorf("slow down the disk of etcd member %s "+
			"(Debian's package strace): %w", m.Name, err)
	}
	err = Until(ctx, func() error {
		if strings.Contains(c.Log(), " attached") {
			return nil
		}
		return errors.New("strace is not attached")
	})
	if err != nil {
		c.Kill()
		return nil, fmt.Errorf("slow down the disk of etcd member %s: %w: %s", m.Name, err, c.Log())
	}
	// The kernel lets go of what a tracer that is killed had stopped.
	return c.Kill, nil
}
