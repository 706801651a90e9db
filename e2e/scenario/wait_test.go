//go:build linux

package scenario_test

import (
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestWaitCommand: wait returns when the local daemon is what was asked for, and not before.
func TestWaitCommand(t *testing.T) {
	tr := ordinary(t)
	a := tr.start("a", "")
	job := tr.waitJob(a)
	b := tr.start("b", "")
	on := func(c *candidate) {
		for line := range strings.Lines(c.Log()) {
			if _, rest, found := strings.Cut(line, " listen="); found {
				listen, _, _ := strings.Cut(rest, " ")
				tr.asking = []string{"LEASEHOLD_LISTEN=" + listen}
				return
			}
		}
		t.Fatal("no address in the log of " + c.Identity)
	}
	tr.waitStatus(b, "/livez", http.StatusOK)
	on(b)
	tr.commands("", "wait", "standby")
	tr.commands("", "wait", "ready", "--timeout", "1m")
	if code, said := tr.command("wait", "leader", "--timeout", "3s"); code != 75 ||
		!strings.Contains(said, "standby: a leads") {
		t.Errorf("wait leader, of a standby: %d, %s", code, said)
	}
	began, led := time.Now(), make(chan int, 1)
	go func() {
		code, _ := tr.command("wait", "leader", "--timeout", "1m")
		led <- code
	}()
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitNext(job, waitTimeout)
	if code := <-led; code != 0 {
		t.Errorf("wait leader: %d after %v", code, time.Since(began))
	}
	tr.stop()
	if code, said := tr.command("wait", "leader"); code != 69 {
		t.Errorf("wait, and nobody answers: %d, %s", code, said)
	}
	if code, said := tr.command("wait"); code != 64 {
		t.Errorf("wait for nothing: %d, %s", code, said)
	}
}
