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
)

// A record is what the witness has told: which jobs live, and which ever lived at once.
type record struct {
	mu       sync.Mutex
	alive    []string
	last     string // that began
	count    int    // of jobs that began
	overlaps []string
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
				r.overlaps = append(r.overlaps, fmt.Sprintf("%s began while %s lived", name, strings.Join(r.alive, ", ")))
			}
			r.alive, r.last = append(r.alive, name), name
			r.count++
		case "end":
			r.alive = slices.DeleteFunc(r.alive, func(n string) bool { return n == name })
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

func (r *record) overlapped() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.overlaps)
}
