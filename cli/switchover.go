//go:build linux

package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/control"
	"leasehold/election"
	"leasehold/internal/quote"
)

// ErrTimeout ends a switchover, or a wait, that was not done in time.
var ErrTimeout = errors.New("not done in time")

// A RefusedError ends a switchover that was refused, or that another candidate has won than was
// asked for.
type RefusedError struct{ Why string }

func (e *RefusedError) Error() string { return e.Why }

// pollInterval is how often a switchover looks how it goes on. The downtime that it prints is as
// exact as that.
const pollInterval = 20 * time.Millisecond

// switchover asks the leader to hand over, and waits until another candidate leads.
func (p *Program) switchover(c Call) error {
	timeout, err := c.Duration("--timeout", time.Minute)
	if err != nil {
		return err
	}
	return p.ask(c, func(a asked) error {
		ctx, stop := signal.NotifyContext(a.ctx, os.Interrupt, unix.SIGTERM)
		defer stop()
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		lease, _, err := a.client.Grant(ctx, timeout+time.Second)
		for err != nil && election.MayPass(err) && ctx.Err() == nil { // etcd elects a leader
			lease, _, err = a.client.Grant(ctx, timeout+time.Second)
		}
		if err != nil {
			return a.failed(err)
		}
		defer func() { // it withdraws the request
			ctx, cancel := context.WithTimeout(context.WithoutCancel(a.ctx), time.Second)
			defer cancel()
			_ = a.client.Revoke(ctx, lease) // else it expires
		}()
		s := switchover{asked: a, lease: lease, out: p.Stdout, want: control.Switchover{
			ID: strconv.FormatUint(rand.Uint64(), 16), To: c.Options["--to"], By: operator(),
		}}
		return s.run(ctx)
	})
}

// switchover is one request.
type switchover struct {
	asked
	lease int64
	want  control.Switchover
	out   io.Writer

	seen     control.Switchover // the request as etcd had it last
	looked   time.Time          // when that was
	accepted time.Time          // the last look before it was accepted; zero: it was not
	from     string             // the identity of the leader that was asked first
}

// run returns when another candidate leads, or the request was refused, or ctx ends.
func (s *switchover) run(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var trouble error
	for {
		done, err := s.step(ctx)
		var refused *RefusedError
		switch {
		case err == nil && done:
			return nil
		case errors.As(err, &refused):
			return err
		case err != nil && ctx.Err() == nil && !election.MayPass(err):
			return s.failed(err)
		case err != nil:
			trouble = err
		}
		select {
		case <-ctx.Done():
			return s.timeout(ctx, trouble)
		case <-tick.C:
		}
	}
}

// timeout withdraws the request when the time is over, and says what has become of it.
func (s *switchover) timeout(ctx context.Context, trouble error) error {
	if s.seen.ID == "" && trouble != nil {
		return s.failed(trouble)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	for {
		p, err := control.ReadProgress(ctx, s.client, s.name)
		switch {
		case err != nil:
			return fmt.Errorf("%w: etcd does not answer; the request ends within a minute or two,"+
				" unless %s serves it until then", ErrTimeout, quote.Value(s.from))
		case p.Asked != nil && p.Asked.ID == s.want.ID && p.Asked.Answer == control.Accepted:
			return fmt.Errorf("%w: %s still stops its job, and hands over then",
				ErrTimeout, quote.Value(s.from))
		case p.Asked != nil && p.Asked.ID == s.want.ID && p.Asked.Answer == "":
			done, err := control.WithdrawSwitchover(ctx, s.client, s.name, p)
			if err != nil || !done {
				continue
			}
		}
		return fmt.Errorf("%w: %s has not answered; the request is withdrawn",
			ErrTimeout, quote.Value(s.from))
	}
}

// step looks how the request is served. It reports whether that has ended.
func (s *switchover) step(ctx context.Context) (done bool, err error) {
	before := s.looked
	s.looked = time.Now()
	p, err := control.ReadProgress(ctx, s.client, s.name)
	if err != nil {
		return false, err
	}
	ours := p.Asked != nil && p.Asked.ID == s.want.ID
	if ours {
		s.seen = *p.Asked
		if s.accepted.IsZero() && p.Asked.Answer == control.Accepted {
			s.accepted = before
		}
	}
	switch {
	case ours && p.Asked.Answer == control.Refused:
		return false, &RefusedError{"refused: " + quote.Line(p.Asked.Why)}
	case p.Hold != nil && p.Token != p.Hold.Token && s.seen.ID != "":
		return false, &RefusedError{"nobody leads: the election is held by " +
			quote.Printable(p.Hold.By)}
	case s.seen.ID == "":
		return s.ask(ctx, p)
	case p.Token == 0 || p.Token == s.seen.Token:
		if !ours && s.accepted.IsZero() {
			return false, &RefusedError{"somebody has withdrawn the request"}
		}
		return false, nil
	case s.want.To == "" || p.Leader == s.want.To:
		return true, s.report(p)
	case !s.accepted.IsZero():
		return false, &RefusedError{fmt.Sprintf("%s has gone meanwhile: %s leads, token %d",
			quote.Value(s.want.To), quote.Value(p.Leader), p.Token)}
	}
	return s.ask(ctx, p) // the leader that was asked has gone
}

// ask asks who is the first now.
func (s *switchover) ask(ctx context.Context, p control.Progress) (done bool, err error) {
	switch {
	case p.Asked != nil && p.Asked.ID != s.want.ID:
		to := "the next one"
		if p.Asked.To != "" {
			to = quote.Value(p.Asked.To)
		}
		return false, &RefusedError{fmt.Sprintf("refused: %s has asked for a switchover to %s",
			quote.Printable(p.Asked.By), to)}
	case p.Token == 0:
		return false, &RefusedError{"refused: there is no candidate"}
	case p.Hold != nil:
		return false, &RefusedError{"refused: the election is held by " +
			quote.Printable(p.Hold.By)}
	case p.Leader == s.want.To:
		_, err := fmt.Fprintf(s.out, "%s: %s leads already, token %d\n",
			quote.Printable(s.name), quote.Value(p.Leader), p.Token)
		return true, err
	}
	s.from = cmp.Or(s.from, p.Leader)
	return false, control.AskSwitchover(ctx, s.client, s.name, s.want, s.lease, p)
}

// report prints who leads.
func (s *switchover) report(p control.Progress) error {
	text := fmt.Sprintf("%s: %s leads, token %d", quote.Printable(s.name),
		quote.Value(p.Leader), p.Token)
	if !s.accepted.IsZero() {
		text += fmt.Sprintf("; nobody led for %v at most",
			time.Since(s.accepted).Round(10*time.Millisecond))
	}
	_, err := fmt.Fprintln(s.out, text)
	return err
}
