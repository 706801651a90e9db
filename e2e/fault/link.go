//go:build linux

package fault

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"leasehold/e2e/harness"
)

// A fault of the links between the machine and etcd loses packets, and closes no
// connection. On 127.0.0.1 the machine's proxies pass nothing on. The fault is
// of the links to the given members of etcd; without any, to all.

// Unreachable loses every packet, both ways.
func Unreachable(members ...*harness.Member) Fault {
	return lossy("link-unreachable", 100, true, true, members)
}

// OutboundLost loses the packets to etcd; those from etcd arrive.
func OutboundLost(members ...*harness.Member) Fault {
	return lossy("link-one-way-out", 100, true, false, members)
}

// InboundLost loses the packets from etcd; those to etcd arrive.
func InboundLost(members ...*harness.Member) Fault {
	return lossy("link-one-way-in", 100, false, true, members)
}

// Lossy loses so many of a hundred packets each way.
func Lossy(percent int, members ...*harness.Member) Fault {
	return lossy("link-lossy", percent, true, true, members)
}

func lossy(name string, percent int, out, in bool, members []*harness.Member) Fault {
	var loss *harness.Loss
	return Fault{
		Name: name,
		Inject: func(_ context.Context, on *Target) (err error) {
			if on.Network == nil {
				on.Machine.SetReachable(false)
				return nil
			}
			loss, err = on.Network.Lose(percent, on.links(out, in, members)...)
			return err
		},
		Recover: func(_ context.Context, on *Target) error {
			if loss == nil {
				on.Machine.SetReachable(true)
				return nil
			}
			return loss.End()
		},
		Verify: dropped,
	}
}

// links are those between the machine and members of etcd.
func (on *Target) links(out, in bool, members []*harness.Member) (links []harness.Link) {
	machine, nodes := []*harness.Node{on.Machine.Node}, on.Etcd.Nodes(members...)
	if out {
		links = append(links, harness.Links(machine, nodes)...)
	}
	if in {
		links = append(links, harness.Links(nodes, machine)...)
	}
	return links
}

// dropped returns an error if no packet was dropped: then there was no fault.
func dropped(ctx context.Context, on *Target) error {
	if on.Network == nil {
		return nil // proxies don't count
	}
	packets, err := on.Network.Dropped(ctx)
	if err == nil && packets == 0 {
		err = errors.New("no packet was dropped")
	}
	return err
}

// Flapping makes the links unreachable and good in turns, each for a period.
func Flapping(period time.Duration, members ...*harness.Member) Fault {
	var (
		packets  atomic.Int64
		failed   error
		flapping sync.WaitGroup
		stop     context.CancelFunc
	)
	flap := func(ctx context.Context, on *Target) error {
		loss, err := on.Network.Cut(on.links(true, true, members)...)
		if err != nil {
			return err
		}
		_ = harness.Wait(ctx, period) // Recover may end it early
		n, err := on.Network.Dropped(context.WithoutCancel(ctx))
		packets.Add(int64(n))
		return errors.Join(err, loss.End())
	}
	return Fault{
		Name: "link-flapping",
		Inject: func(ctx context.Context, on *Target) error {
			ctx, stop = context.WithCancel(context.WithoutCancel(ctx))
			flapping.Go(func() {
				for ctx.Err() == nil && failed == nil {
					failed = flap(ctx, on)
					_ = harness.Wait(ctx, period) // the same
				}
			})
			return nil
		},
		Recover: func(context.Context, *Target) error {
			stop()
			flapping.Wait()
			return failed
		},
		Verify: func(context.Context, *Target) error {
			if packets.Load() == 0 {
				return errors.New("no packet was dropped")
			}
			return nil
		},
	}
}

// Slow delays what passes between the machine and etcd, each way, on the
// connections that there are and on new ones. The machine must have proxies.
func Slow(delay time.Duration) Fault {
	set := func(on *Target, d time.Duration) error {
		for _, p := range on.Machine.Proxies {
			p.SetDelay(d)
		}
		return nil
	}
	return Fault{
		Name:    "link-slow",
		Inject:  func(_ context.Context, on *Target) error { return set(on, delay) },
		Recover: func(_ context.Context, on *Target) error { return set(on, 0) },
		Verify: func(ctx context.Context, on *Target) error {
			for _, p := range on.Machine.Proxies {
				client, err := on.Etcd.NewClient("http://" + p.Addr())
				if err != nil {
					return err
				}
				began := harness.Now()
				_, err = client.Status(ctx, client.Endpoints()[0])
				_ = client.Close()
				if took := harness.Now() - began; err == nil && took < 2*delay {
					err = fmt.Errorf("a request on the slow link took no more than %v", took)
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
}
