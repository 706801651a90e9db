//go:build linux

package cli

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"leasehold/control"
	"leasehold/election"
	"leasehold/health"
)

// TestReport_AgreesWithStatus: a field of status --json that /status has too has the same type
// there.
func TestReport_AgreesWithStatus(t *testing.T) {
	types := map[string]string{}
	for _, f := range health.StatusFields() {
		types[f.Path] = f.Type
	}
	shared := 0
	for _, f := range ReportFields() {
		if f.Meaning == "" {
			t.Errorf("%s has no meaning", f.Path)
		}
		kind, both := types[f.Path]
		if !both {
			continue
		}
		if shared++; kind != f.Type {
			t.Errorf("%s is %s here and %s in /status", f.Path, f.Type, kind)
		}
	}
	if shared < 14 {
		t.Errorf("only %d fields are in both", shared)
	}
}

func TestReport_JSON(t *testing.T) {
	blocker := election.Blocker{Key: "e/x", Why: "why", Remedy: "remedy"}
	leader := election.Entry{Identity: "a", Key: "e/1f", Token: 7}
	for _, c := range []struct {
		report election.Report
		want   string
	}{
		{
			election.Report{},
			`{"name":"","election":"e","leader":null,"lease":null,"queue":[],"blocker":null,` +
				`"blockers":[],"hold":null,"control_problem":null,"version":"v1"}`,
		},
		{
			election.Report{
				Leader: &leader, LeaseID: 0x1f, LeaseTTL: 15 * time.Second,
				LeaseLeft: 12 * time.Second,
				Queue:     []election.Entry{leader, {Identity: "b", Key: "e/20", Token: 8}},
				Records: map[string]control.Candidate{"e/1f": {
					Identity: "a", Priority: 90, Ready: true, Leasehold: "v2",
					URL: "http://a:4040",
				}},
				Blockers: []election.Blocker{blocker},
			},
			`{"name":"a","election":"e",` +
				`"leader":{"identity":"a","key":"e/1f","token":7,"priority":90,"ready":true,` +
				`"since":null,"url":"http://a:4040","version":"v2"},` +
				`"lease":{"id":"1f","ttl_seconds":15,"valid_for_seconds":12},` +
				`"queue":[{"identity":"a","key":"e/1f","token":7,"priority":90,"ready":true,` +
				`"since":null,"url":"http://a:4040","version":"v2"},` +
				`{"identity":"b","key":"e/20","token":8,"priority":null,"ready":null,` +
				`"since":null,"url":null,"version":null}],` +
				`"blocker":{"key":"e/x","why":"why","remedy":"remedy"},` +
				`"blockers":[{"key":"e/x","why":"why","remedy":"remedy"}],` +
				`"hold":null,"control_problem":null,"version":"v1"}`,
		},
	} {
		got, err := json.Marshal(reportJSON("e", "v1", c.report))
		if err != nil || string(got) != c.want {
			t.Errorf("%s, %v, want %s", got, err, c.want)
		}
	}
	text := reportText("e", election.Report{Blockers: []election.Blocker{blocker}})
	if !strings.HasSuffix(text, "remedy\n") {
		t.Errorf("%q", text)
	}
}
