//go:build linux

package scenario_test

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// The memory of each of the daemon's processes, which holds secrets, is closed to
// other processes of its user: to the kernel it is root's.
func TestMemory_IsHidden(t *testing.T) {
	hidden := func(pid int) error {
		var s unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/mem", pid), &s); err != nil {
			return err
		}
		if s.Uid != 0 {
			return fmt.Errorf("the memory of process %d is open to user %d", pid, s.Uid)
		}
		return nil
	}
	tr := ordinary(t)
	elect := tr.start("elect", "", subcommand("elect"))
	tr.waitStatus(elect, "/readyz", http.StatusOK)
	tr.must(hidden(elect.Guard()))
	c := tr.start("run", "")
	tr.waitStatus(c, "/readyz", http.StatusOK)
	tr.must(hidden(c.Guard()))
	elector, err := c.Elector()
	tr.must(err)
	tr.must(hidden(elector))

	c.SetReachable(false) // so that the revocation takes its time
	tr.loseElectors(c)
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		for _, pid := range harness.Children(c.Guard()) {
			cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err == nil && strings.Contains(string(cmdline), "\x00revoke\x00") {
				return hidden(pid)
			}
		}
		return fmt.Errorf("no process revokes the lease")
	}))
	c.SetReachable(true)
	tr.waitExit(c, 70)
	tr.finish()
}
