//go:build linux

package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"leasehold/config"
	"leasehold/health"
)

// waitInterval is the time between two questions.
const waitInterval = 200 * time.Millisecond

// wait returns when the local daemon is what was asked for. It asks again and again: the answer is
// never older than the last question.
func (p *Program) wait(c Call) error {
	timeout, err := c.Duration("--timeout", 0)
	if err != nil {
		return err
	}
	cfg, err := config.Load(config.ForCheck)
	if err != nil {
		return err
	}
	ctx := context.Background()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	tick := time.NewTicker(waitInterval)
	defer tick.Stop()
	reason := "no answer"
	for {
		var answer strings.Builder
		err := health.Check(ctx, cfg.Listen, c.Args[0], &answer)
		if ctx.Err() == nil && !errors.Is(err, health.ErrNo) {
			return err
		}
		if text := strings.TrimSpace(answer.String()); text != "" {
			reason = text
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %s", ErrTimeout, reason)
		case <-tick.C:
		}
	}
}
