//go:build linux

package recovery

import (
	"fmt"
	"log/slog"
	"time"
)

// Keeper writes the elector's lease into the state file. It is the elector's, because the guard has
// to kill at deadlines and must not wait for a disk. In the elector, a goroutine of its own writes.
// If the disk hangs, only that waits, and a lease is missing in the file: then it expires.
type Keeper struct {
	leases chan int64 // room for one: the latest that is not written yet
	done   chan struct{}
}

// Keep writes leases into the file that the guard has claimed, and that the elector has inherited.
func Keep(fd int, log *slog.Logger) (*Keeper, error) {
	content, err := read(fd)
	if err != nil {
		return nil, err
	}
	r := &Record{}
	if err := decode(head, content, r); err != nil {
		return nil, fmt.Errorf("%s: %w", FileName, err)
	}
	k := &Keeper{leases: make(chan int64, 1), done: make(chan struct{})}
	go k.run(fd, r, log)
	return k, nil
}

func (k *Keeper) run(fd int, r *Record, log *slog.Logger) {
	defer close(k.done)
	for lease := range k.leases {
		r.Lease = fixed(lease)
		if err := write(fd, r); err != nil {
			log.Warn("write the lease into the state file: "+
				"if all processes are killed at once, it has to expire", "err", err)
		}
	}
}

// Lease writes which lease the daemon has; 0: none. It never blocks. Only one goroutine calls it
// at a time. It may be called on nil, which keeps nothing.
func (k *Keeper) Lease(id int64) {
	if k == nil {
		return
	}
	select {
	case <-k.leases: // a later one counts
	default:
	}
	k.leases <- id
}

// Close waits until the last lease is written, for d at most.
func (k *Keeper) Close(d time.Duration) {
	if k == nil {
		return
	}
	close(k.leases)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-k.done:
	case <-timer.C:
	}
}
