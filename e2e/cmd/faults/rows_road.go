//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"leasehold/e2e/harness"
)

const (
	slowRoad  = 200 * time.Millisecond // each way
	lossyRoad = 30                     // percent, each way
	flaps     = 5
	flap      = time.Second // dark, and then open
)

// roadRows are faults of the road between the leader and etcd, at the level of
// packets: no connection is closed by them. The standby's road is never
// touched.
var roadRows = []Row{
	{Name: "road-dark", Group: "road", About: "the road to etcd is dark: every packet is lost",
		Members: 3, CI: true, User: true, Strike: dark, After: somethingDropped},
	{Name: "road-one-way-out", Group: "road", About: "packets to etcd are lost, those from etcd arrive",
		Members: 3, After: somethingDropped,
		Strike: func(_ context.Context, t *Trial) error {
			return noLoss(t.Network.Cut)(waysFrom(t.Leader.Node, t.Etcd.Nodes())...)
		}},
	{Name: "road-one-way-in", Group: "road", About: "packets from etcd are lost, those to etcd arrive",
		Members: 3, CI: true, After: somethingDropped,
		Strike: func(_ context.Context, t *Trial) error {
			return noLoss(t.Network.Cut)(waysTo(t.Leader.Node, t.Etcd.Nodes())...)
		}},
	{Name: "road-slow", Group: "road", About: "the road to etcd is slow: 200 ms longer each way",
		Members: 3, Proxied: true, Untouched: true, Strike: slow, Lasts: 6 * time.Second, Heal: slowIndeed},
	{Name: "road-lossy", Group: "road", About: "the road to etcd loses 30 % of the packets each way, for 8 s; TCP may stall for longer than the budget",
		Members: 3, Either: true, Strike: lossy, Lasts: 8 * time.Second, Heal: stillLossy},
	{Name: "road-lossy-long", Group: "road", About: "the same for 20 s, with the default TTL",
		Members: 3, TTL: 15 * time.Second, Either: true, Strike: lossy, Lasts: 20 * time.Second, Heal: stillLossy},
	{Name: "road-flapping", Group: "road", About: "the road to etcd is dark for a second and open for a second, five times",
		Members: 3, Untouched: true, Strike: flapping},
}

func dark(_ context.Context, t *Trial) error { return t.Dark(t.Leader) }

func waysFrom(a *harness.Node, others []*harness.Node) []harness.Link {
	var ways []harness.Link
	for _, b := range others {
		ways = append(ways, harness.Link{From: a, To: b})
	}
	return ways
}

func waysTo(a *harness.Node, others []*harness.Node) []harness.Link {
	var ways []harness.Link
	for _, b := range others {
		ways = append(ways, harness.Link{From: b, To: a})
	}
	return ways
}

// somethingDropped is an error if the cuts that there are have met no packet:
// then they were no fault.
func somethingDropped(ctx context.Context, t *Trial) error {
	packets, err := t.Network.Dropped(ctx)
	if err == nil && packets == 0 {
		err = errors.New("no packet was dropped")
	}
	return err
}

func lossy(_ context.Context, t *Trial) error {
	_, err := t.Network.Lose(lossyRoad, harness.LinksBetween(t.Leader.Node, t.Etcd.Nodes()...)...)
	return err
}

func stillLossy(ctx context.Context, t *Trial) error {
	return errors.Join(somethingDropped(ctx, t), t.Network.Recover())
}

// slow makes the leader's roads to etcd longer, on connections that there are
// as on new ones.
func slow(_ context.Context, t *Trial) error {
	for _, road := range t.Leader.Roads {
		road.SetDelay(slowRoad)
	}
	return nil
}

// slowIndeed takes a request along each of the leader's roads, and makes them
// as short as they were.
func slowIndeed(ctx context.Context, t *Trial) error {
	for _, road := range t.Leader.Roads {
		began := harness.Now()
		if err := ask(ctx, road.Addr()); err != nil {
			return err
		}
		took := harness.Now() - began
		if took < 2*slowRoad {
			return fmt.Errorf("a request on the slow road took no more than %v", took)
		}
		road.SetDelay(0)
	}
	return nil
}

// ask asks an etcd for its version.
func ask(ctx context.Context, addr string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/version", nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

func flapping(ctx context.Context, t *Trial) error {
	dropped := 0
	for range flaps {
		if err := t.Dark(t.Leader); err != nil {
			return err
		}
		if err := harness.Wait(ctx, flap); err != nil {
			return err
		}
		packets, err := t.Network.Dropped(ctx)
		if err != nil {
			return err
		}
		dropped += packets
		if err := t.Network.Recover(); err != nil {
			return err
		}
		if err := harness.Wait(ctx, flap); err != nil {
			return err
		}
	}
	if dropped == 0 {
		return errors.New("no packet was dropped")
	}
	return nil
}

// noLoss is for losses that Network.Recover ends.
func noLoss(f func(...harness.Link) (*harness.Loss, error)) func(...harness.Link) error {
	return func(links ...harness.Link) error {
		_, err := f(links...)
		return err
	}
}
