//go:build linux

package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// withHooks leaves out the scenarios in which no candidate can have hooks, and names them.
func withHooks(wanted []*Scenario) []*Scenario {
	return slices.DeleteFunc(wanted, func(s *Scenario) bool {
		if s.Freeze {
			fmt.Fprintf(os.Stderr, "%s: left out: LEASEHOLD_POST_STOP is refused together with "+
				"LEASEHOLD_CONTACT_LOSS=freeze\n", s.Name)
		}
		return s.Freeze
	})
}

// hooks are the settings of a candidate with hooks. Their time is taken off the loss grace, so that
// stop-at is as without them: what must not move the job without hooks must not move it with them.
func (t *Trial) hooks() []string {
	return append([]string{"LEASEHOLD_LOSS_GRACE=" + (t.TTL / 10).String()},
		harness.AddressHooks...)
}

// hookFailed is what a daemon logs if the hook after the job has failed, or had no time. Then the
// address may stay: the report says so.
const hookFailed = "LEASEHOLD_POST_STOP has failed"

// judgeAddresses judges where the virtual address was, when all candidates have ended.
func (t *Trial) judgeAddresses() error {
	stays, err := t.addresses.Stays()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(stays, func(s harness.Stay) bool {
		return s.Machine == t.Machine.Name && s.From < t.Began && (s.To == 0 || s.To > t.Began)
	}) {
		return errors.New("the leader's machine did not have the virtual address before the fault")
	}
	figures := map[string]float64{}
	failed := ""
	for _, m := range t.started() {
		if strings.Contains(m.Log(), hookFailed) {
			failed += ", and the hook has failed on " + m.Name
		}
	}
	for i, second := range stays {
		if i > 0 && second.Machine != stays[i-1].Machine && stays[i-1].To != 0 {
			gap := harness.Milliseconds(second.From - stays[i-1].To)
			figures["address on none"] = max(figures["address on none"], gap)
		}
		if second.To == 0 {
			t.violated("%s still has the virtual address%s", second.Machine, failed)
		}
	}
	for _, a := range check.AddressesTwice(stays, harness.Now()) {
		figures["address on both"] += harness.Milliseconds(a.During.Length())
		if t.Scenario.Promise == Never {
			t.together(a.First, a.During.Length(), a.String()+failed)
		}
	}
	if t.sample.Figures == nil {
		t.sample.Figures = map[string]float64{}
	}
	maps.Copy(t.sample.Figures, figures)
	return nil
}
