//go:build linux

package fault

import (
	"context"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

// After is what follows when the member of StaleAcknowledgement wakes.
type After string

// What follows.
const (
	Rejoined    After = ""             // it hears from the others
	CutOffAgain After = "-unreachable" // the machine can't reach it any more
	Isolated    After = "-isolated"    // it hears from no other member
)

// StaleAcknowledgement is one of renewals by a member that led etcd, was paused,
// and does not yet know that another leads: what it grants is worth nothing. The
// machine reaches no other member. The pause ends at another moment in each trial,
// from when another leads to when the machine's time is up.
func StaleAcknowledgement(after After) Fault {
	return Fault{
		Name:      "stale-acknowledgement" + string(after),
		Configure: onlyEtcdsLeader,
		Prepare:   dependOnEtcdsLeader,
		Inject: func(ctx context.Context, on *Target) error {
			m := on.Member
			// On a machine that is too busy etcd's leaders change by themselves.
			if err := on.Etcd.MoveLeader(ctx, m); err != nil {
				return err
			}
			p, err := newProbe(ctx, on, m)
			if err != nil {
				return err
			}
			defer p.close()
			on.Begin()
			// Before it hangs, or what the others have sent meanwhile would be there when it wakes.
			if after == Isolated {
				if err := MemberIsolated(Given).Inject(ctx, on); err != nil {
					return err
				}
			}
			if err := m.Pause(); err != nil {
				return err
			}
			if _, err := on.Etcd.Successor(ctx, m); err != nil {
				return err
			}
			// The machine's time is up 0.7 TTL after its last renewal, which was sent
			// at most 0.2 TTL before the pause.
			least, most := on.TTL*45/100, on.TTL*70/100
			until := on.Began + least + time.Duration(float64(most-least)*Spread(on.Trial))
			if err := harness.Wait(ctx, until-harness.Now()); err != nil {
				return err
			}
			if err := m.Continue(); err != nil {
				return err
			}
			on.Figure("woken", harness.Now()-on.Began)
			switch after {
			case CutOffAgain:
				soon := time.Duration(float64(20*time.Millisecond) * Spread(3*on.Trial+1))
				if err := harness.Wait(ctx, soon); err != nil {
					return err
				}
				return Unreachable().Inject(ctx, on)
			case Isolated:
				return p.acknowledged(ctx)
			}
			return nil // whether it acknowledges anything before it hears is a matter of luck
		},
	}
}

// onlyEtcdsLeader has the leader of other implementations know of no member but etcd's leader: its
// client takes turns, and would lose its lease for the others' sake. leasehold has to find out.
func onlyEtcdsLeader(on *Target, cfg *harness.CandidateConfig) error {
	if on.Machine.Implementation.Ours() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), harness.WaitTimeout)
	defer cancel()
	m, err := on.Etcd.Leader(ctx)
	if err != nil {
		return err
	}
	all := strings.Join(on.Etcd.Endpoints(), ",")
	for _, words := range [][]string{cfg.Args, cfg.Env} {
		for i := range words {
			words[i] = strings.ReplaceAll(words[i], all, m.ClientURL)
		}
	}
	return nil
}

// dependOnEtcdsLeader cuts the machine off from all members but etcd's leader, and
// waits until it is used to that.
func dependOnEtcdsLeader(ctx context.Context, on *Target) (err error) {
	if on.Member, err = on.Etcd.Leader(ctx); err != nil {
		return err
	}
	if err := Unreachable(on.Etcd.Except(on.Member)...).Inject(ctx, on); err != nil {
		return err
	}
	if !on.Machine.Implementation.Ours() {
		return harness.Wait(ctx, time.Second)
	}
	if err := harness.Wait(ctx, 2*time.Second); err != nil {
		return err
	}
	return harness.Within(ctx, on.TTL, "no renewals", func(ctx context.Context) error {
		return on.Machine.WaitRenewals(ctx, 2)
	})
}

// probe renews a lease of its own at one member, as a candidate would.
type probe struct {
	on     *Target
	client *clientv3.Client
	lease  clientv3.LeaseID
	term   uint64 // of etcd when the lease was granted
}

func newProbe(ctx context.Context, on *Target, at *harness.Member) (*probe, error) {
	granted, err := on.Client.Grant(ctx, 60)
	if err != nil {
		return nil, err
	}
	p := &probe{on: on, lease: granted.ID, term: granted.RaftTerm}
	if p.client, err = on.Etcd.NewClient(at.ClientURL); err != nil {
		return nil, err
	}
	if _, err := p.client.KeepAliveOnce(ctx, p.lease); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// acknowledged makes sure that the member acknowledges renewals as the leader
// that it no longer is. Those that it finds when it wakes it may not answer.
func (p *probe) acknowledged(ctx context.Context) error {
	const otherwise = "no stale acknowledgement"
	return harness.UntilWithin(ctx, 2*time.Second, otherwise, func() error {
		ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		resp, err := p.client.KeepAliveOnce(ctx, p.lease)
		if err == nil && resp.RaftTerm != p.term {
			err = fmt.Errorf("the acknowledgement is of raft term %d, want %d",
				resp.RaftTerm, p.term)
		}
		return err
	})
}

func (p *probe) close() {
	_ = p.client.Close()
	// Without it the lease would be taken for one that a candidate has left.
	ctx, cancel := context.WithTimeout(context.Background(), harness.WaitTimeout)
	defer cancel()
	_, _ = p.on.Client.Revoke(ctx, p.lease)
}
