//go:build linux

package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"strconv"
	"time"

	"leasehold/config"
	"leasehold/control"
	"leasehold/election"
	"leasehold/internal/quote"
)

// An EtcdError ends a command because etcd does not answer, or refuses.
type EtcdError struct {
	Command string
	Err     error
}

func (e *EtcdError) Error() string { return e.Command + ": " + e.Err.Error() }

func (e *EtcdError) Unwrap() error { return e.Err }

// asked is the election that a command is about, and a client of its etcd.
type asked struct {
	name   string
	ctx    context.Context
	client *election.Client
	cfg    config.Config
	call   Call
}

// ask calls the command with the election that the call names.
func (p *Program) ask(c Call, command func(a asked) error) error {
	return p.askFor(c, config.ForStatus, command)
}

// askFor does so for a use of the configuration.
func (p *Program) askFor(c Call, use config.Use, command func(a asked) error) error {
	if len(c.Args) == 1 {
		if err := os.Setenv(config.Prefix+"_ELECTION", c.Args[0]); err != nil {
			return &UsageError{Hint: c.Command.Name +
				" can't ask for that election: its name holds a NUL"}
		}
	}
	cfg, err := config.Load(use)
	if err != nil {
		return err
	}
	log := slog.New(cfg.Log.Handler(p.Stderr, cfg.Log.Level.Level))
	client, err := election.Connect(cfg.ElectionConfig(log))
	if err != nil {
		return &EtcdError{c.Command.Name, err}
	}
	defer client.Close()
	return command(asked{cfg.Election, context.Background(), client, cfg, c})
}

// failed is the error of a request that steers the election.
func (a asked) failed(err error) error {
	var usage *UsageError
	if err == nil || errors.As(err, &usage) {
		return err
	}
	return a.failedKeys(control.SteeringError(a.ctx, a.client, a.name, err))
}

// hold keeps everybody from becoming leader.
func (p *Program) hold(c Call) error {
	lasts, err := c.Duration("--for", 0)
	if err != nil {
		return err
	}
	return p.ask(c, func(a asked) error {
		h := control.Hold{
			By: operator(), Since: time.Now().UTC(), Reason: c.Options["--reason"],
			Stop: c.Has("--stop"),
		}
		var lease int64
		if lasts > 0 {
			if lease, lasts, err = a.client.Grant(a.ctx, lasts); err != nil {
				return a.failed(err)
			}
			h.Until = h.Since.Add(lasts)
		}
		h, leader, err := control.SetHold(a.ctx, a.client, a.name, h, lease)
		if err != nil {
			return a.failed(err)
		}
		_, err = fmt.Fprintf(p.Stdout, "%s: held%s\n", quote.Printable(a.name), heldText(h, leader))
		return err
	})
}

// heldText says until when the election is held, and what becomes of the leader.
func heldText(h control.Hold, leader string) string {
	text := "; nobody leads"
	if h.Stop {
		text = "; whoever leads is asked to stop its job"
	}
	if leader != "" {
		does := "leads and goes on"
		if h.Stop {
			does = "is asked to stop its job"
		}
		text = fmt.Sprintf("; %s %s, token %d", quote.Value(leader), does, h.Token)
	}
	if !h.Until.IsZero() {
		text = " until " + h.Until.UTC().Format(time.RFC3339) + text
	}
	return text
}

// release ends a hold.
func (p *Program) release(c Call) error {
	return p.ask(c, func(a asked) error {
		h, err := control.Release(a.ctx, a.client, a.name)
		if err != nil {
			return a.failed(err)
		}
		text := "there was no hold"
		if h != nil {
			text = "released; it was held by " + quote.Printable(h.By) + " since " +
				h.Since.UTC().Format(time.RFC3339)
		}
		_, err = fmt.Fprintf(p.Stdout, "%s: %s\n", quote.Printable(a.name), text)
		return err
	})
}

// operator is who runs the command: user@host.
func operator() string {
	name := strconv.Itoa(os.Getuid())
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	host, err := os.Hostname()
	if err != nil {
		host = "?"
	}
	return name + "@" + host
}
