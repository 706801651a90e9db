//go:build linux

package app

import (
	"reflect"
	"testing"
	"time"

	"leasehold/election"
	"leasehold/supervisor/ipc"
)

// TestAdoption: what the candidate is told of the guard's record.
func TestAdoption(t *testing.T) {
	const second = time.Second
	ec := election.Config{LossGrace: -1, Margin: -1}
	lease := ipc.Lease{ID: 7, TTL: 10 * second}
	key := ipc.Entered{Key: "jobs/x/7", Created: 9}
	deadlines := election.Deadlines{StopAt: 17 * second, KillBy: 19 * second, End: 20 * second}
	for _, c := range []struct {
		name   string
		record ipc.Record
		want   *election.Adoption
	}{
		{"first elector", ipc.Record{Version: 1, StopSignals: 1}, nil},
		{"key not put", ipc.Record{Lease: lease}, &election.Adoption{LeaseID: 7, TTL: 10 * second}},
		{
			"standby",
			ipc.Record{Lease: lease, Entered: key},
			&election.Adoption{LeaseID: 7, TTL: 10 * second, Created: 9},
		},
		{
			"releasing",
			ipc.Record{Lease: ipc.Lease{ID: 7, TTL: second, Releasing: true}, Entered: key},
			&election.Adoption{LeaseID: 7, TTL: second, Created: 9, Releasing: true},
		},
		{
			"leading",
			ipc.Record{
				Lease: lease, Entered: key, Job: ipc.JobRunning,
				StopAt: 17 * second, KillBy: 19 * second,
			},
			&election.Adoption{
				LeaseID: 7, TTL: 10 * second, Created: 9, Leading: true, Deadlines: deadlines,
			},
		},
		{
			"first process exited by itself",
			ipc.Record{
				Lease: lease, Entered: key, Job: ipc.JobEnding,
				StopAt: 17 * second, KillBy: 19 * second,
			},
			&election.Adoption{
				LeaseID: 7, TTL: 10 * second, Created: 9, Leading: true, Deadlines: deadlines,
			},
		},
		{
			"ending",
			ipc.Record{
				Lease: lease, Entered: key, Job: ipc.JobEnding, Ordered: true,
				StopAt: 17 * second, KillBy: 19 * second,
			},
			&election.Adoption{
				LeaseID: 7, TTL: 10 * second, Created: 9, Leading: true, Ending: true,
				Deadlines: deadlines,
			},
		},
	} {
		if got := adoption(ec, c.record); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}
