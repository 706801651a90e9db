//go:build linux

package scenario_test

import (
	"context"
	"flag"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"testing"

	"leasehold/e2e/harness"
)

// built is what the tests of this package share: the programs under test, made
// when the first test asks for them.
var built struct {
	sync.Mutex
	jobs, all, reload *harness.Programs
}

// testPrograms builds the programs that are no daemon.
func testPrograms(t *testing.T) *harness.Programs {
	t.Helper()
	return build(t, &built.jobs, "./e2e/cmd/testjob", "./e2e/cmd/naiveclient")
}

// allPrograms builds the daemon as well.
func allPrograms(t *testing.T) *harness.Programs {
	t.Helper()
	return build(t, &built.all)
}

func build(t *testing.T, programs **harness.Programs, packages ...string) *harness.Programs {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	if *programs == nil {
		p, err := harness.Build(context.Background(), packages...)
		if err != nil {
			t.Fatal(err)
		}
		*programs = p
	}
	return *programs
}

func TestMain(m *testing.M) {
	flag.Parse()
	// What a shell has this program ignore, the daemons must not inherit.
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	// These tests wait for leases to run out most of the time, so that more of
	// them fit side by side than there are processors.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	code := m.Run()
	for _, p := range []*harness.Programs{built.jobs, built.all, built.reload} {
		if p != nil {
			p.Remove()
		}
	}
	os.Exit(code)
}
