package election

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestNewTiming(t *testing.T) {
	for _, test := range []struct {
		granted, lossGrace, margin time.Duration
		want                       Timing
	}{
		{
			15 * time.Second, -1, -1,
			Timing{15 * time.Second, 3 * time.Second, 0, 1500 * time.Millisecond},
		},
		{
			2 * time.Second, -1, -1,
			Timing{2 * time.Second, 400 * time.Millisecond, 0, 200 * time.Millisecond},
		},
		{
			time.Second, -1, -1,
			Timing{time.Second, 200 * time.Millisecond, 0, 200 * time.Millisecond},
		},
		{15 * time.Second, 0, time.Second, Timing{15 * time.Second, 0, 0, time.Second}},
	} {
		if got := NewTiming(test.granted, test.lossGrace, test.margin, 0); got != test.want {
			t.Errorf(
				"NewTiming(%v, %v, %v) = %+v, want %+v", test.granted, test.lossGrace, test.margin,
				got, test.want,
			)
		}
	}
}

func TestTiming_From(t *testing.T) {
	got := NewTiming(15*time.Second, -1, -1, 0).From(100 * time.Second)
	want := Deadlines{
		StopAt: 110500 * time.Millisecond,
		KillBy: 113500 * time.Millisecond,
		End:    115 * time.Second,
	}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestTiming_Validate(t *testing.T) {
	for ttl := 2 * time.Second; ttl < time.Hour; ttl *= 2 {
		if err := NewTiming(ttl, -1, -1, 0).Validate(); err != nil {
			t.Errorf("the defaults for a TTL of %v: %v", ttl, err)
		}
	}
	err := NewTiming(10*time.Second, 4*time.Second, time.Second, 0).Validate()
	if err == nil {
		t.Fatal("loss grace 4s + margin 1s + 3 × 2s of 10s are accepted")
	}
	for _, number := range []string{"4s", "1s", "2s", "11s", "10s"} {
		if !strings.Contains(err.Error(), number) {
			t.Errorf("%q does not name %s", err, number)
		}
	}
}

// TestRetry: the first attempt after a failure follows at once. An etcd that can't be reached is
// asked every second. One that does not answer in time gets more time.
func TestRetry(t *testing.T) {
	unavailable := status.Error(codes.Unavailable, "connection refused")
	noAnswer := errors.Join(&memberError{"m1", context.DeadlineExceeded})
	for _, row := range []struct {
		ttl  time.Duration
		err  error
		most time.Duration
	}{
		{60 * time.Second, unavailable, time.Second},
		{3 * time.Second, noAnswer, time.Second},
		{15 * time.Second, noAnswer, 3 * time.Second},
		{60 * time.Second, errUnanswered, 10 * time.Second},
		{60 * time.Second, rpctypes.ErrTooManyRequests, 10 * time.Second},
	} {
		var wait retry
		wait.most = Timing{TTL: row.ttl}.mostPause(row.err)
		if first := wait.next(); first != 0 {
			t.Errorf("%+v: the first attempt follows after %v", row, first)
		}
		early, last := time.Duration(0), time.Duration(0)
		for i := range 20 {
			if last = wait.next(); i < 4 {
				early += last
			}
		}
		if early > 3*time.Second {
			t.Errorf("%+v: four attempts take %v, as if etcd had been busy for long", row, early)
		}
		if last < row.most*4/5 || last > row.most*6/5 {
			t.Errorf("%+v: at last it waits for %v", row, last)
		}
		wait.most = Timing{TTL: row.ttl}.mostPause(unavailable)
		if again := wait.next(); again > 6*time.Second/5 {
			t.Errorf("%+v: %v although etcd can't be reached any more", row, again)
		}
	}
}
