//go:build linux

package fault

import (
	"context"
	"fmt"
	"sync"
	"time"

	"leasehold/e2e/harness"
)

// DisksSlow makes each sync of so many members to their disks slower, while keys are written: etcd
// syncs what is written, and renewals are not. The members must not run with --unsafe-no-fsync.
func DisksSlow(members int, delay time.Duration) Fault {
	type slowed struct {
		member *harness.Member
		before syncs
		end    func()
	}
	var (
		all     []slowed
		writers sync.WaitGroup
		stop    context.CancelFunc
	)
	return Fault{
		Name: "disk-slow",
		Inject: func(ctx context.Context, on *Target) error {
			writing, cancel := context.WithCancel(context.WithoutCancel(ctx))
			stop = cancel
			for i := range members {
				m := on.Etcd.Members[(on.Trial+i)%len(on.Etcd.Members)]
				before, err := readSyncs(ctx, m)
				if err != nil {
					return err
				}
				end, err := m.SlowDisk(ctx, delay)
				if err != nil {
					return err
				}
				all = append(all, slowed{m, before, end})
			}
			on.Begin()
			for i := range 2 {
				writers.Go(func() {
					for writing.Err() == nil {
						// How it fares is no matter.
						_, _ = on.Client.Put(writing, fmt.Sprintf("%swriter-%d", Stray, i), "")
					}
				})
			}
			return nil
		},
		Recover: func(context.Context, *Target) error {
			stop()
			writers.Wait()
			for _, s := range all {
				s.end()
			}
			return nil
		},
		Verify: func(ctx context.Context, on *Target) error {
			for _, s := range all {
				after, err := readSyncs(ctx, s.member)
				if err != nil {
					return err
				}
				count, took := after.count-s.before.count, after.seconds-s.before.seconds
				mean := time.Duration(took / max(count, 1) * float64(time.Second))
				if count < 3 || mean < delay/2 {
					return fmt.Errorf("%s has synced %.0f times, for %v each: "+
						"its disk was not slow", s.member.Name, count, mean)
				}
				on.Figure("sync", mean)
			}
			return nil
		},
	}
}

// syncs are those of a member's log of what etcd has agreed on.
type syncs struct{ count, seconds float64 }

func readSyncs(ctx context.Context, m *harness.Member) (syncs, error) {
	const name = "etcd_disk_wal_fsync_duration_seconds_"
	count, err := m.Metric(ctx, name+"count")
	if err != nil {
		return syncs{}, err
	}
	seconds, err := m.Metric(ctx, name+"sum")
	return syncs{count, seconds}, err
}
