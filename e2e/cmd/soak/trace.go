//go:build linux

package main

import (
	"slices"

	"leasehold/e2e/check"
)

// trace checks the log of a daemon that has ended against the model.
func (r *run) trace(d *daemon) {
	if !r.implementation.Ours() {
		return
	}
	n, err := r.relation.Trace(d.Log())
	if err != nil {
		r.check.violate([]string{d.Name}, "the log of candidate %s, started at %s, "+
			"does not follow the model: %v", d.Name, r.check.clock(d.began), err)
	}
	if check.Crashed(d.Log()) {
		r.check.violate([]string{d.Name}, "an elector of candidate %s, started at %s, has crashed",
			d.Name, r.check.clock(d.began))
	}
	r.check.mu.Lock()
	defer r.check.mu.Unlock()
	r.check.counts.Transitions.Add(n)
}

// traceAll checks the logs that are kept at the end.
func (r *run) traceAll() {
	for _, c := range r.candidates {
		c.mu.Lock()
		kept := slices.Clone(c.runs)
		c.mu.Unlock()
		for _, d := range kept {
			r.trace(d)
		}
	}
	r.check.mu.Lock()
	err := r.check.counts.Transitions.Complete()
	r.check.mu.Unlock()
	if err != nil {
		r.check.violate(nil, "in the logs of all candidates: %v", err)
	}
}
