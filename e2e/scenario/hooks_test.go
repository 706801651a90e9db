//go:build linux

package scenario_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// A virtual address is on one machine at most, whatever is lost or hangs, and it comes back.
func TestHooks_VirtualAddress(t *testing.T) {
	if !inNetwork(t, "5m") {
		return
	}
	ctx := testContext(t, 4*time.Minute)
	programs := allPrograms(t)
	network, err := harness.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	bed := &harness.Testbed{
		Etcd:     harness.NewTestCluster(t, harness.ClusterConfig{Size: 3, Network: network}),
		Programs: programs, Network: network,
	}
	witness := harness.NewTestWitness(t)
	seen := newAddressWatch(t)
	machines := map[string]*harness.Machine{}
	for _, name := range []string{"a", "b", "c"} {
		cgroup, err := harness.NewCgroup("hooks")
		if err != nil {
			t.Fatal(err)
		}
		m, err := bed.NewMachine(harness.MachineConfig{Name: name, Cgroup: cgroup})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := m.Close(context.Background()); err != nil {
				t.Error(err)
			}
			if t.Failed() && m.Candidate != nil {
				t.Logf("log of candidate %s:\n%s", name, m.Log())
			}
		})
		machines[name] = m
		if err := seen.Add(m.Node); err != nil {
			t.Fatal(err)
		}
		if err := m.Start(harness.Leasehold, harness.CandidateConfig{
			Election: "jobs/address", TTL: 5 * time.Second, Witness: witness,
			Job: []string{"ignore-term"},
		}, func(cfg *harness.CandidateConfig) error {
			cfg.Env = append(slices.Clone(harness.AddressHooks), "LEASEHOLD_STOP_GRACE=200ms")
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := m.WaitStatus(ctx, "/readyz", http.StatusOK); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range addressFaults(bed) {
		before, err := seen.Wait(ctx, true, leaderOf(ctx, machines))
		if err != nil {
			t.Fatalf("before %s: %v", f.name, err)
		}
		m := machines[before]
		if err := m.WaitStatus(ctx, "/leader", http.StatusOK); err != nil {
			t.Fatalf("before %s: %v", f.name, err)
		}
		was, err := runsOf(ctx, m)
		if err != nil {
			t.Fatalf("before %s: %v", f.name, err)
		}
		at := time.Now()
		end, err := f.inject(ctx, m)
		if err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
		if f.stays { // first something is lost: until then all is as before
			if err := harness.Until(ctx, func() error {
				now, err := runsOf(ctx, m)
				if err == nil && now == was {
					err = fmt.Errorf("still elector and restarts %+v", now)
				}
				return err
			}); err != nil {
				t.Fatalf("after %s: %v", f.name, err)
			}
			if err := m.WaitStatus(ctx, "/leader", http.StatusOK); err != nil {
				t.Fatalf("after %s: %v", f.name, err)
			}
		}
		next, err := seen.Wait(ctx, f.stays, before)
		if err != nil {
			t.Fatalf("after %s: %v", f.name, err)
		}
		t.Logf("%s: from %s to %s in %v", f.name, before, next, time.Since(at))
		if end != nil {
			if err := end(); err != nil {
				t.Fatalf("the end of %s: %v", f.name, err)
			}
		}
		if !m.Running() || f.exits {
			if _, err := m.Wait(ctx); err != nil {
				t.Fatalf("after %s: %v", f.name, err)
			}
			if err := m.Cgroup.WaitEmpty(ctx); err != nil {
				t.Fatalf("after %s: %v", f.name, err)
			}
			if err := m.StartAgain(); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.WaitStatus(ctx, "/readyz", http.StatusOK); err != nil {
			t.Fatalf("after %s: %v", f.name, err)
		}
	}
	stays, err := seen.Stays()
	if err != nil {
		t.Error(err)
	}
	t.Logf("the address was %d times on a machine", len(stays))
	for _, twice := range check.AddressesTwice(stays, harness.Now()) {
		t.Error(twice)
	}
	for _, o := range check.Overlaps(witness.Lives()) {
		t.Error(o)
	}
}

// runs are what changes if a machine loses its elector or its job, and keeps the lead.
type runs struct{ elector, restarts int }

func runsOf(ctx context.Context, m *harness.Machine) (runs, error) {
	var s status
	elector, err := m.Elector()
	_, body, errGet := m.Get(ctx, "/status")
	if err = errors.Join(err, errGet); err == nil {
		err = json.Unmarshal([]byte(body), &s)
	}
	return runs{elector, s.Job.Restarts}, err
}

func newAddressWatch(t *testing.T) *harness.AddressWatch {
	t.Helper()
	w, err := harness.WatchAddress()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

// The watch of addresses sees what it is there for: without a hook after the job, the address stays
// on the machine of a leader whose processes are killed, while the next one has it too.
func TestHooks_AddressTwice(t *testing.T) {
	if !inNetwork(t, "3m") {
		return
	}
	ctx := testContext(t, 2*time.Minute)
	network, err := harness.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	bed := &harness.Testbed{
		Etcd:     harness.NewTestCluster(t, harness.ClusterConfig{Network: network}),
		Programs: allPrograms(t), Network: network,
	}
	seen := newAddressWatch(t)
	start := func(name string) *harness.Machine {
		m, err := bed.NewMachine(harness.MachineConfig{Name: name})
		if err == nil {
			t.Cleanup(func() { _ = m.Close(context.Background()) })
			err = seen.Add(m.Node)
		}
		if err == nil {
			err = m.Start(harness.Leasehold, harness.CandidateConfig{
				Election: "jobs/address", TTL: 2 * time.Second,
			}, func(cfg *harness.CandidateConfig) error {
				cfg.Env = harness.AddressHooks[:1] // only the one before the job
				cfg.Job = []string{"sleep", "1000"}
				return nil
			})
		}
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	leader := start("a")
	if _, err := seen.Wait(ctx, true, "a"); err != nil {
		t.Fatal(err)
	}
	start("b")
	elector, err := leader.Elector()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(syscall.Kill(leader.Guard(), syscall.SIGKILL),
		syscall.Kill(elector, syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	if err := harness.Until(ctx, func() error {
		stays, err := seen.Stays()
		twice := check.AddressesTwice(stays, harness.Now())
		if err == nil && (len(twice) != 1 || twice[0].First != "a" || twice[0].Second != "b") {
			err = fmt.Errorf("stays %+v: %v", stays, twice)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

func leaderOf(ctx context.Context, machines map[string]*harness.Machine) (name string) {
	_ = harness.Until(ctx, func() error {
		for _, m := range machines {
			if code, _, err := m.Get(ctx, "/leader"); err == nil && code == http.StatusOK {
				name = m.Name
				return nil
			}
		}
		return errors.New("nobody leads")
	})
	return name
}

// addressFault is what happens to the machine that has the address.
type addressFault struct {
	name   string
	stays  bool // the address, or it comes back there
	exits  bool // the daemon does
	inject func(ctx context.Context, m *harness.Machine) (end func() error, err error)
}

func addressFaults(bed *harness.Testbed) []addressFault {
	send := func(sig syscall.Signal, to ...harness.Process) func(context.Context,
		*harness.Machine) (func() error, error) {
		return func(_ context.Context, m *harness.Machine) (func() error, error) {
			var pids []int
			for _, p := range to {
				pid, err := m.Pid(p)
				if err != nil {
					return nil, err
				}
				pids = append(pids, pid)
			}
			var err error
			for _, pid := range pids {
				err = errors.Join(err, syscall.Kill(pid, sig))
			}
			return func() error {
				for _, pid := range pids {
					_ = syscall.Kill(pid, syscall.SIGCONT) // it may have ended
				}
				return nil
			}, err
		}
	}
	// A process that is needed for nothing may hang for as long as it likes. So a stop follows.
	hang := func(p harness.Process) func(context.Context, *harness.Machine) (func() error, error) {
		return func(ctx context.Context, m *harness.Machine) (func() error, error) {
			end, err := send(syscall.SIGSTOP, p)(ctx, m)
			return end, errors.Join(err, m.Signal(syscall.SIGTERM))
		}
	}
	job := func(sig syscall.Signal) func(context.Context, *harness.Machine) (func() error, error) {
		return func(_ context.Context, m *harness.Machine) (func() error, error) {
			spawner, err := m.Spawner()
			if err != nil {
				return nil, err
			}
			for _, pid := range harness.Children(spawner) {
				err = errors.Join(err, syscall.Kill(pid, sig))
			}
			return nil, err
		}
	}
	cut := func(_ context.Context, m *harness.Machine) (func() error, error) {
		_, err := bed.Network.Cut(harness.LinksBetween(m.Node, bed.Etcd.Nodes()...)...)
		return bed.Network.Recover, err
	}
	const kill = syscall.SIGKILL
	// Nobody is left who runs the hook. So the daemon has to be started again before the lease
	// ends, but an elector that is left holds the endpoint's address for a moment.
	again := func(all ...harness.Process) func(context.Context,
		*harness.Machine) (func() error, error) {
		return func(ctx context.Context, m *harness.Machine) (func() error, error) {
			elector, err := m.Elector()
			if err != nil {
				return nil, err
			}
			if _, err := send(kill, all...)(ctx, m); err != nil {
				return nil, err
			}
			if _, err := m.Wait(ctx); err != nil {
				return nil, err
			}
			if err := harness.Until(ctx, func() error {
				if syscall.Kill(elector, 0) == nil {
					return errors.New("the elector has not ended")
				}
				return nil
			}); err != nil {
				return nil, err
			}
			return nil, m.StartAgain()
		}
	}
	return []addressFault{
		{name: "stop", exits: true, inject: send(syscall.SIGTERM, harness.Guard)},
		{name: "guard killed", exits: true, inject: send(kill, harness.Guard)},
		{name: "elector killed", stays: true, inject: send(kill, harness.Elector)},
		{name: "spawner killed", exits: true, inject: send(kill, harness.Spawner)},
		{
			name: "guard and elector killed", exits: true,
			inject: send(kill, harness.Guard, harness.Elector),
		},
		{name: "job killed", stays: true, inject: job(kill)},
		{name: "cut off from etcd", inject: cut},
		{
			name: "guard killed while cut off from etcd", exits: true,
			inject: func(ctx context.Context, m *harness.Machine) (func() error, error) {
				end, err := cut(ctx, m)
				if err == nil {
					_, err = send(kill, harness.Guard, harness.Elector)(ctx, m)
				}
				return end, err
			},
		},
		{
			name: "guard hangs while cut off from etcd", exits: true,
			inject: func(ctx context.Context, m *harness.Machine) (func() error, error) {
				end, err := cut(ctx, m)
				if err == nil {
					_, err = send(syscall.SIGSTOP, harness.Guard)(ctx, m)
				}
				return end, err
			},
		},
		{
			name: "job hangs while cut off from etcd",
			inject: func(ctx context.Context, m *harness.Machine) (func() error, error) {
				end, err := cut(ctx, m)
				if err == nil {
					_, err = job(syscall.SIGSTOP)(ctx, m)
				}
				return end, err
			},
		},
		{name: "guard hangs, and a stop", exits: true, inject: hang(harness.Guard)},
		{name: "elector hangs", stays: true, inject: send(syscall.SIGSTOP, harness.Elector)},
		{name: "spawner hangs, and a stop", exits: true, inject: hang(harness.Spawner)},
		{
			name:   "all killed, and started again",
			inject: again(harness.Guard, harness.Elector, harness.Spawner),
		},
		{
			name:   "guard and spawner killed, and started again",
			inject: again(harness.Guard, harness.Spawner),
		},
	}
}
