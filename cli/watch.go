//go:build linux

package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/control"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/quote"
)

// nameWidth is how many columns a name takes at most in a line of watch.
const nameWidth = 32

// watchEvent is a line of watch --json.
type watchEvent struct {
	Revision   int64              `json:"revision" desc:"etcd's, at which it happened"`
	Event      string             `json:"event" desc:"what it is about"`
	What       string             `json:"what" desc:"what has happened"`
	Identity   *string            `json:"identity" desc:"of the leader, or of the candidate"`
	Token      *int64             `json:"token" desc:"its fencing token"`
	Candidates int                `json:"candidates" desc:"how many there are then"`
	Hold       *health.HoldStatus `json:"hold" desc:"of held"`
	To         *string            `json:"to" desc:"of a switchover: the wanted candidate"`
	By         *string            `json:"by" desc:"of a switchover: who has asked"`
	Why        *string            `json:"why" desc:"of refused"`
}

// WatchFields lists those of watch --json.
func WatchFields() []health.Field { return health.FieldsOf[watchEvent]() }

// watch prints how the election changes, until it is interrupted.
func (p *Program) watch(c Call) error {
	from := int64(0)
	if text, given := c.Options["--from"]; given {
		var err error
		if from, err = strconv.ParseInt(text, 10, 64); err != nil || from < 1 {
			return &UsageError{Hint: "--from takes a revision of etcd, a number from 1 on: " +
				c.Command.Usage()}
		}
	}
	return p.ask(c, func(a asked) error {
		err := p.untilInterrupted(a.ctx, func(ctx context.Context) error {
			return p.follow(ctx, a, from)
		})
		var future *election.FutureError
		var printing *printError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &future):
			return &UsageError{Hint: fmt.Sprintf("--from %d: %v", from, future)}
		case errors.As(err, &printing):
			return err
		}
		keys := control.SteeringError(a.ctx, a.client, a.name, err)
		keys.Permission = "read"
		return a.failedKeys(keys)
	})
}

// A printError is a line that could not be printed.
type printError struct{ err error }

func (e *printError) Error() string { return "print: " + e.err.Error() }
func (e *printError) Unwrap() error { return e.err }

// untilInterrupted does the work until it ends, or SIGINT or SIGTERM comes, or nobody reads
// standard output any more.
func (p *Program) untilInterrupted(
	ctx context.Context, work func(ctx context.Context) error,
) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	ended, worked := make(chan error, 2), make(chan struct{})
	go func() {
		defer close(worked)
		ended <- work(ctx)
	}()
	go func() { ended <- p.whenUnread() }()
	select {
	case <-ctx.Done():
		// It uses the connections to etcd, which are about to be closed.
		select {
		case <-worked:
		case <-time.After(100 * time.Millisecond): // a write to standard output is blocked
		}
	case err := <-ended:
		if ctx.Err() == nil {
			stop()
			return err
		}
	}
	// The process exits at once. The signals stay caught until then: timeout(1) sends one twice, to
	// the process and to its group, and the second one would end it with another exit code.
	return nil
}

// follow prints the changes.
func (p *Program) follow(ctx context.Context, a asked, from int64) error {
	return a.client.Follow(ctx, from, &control.Watch{
		Election: a.name,
		Show: func(e control.Event) error {
			text := watchLine(e)
			if a.call.Has("--json") {
				var err error
				if text, err = quote.JSON(newWatchEvent(e), ""); err != nil {
					return &printError{err}
				}
			}
			if _, err := io.WriteString(p.Stdout, text); err != nil {
				return &printError{err}
			}
			return nil
		},
		LostEtcd: func(err error) {
			_, _ = fmt.Fprintf(p.Stderr, "leasehold: watch: %s; it goes on when etcd answers\n",
				a.client.Explain(err, "read", "the keys"))
		},
	})
}

// whenUnread returns when nobody reads standard output any more. Otherwise only the next event
// would show that.
func (p *Program) whenUnread() error {
	file, ok := p.Stdout.(*os.File)
	if !ok {
		select {}
	}
	poll := []unix.PollFd{{Fd: int32(file.Fd())}}
	for {
		n, err := unix.Poll(poll, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return &printError{err}
		}
		if n > 0 {
			break
		}
	}
	// This write ends us as it ends any filter: by SIGPIPE.
	_, err := io.WriteString(file, "\n")
	return &printError{cmp.Or(err, error(unix.EPIPE))}
}

func newWatchEvent(e control.Event) watchEvent {
	out := watchEvent{
		Revision: e.Revision, Event: string(e.Kind), What: e.What, Token: orNull(e.Token),
		Candidates: e.Candidates,
	}
	if e.Token != 0 {
		out.Identity = &e.Identity
	}
	if h := e.Hold; h != nil {
		out.Hold = (&health.Hold{
			By: h.By, Reason: h.Reason, Since: h.Since, Until: h.Until, Stop: h.Stop,
		}).Status()
	}
	if s := e.Switchover; s != nil {
		out.To, out.By, out.Why = orNull(s.To), orNull(s.By), orNull(s.Why)
	}
	return out
}

// watchLine is an event as a line that a terminal shows.
func watchLine(e control.Event) string {
	name := func(text string) string { return fit(quote.Printable(quote.Word(text)), nameWidth) }
	text := e.What
	switch e.What {
	case control.Leads:
		text = fmt.Sprintf("%s leads, token %d", name(e.Identity), e.Token)
	case control.Nobody:
		text = "nobody leads"
	case control.Joined, control.Left:
		text = fmt.Sprintf("%s %s, candidates: %d", name(e.Identity), e.What, e.Candidates)
	case control.Held:
		text = "held by " + name(e.Hold.By)
		if e.Hold.Stop {
			text += ", the leader resigns"
		}
		if e.Hold.Reason != "" {
			text += ": " + e.Hold.Reason
		}
	case control.Asked:
		to := "the next one"
		if e.Switchover.To != "" {
			to = name(e.Switchover.To)
		}
		text = fmt.Sprintf("asked by %s, to %s", name(e.Switchover.By), to)
	case string(control.Refused):
		text = "refused: " + e.Switchover.Why
	case control.Resumed:
		text = "etcd has no older changes, it goes on here"
	}
	line := quote.Printable(fmt.Sprintf("%-8d  %-10s  %s", e.Revision, e.Kind, text))
	return strings.TrimRight(fit(line, tableWidth), " ") + "\n"
}
