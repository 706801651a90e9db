//go:build linux

package supervisor

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"leasehold/supervisor/proctree"
)

// life is one run of a job: for how long, and how it ended.
type life struct {
	ran  time.Duration
	code int
}

// play runs the lives one after the other, on a clock that no job's or test's own slowness
// disturbs. It returns the pauses between them, and what ended the sequence.
func play(r *restarter, lives ...life) (pauses []time.Duration, end error) {
	for _, l := range lives {
		began := time.Now()
		time.Sleep(l.ran)
		delay, err := r.after(ExitError{Exit: proctree.Exit{Code: l.code}}, time.Since(began))
		if err != nil {
			return pauses, err
		}
		ended := time.Now()
		time.Sleep(delay)
		pauses = append(pauses, time.Since(ended))
	}
	return pauses, nil
}

func newTestRestarter(mode Restart, limit int) *restarter {
	r := newRestarter(mode, limit)
	r.jitter = func() float64 { return 0.5 } // the middle: no jitter
	return r
}

func repeat(l life, n int) (lives []life) {
	for range n {
		lives = append(lives, l)
	}
	return lives
}

func TestRestarter_Backoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRestarter(RestartAlways, 0)
		quick := life{time.Second, 1}
		pauses, err := play(r, append(repeat(quick, 8), life{10 * time.Second, 1}, quick)...)
		if err != nil {
			t.Fatal(err)
		}
		want := []time.Duration{500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 500, 1000}
		for i, w := range want {
			if pauses[i] != w*time.Millisecond {
				t.Errorf("pause %d is %v, not %v", i, pauses[i], w*time.Millisecond)
			}
		}
	})
}

func TestRestarter_Jitter(t *testing.T) {
	for _, end := range []struct {
		jitter float64
		want   time.Duration
	}{{0, 400 * time.Millisecond}, {1, 600 * time.Millisecond}} {
		r := newTestRestarter(RestartAlways, 0)
		r.jitter = func() float64 { return end.jitter }
		if got, _ := r.after(ExitError{Exit: proctree.Exit{Code: 1}}, 0); got != end.want {
			t.Errorf("jitter %v makes %v, not %v", end.jitter, got, end.want)
		}
	}
}

func TestRestarter_Modes(t *testing.T) {
	for _, c := range []struct {
		mode     Restart
		code     int
		restarts bool
	}{
		{RestartNever, 0, false},
		{RestartNever, 1, false},
		{RestartOnFailure, 0, false},
		{RestartOnFailure, 1, true},
		{RestartOnFailure, 137, true},
		{RestartAlways, 0, true},
		{RestartAlways, 1, true},
	} {
		_, err := newTestRestarter(c.mode, 0).after(ExitError{Exit: proctree.Exit{Code: c.code}},
			time.Minute)
		var ended *ExitError
		if c.restarts != (err == nil) || err != nil && (!errors.As(err,
			&ended) || ended.Code != c.code) {
			t.Errorf("%s, code %d: %v", c.mode, c.code, err)
		}
	}
}

func TestRestarter_LimitResigns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRestarter(RestartOnFailure, 3)
		quick, long := life{0, 1}, life{time.Minute, 1}
		pauses, err := play(r, quick, quick, long, quick, quick, quick, quick)
		var resign *ResignError
		if !errors.As(err, &resign) {
			t.Fatalf("%v after %v", err, pauses)
		}
		if len(pauses) != 5 {
			t.Errorf("resigned after %d restarts, not 5: a long run starts the count anew",
				len(pauses))
		}
		// Elected again at once, and failing again: the backoff goes on where it was.
		if resign.After != 4*time.Second {
			t.Errorf("back in the queue after %v, not 4s", resign.After)
		}
		if resign.Last.Code != 1 {
			t.Errorf("resigned for %+v, want the exit code 1", resign.Last)
		}
		if pauses, _ := play(r, quick); pauses[0] != 8*time.Second {
			t.Errorf("the next pause is %v, not 8s", pauses[0])
		}
	})
}

func TestRestarter_SuccessIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRestarter(RestartAlways, 2)
		if _, err := play(r, life{0, 1}, life{0, 0}, life{0, 1}, life{0, 0}, life{0, 0}, life{
			0,
			0,
		}); err != nil {
			t.Error(err)
		}
	})
}
