package election

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestOutage(t *testing.T) {
	var told bytes.Buffer
	now := time.Hour
	o := &outage{
		log: slog.New(slog.NewTextHandler(&told, &slog.HandlerOptions{
			ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			},
		})),
		now: func() time.Duration { return now },
	}
	expect := func(lines ...string) {
		t.Helper()
		got := strings.TrimSpace(told.String())
		if want := strings.Join(lines, "\n"); got != want {
			t.Errorf("after %v:\n%s\nwant:\n%s", now-time.Hour, got, want)
		}
		told.Reset()
	}
	fails := func(after time.Duration, what failing, reason string) {
		now += after
		o.fails(what, "lease not renewed", reason)
	}
	const still = `level=WARN msg="etcd still can't be used, trying again" `
	o.over(leaseFails)
	expect()
	fails(0, leaseFails, "no answer")
	expect(`level=WARN msg="lease not renewed" reason="no answer"`)
	for range 59 {
		fails(time.Second, leaseFails, "no answer")
	}
	expect()
	fails(time.Second, leaseFails, "no answer")
	expect(still + `reason="no answer" elapsed=1m0s`)
	// Another reason is told sooner, but not each time.
	fails(time.Second, leaseFails, "refused")
	expect()
	fails(9*time.Second, queueFails, "refused")
	expect(still + `reason=refused elapsed=1m10s`)
	// It is over when nothing fails any more.
	o.over(leaseFails)
	expect()
	now += time.Second
	o.over(queueFails)
	expect(`level=INFO msg="etcd can be used again" elapsed=1m11s`)
	o.over(queueFails)
	expect()
	// On a link that loses packets they come and go: one is told of in 10 s.
	fails(time.Second, leaseFails, "refused")
	o.over(leaseFails)
	expect()
	fails(9*time.Second, leaseFails, "refused")
	expect(`level=WARN msg="lease not renewed" reason=refused`)
	o.over(leaseFails)
	expect(`level=INFO msg="etcd can be used again" elapsed=0s`)
}
