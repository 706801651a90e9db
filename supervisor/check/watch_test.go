//go:build linux

package check

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestWatch: p passes, f fails, n is no result. What is reported for each result is 1, 0, or -.
func TestWatch(t *testing.T) {
	for _, row := range []struct {
		unknown       bool
		results, want string
	}{
		{true, "pppp", "1---"},
		{true, "ffpf", "0-1-"},
		{true, "nnpn", "--1-"},
		{true, "nfff", "-0--"},
		{false, "pppp", "----"},
		{false, "ffpffpfff", "--------0"},
		{false, "fffffp", "--0--1"},
		{false, "fnfnf", "----0"},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			var got []string
			probe := func(context.Context) error {
				got = append(got, "-")
				if len(got) > len(row.results) {
					cancel()
					return nil
				}
				switch row.results[len(got)-1] {
				case 'f':
					return errors.New("fails")
				case 'n':
					return fmt.Errorf("%w: no memory", ErrNoResult)
				}
				return nil
			}
			Watch(ctx, probe, time.Second, 3, row.unknown, func(failed error) {
				got[len(got)-1] = "1"
				if failed != nil {
					got[len(got)-1] = "0"
				}
			})
			if said := strings.Join(got[:len(got)-1], ""); said != row.want {
				t.Errorf("%s: %s, want %s", row.results, said, row.want)
			}
		})
	}
}
