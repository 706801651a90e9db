//go:build linux

package k8s_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// A record is what the witness has told: which jobs live, and which ever lived at once.
type record struct {
	mu       sync.Mutex
	alive    []string
	last     string // that began
	count    int    // of jobs that began
	overlaps []string
	idle     time.Time     // since when no job lives; zero while one does
	gap      time.Duration // the longest such time that has ended
	changed  chan struct{} // closed and replaced at each change
}

func newRecord() *record { return &record{changed: make(chan struct{})} }

// follow reads the witness' lines to their end.
func (r *record) follow(lines io.Reader) error {
	scanner := bufio.NewScanner(lines)
	for scanner.Scan() {
		what, name, _ := strings.Cut(scanner.Text(), " ")
		r.mu.Lock()
		switch what {
		case "start":
			if len(r.alive) > 0 {
				r.overlaps = append(r.overlaps,
					fmt.Sprintf("%s began while %s lived", name, strings.Join(r.alive, ", ")))
			}
			if !r.idle.IsZero() {
				r.gap, r.idle = max(r.gap, time.Since(r.idle)), time.Time{}
			}
			r.alive, r.last = append(r.alive, name), name
			r.count++
		case "end":
			r.alive = slices.DeleteFunc(r.alive, func(n string) bool { return n == name })
			if len(r.alive) == 0 {
				r.idle = time.Now()
			}
		}
		close(r.changed)
		r.changed = make(chan struct{})
		r.mu.Unlock()
	}
	return scanner.Err()
}

// job waits for a job after the given one, of another pod or term, that lives, and returns its pod.
func (r *record) job(ctx context.Context, after string) (job, pod string, err error) {
	for {
		r.mu.Lock()
		last, lives, changed := r.last, slices.Contains(r.alive, r.last), r.changed
		r.mu.Unlock()
		if lives && last != after {
			pod, _, _ = strings.Cut(last, " ")
			return last, pod, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", "", fmt.Errorf("no job after %q: %w", after, context.Cause(ctx))
		}
	}
}

// longestGap returns the longest time without a job that has ended since it was asked last.
func (r *record) longestGap() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	gap := r.gap
	r.gap = 0
	return gap
}

func (r *record) overlapped() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.overlaps)
}
