//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// abreast is how many trials under the same stress run side by side.
const abreast = 4

// planned is a trial to be made.
type planned struct {
	scenario *Scenario
	of       variant
	index    int
}

// runAll runs first the trials that must be alone, one after the other, then those under stress,
// scenario by scenario, and then all others.
func (r *runner) runAll(ctx context.Context, wanted []*Scenario, parallel int) error {
	var alone, others []planned
	stressed := map[*Scenario][]planned{}
	// Trials of one scenario are far apart, so that most of those side by side have other faults.
	for i := range max(r.results.N, r.results.PeersN) {
		for _, s := range wanted {
			for _, v := range variants {
				p := planned{s, v, i}
				switch {
				case !s.has(v) || v.Ours() && i >= r.results.N ||
					!v.Ours() && i >= r.results.PeersN:
					continue
				case s.Stress != nil:
					stressed[s] = append(stressed[s], p)
				case s.alone(v):
					alone = append(alone, p)
				default:
					others = append(others, p)
				}
				r.total++
			}
		}
	}
	r.work(ctx, 1, alone, fault.Fault{})
	var err error
	for _, s := range wanted {
		if len(stressed[s]) > 0 {
			err = errors.Join(err, r.workUnderStress(ctx, s, min(abreast, parallel), stressed[s]))
		}
	}
	r.work(ctx, parallel, others, fault.Fault{})
	return err
}

func (r *runner) workUnderStress(ctx context.Context, s *Scenario, n int, trials []planned) error {
	cgroup, err := harness.NewCgroup(cgroupPrefix)
	if err != nil {
		return err
	}
	if s.Isolation == EveryoneAlone {
		n = 1
	}
	stress, on := s.Stress(cgroup, r.programs), &fault.Target{}
	if err = stress.Start(ctx, on); err == nil {
		r.work(ctx, n, trials, stress)
	}
	return errors.Join(err, stress.End(context.WithoutCancel(ctx), on))
}

// work makes trials in so many lanes side by side. Those with the same etcd follow each other.
func (r *runner) work(ctx context.Context, n int, trials []planned, stress fault.Fault) {
	slices.SortStableFunc(trials, func(a, b planned) int {
		of, other := a.scenario.Etcd, b.scenario.Etcd
		return cmp.Or(cmp.Compare(of.Members, other.Members), cmp.Compare(of.Flags, other.Flags))
	})
	waiting := make(chan planned, len(trials))
	for _, p := range trials {
		waiting <- p
	}
	close(waiting)
	var lanes sync.WaitGroup
	for range n {
		lanes.Go(func() { r.lane(ctx, waiting, stress) })
	}
	lanes.Wait()
}

// lane makes one trial after the other, on a testbed that it keeps as long as the
// scenarios need the same etcd.
func (r *runner) lane(ctx context.Context, waiting <-chan planned, stress fault.Fault) {
	var bed *harness.Testbed
	var has etcd
	leave := func() {
		if bed != nil {
			bed.Close()
		}
		bed = nil
	}
	defer leave()
	for next := range waiting {
		if has != next.scenario.Etcd {
			leave()
		}
		has = next.scenario.Etcd
		var err error
		if bed == nil {
			bed, err = r.newTestbed(ctx, has)
		}
		t := r.newTrial(bed, next, stress)
		if err != nil {
			t.sample.Failure = fmt.Sprintf("make a testbed: %v", err)
		} else {
			t.make(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		r.note(t.sample)
		if t.sample.Failure != "" { // whatever it was, the next trial shall not have it
			leave()
		}
	}
}

func (r *runner) newTestbed(ctx context.Context, of etcd) (*harness.Testbed, error) {
	cluster := harness.ClusterConfig{
		Etcd: r.etcd, Size: of.Members, Flags: strings.Fields(of.Flags),
	}
	if of.TLS {
		dir, err := harness.TempDir("certificates-") // removed with all that this program makes
		if err != nil {
			return nil, err
		}
		if cluster.TLS, err = harness.NewCerts(dir); err != nil {
			return nil, err
		}
	}
	return harness.NewTestbed(ctx, harness.TestbedConfig{
		Cluster: cluster, Programs: r.programs, Isolated: true, Prefix: prefix, Auth: of.Auth,
	})
}

// note keeps a sample and tells of it.
func (r *runner) note(s Sample) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.results.Samples = append(r.results.Samples, s)
	outcome := fmt.Sprintf("old job ended %s, next %s", duration(s.Dead), duration(s.Next))
	if s.Overlap > 0 {
		outcome += ", both alive " + harness.Span(s.Overlap)
	}
	if s.Failure != "" {
		outcome = "no outcome: " + s.Failure
	}
	for _, v := range s.Violations {
		outcome += "\n    VIOLATED: " + v
	}
	fmt.Fprintf(os.Stderr, "%d/%d %s, %s: %s\n",
		len(r.results.Samples), r.total, s.Row, s.Candidate, outcome)
	if s.evidence != "" {
		fmt.Fprintln(os.Stderr, s.evidence)
	}
}
