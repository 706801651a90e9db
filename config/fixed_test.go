//go:build linux

package config

import (
	"strings"
	"testing"
)

// TestCompareFixed: what means the same is no change, and what is unknown is ignored.
func TestCompareFixed(t *testing.T) {
	load := func(env ...string) Config {
		t.Helper()
		for _, entry := range append([]string{"ELECTION=e", "IDENTITY=i"}, env...) {
			name, value, _ := strings.Cut(entry, "=")
			t.Setenv(Prefix+"_"+name, value)
		}
		cfg, err := Load(ForRun)
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	before := load("TTL=60s", "STOP_SIGNAL=SIGINT", "MARGIN=")
	same := load("TTL=1m", "STOP_SIGNAL=int", "ENDPOINTS=http://other:1", "LOSS_GRACE=7s")
	if err := same.CompareFixed(append(before.Fixed(), "FUTURE=x")); err != nil {
		t.Error(err)
	}
	other := load("TTL=50s", "MARGIN=6s")
	err := other.CompareFixed(before.Fixed())
	want := "LEASEHOLD_TTL can't be changed by a reload, from 1m0s to 50s: restart the daemon\n" +
		"LEASEHOLD_MARGIN can't be changed by a reload, from unset to 6s: restart the daemon"
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
