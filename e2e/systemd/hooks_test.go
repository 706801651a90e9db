//go:build linux

package systemd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// With the drop-in of docs/hooks.md the hooks of that page move an address. It is on one machine at
// most, also when all of the unit is killed, and the next start runs the hook.
func TestHooks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	root, err := harness.ModuleRoot()
	w.must(err)
	text, err := os.ReadFile(filepath.Join(root, "docs", "hooks.md"))
	w.must(err)
	dropIn := ""
	for _, block := range shellBlock.FindAllStringSubmatch(string(text), -1) {
		if strings.Contains(block[1], "leasehold@web") {
			dropIn = strings.ReplaceAll(block[1], "leasehold@web", "leasehold@job")
		}
	}
	if dropIn == "" {
		t.Fatal("docs/hooks.md has no drop-in for the unit")
	}
	seen, err := harness.WatchAddress()
	w.must(err)
	t.Cleanup(seen.Close)
	settings := []string{"LEASEHOLD_TTL=5s", "LEASEHOLD_STOP_GRACE=3s"}
	for _, hook := range harness.AddressHooks {
		name, command, _ := strings.Cut(hook, "=")
		settings = append(settings, name+"='"+command+"'")
	}
	for _, name := range []string{"a", "b"} {
		m := w.boot(name)
		w.must(seen.Add(m.node))
		w.run(m, "sh", "-euc", dropIn)
		w.configure(m, "/usr/bin/testjob", settings...)
		w.run(m, "systemctl", "start", unit)
		_, err := seen.Wait(w.ctx, true, "a")
		w.must(err)
	}
	leader, standby := w.machines[0], w.machines[1]
	for _, fault := range []string{"stop", "guard killed", "all killed"} {
		w.waitLeading(leader)
		w.waitStandby(standby, leader)
		switch fault {
		case "stop":
			w.run(leader, "systemctl", "stop", unit)
		case "guard killed":
			guard, _ := w.processes(leader)
			w.must(unix.Kill(guard, unix.SIGKILL))
		case "all killed":
			w.run(leader, "systemctl", "kill", "-s", "KILL", unit)
		}
		on, err := seen.Wait(w.ctx, false, leader.Name)
		w.must(err)
		t.Logf("%s: the address is on %s", fault, on)
		if fault == "stop" {
			w.run(leader, "systemctl", "start", unit)
		}
		leader, standby = standby, leader
	}
	stays, err := seen.Stays()
	w.must(err)
	if len(stays) != 4 {
		t.Errorf("the address was %d times on a machine, want 4: %+v", len(stays), stays)
	}
	for _, twice := range check.AddressesTwice(stays, harness.Now()) {
		t.Error(twice)
	}
	w.noOverlaps()
}
