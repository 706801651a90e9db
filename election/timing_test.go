package election

import (
	"strings"
	"testing"
	"time"
)

func TestNewTiming(t *testing.T) {
	for _, test := range []struct {
		granted, lossGrace, margin time.Duration
		want                       Timing
	}{
		{
			15 * time.Second, -1, -1,
			Timing{15 * time.Second, 3 * time.Second, 1500 * time.Millisecond},
		},
		{
			2 * time.Second, -1, -1,
			Timing{2 * time.Second, 400 * time.Millisecond, 200 * time.Millisecond},
		},
		{time.Second, -1, -1, Timing{time.Second, 200 * time.Millisecond, 200 * time.Millisecond}},
		{15 * time.Second, 0, time.Second, Timing{15 * time.Second, 0, time.Second}},
	} {
		if got := NewTiming(test.granted, test.lossGrace, test.margin); got != test.want {
			t.Errorf(
				"NewTiming(%v, %v, %v) = %+v, want %+v", test.granted, test.lossGrace, test.margin,
				got, test.want,
			)
		}
	}
}

func TestTiming_From(t *testing.T) {
	got := NewTiming(15*time.Second, -1, -1).From(100 * time.Second)
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
		if err := NewTiming(ttl, -1, -1).Validate(); err != nil {
			t.Errorf("the defaults for a TTL of %v: %v", ttl, err)
		}
	}
	err := NewTiming(10*time.Second, 4*time.Second, time.Second).Validate()
	if err == nil {
		t.Fatal("loss grace 4s + margin 1s + 3 × 2s of 10s are accepted")
	}
	for _, number := range []string{"4s", "1s", "2s", "11s", "10s"} {
		if !strings.Contains(err.Error(), number) {
			t.Errorf("%q does not name %s", err, number)
		}
	}
}
