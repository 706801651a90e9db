//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/metadata"

	"leasehold/e2e/harness"
)

const (
	syncDelay = 400 * time.Millisecond // of each sync on a slow disk
	longPause = 8 * time.Second        // of a member of etcd
	// shortPause of etcd's leader is so much shorter than the TTL that a lease
	// which was to be renewed when it began has not expired when it ends.
	shortPause = 3 * time.Second
	// overBudget is for how long a member must be away so that a leader who
	// depends on it has lost contact by then, at TTL 5 s.
	overBudget = 5 * time.Second
	stray      = "operator/" // prefix of keys that belong to no election
	syncing    = "--unsafe-no-fsync=false"
)

// etcdRows are faults of etcd itself. Which member they befall changes from
// trial to trial, so that those are hit that the candidates are connected to.
var etcdRows = []Row{
	{Name: "member-killed", Group: "etcd", About: "a member that follows is killed, and started again after 5 s",
		Members: 3, Untouched: true, Strike: follower(kill), Lasts: overBudget, Heal: restart},
	{Name: "member-paused", Group: "etcd", About: "a member that follows hangs for 8 s (SIGSTOP)",
		Members: 3, Untouched: true, CI: true, User: true, Strike: follower(pause), Lasts: longPause - silence, Heal: resume},
	{Name: "member-cut", Group: "etcd", About: "a member that follows is cut off from everybody for 5 s",
		Members: 3, Untouched: true, Strike: follower(cutOff), Lasts: overBudget, Heal: join},
	{Name: "etcd-leader-killed", Group: "etcd", About: "etcd's leader is killed, and started again after 5 s",
		Members: 3, Untouched: true, CI: true, User: true, Strike: leader(kill), Lasts: overBudget, Heal: deposed(restart)},
	{Name: "etcd-leader-paused", Group: "etcd", About: "etcd's leader hangs for 3 s, less than the rest of any lease's TTL",
		Members: 3, Untouched: true, Strike: leader(pause), Lasts: shortPause - silence, Heal: resume},
	{Name: "etcd-leader-paused-long", Group: "etcd", About: "etcd's leader hangs for 4.5 to 8 s, until leases have expired for it: when it wakes it may revoke them though they are renewed elsewhere (etcd #15247)",
		Members: 3, Either: true, Promise: Outside, Strike: pauseForLong, Heal: deposed(resume)},
	{Name: "etcd-leader-cut", Group: "etcd", About: "etcd's leader is cut off from everybody for 5 s",
		Members: 3, Untouched: true, Strike: leader(cutOff), Lasts: overBudget, Heal: deposed(join)},
	{Name: "etcd-leader-isolated", Group: "etcd", About: "etcd's leader is cut off from the other members, but not from the candidates, for 5 s",
		Members: 3, Untouched: true, Strike: leader(isolate), Lasts: overBudget, Heal: deposed(join)},
	{Name: "etcd-leader-moved", Group: "etcd", About: "etcd's leadership is moved on five times, once a second (etcdctl move-leader)",
		Members: 3, Untouched: true, Strike: moveLeaders},
	{Name: "all-restarted", Group: "etcd", About: "all members are restarted, one after the other",
		Members: 3, Untouched: true, Strike: restartInTurn},
	{Name: "all-restarted-at-once", Group: "etcd", About: "all members are killed at once, and started again",
		Members: 3, Untouched: true, Strike: restartAtOnce},
	{Name: "quorum-lost", Group: "etcd", About: "two of three members are killed, and started again after 8 s",
		Members: 3, Strike: killQuorum, Lasts: longPause, Heal: restoreQuorum},
	{Name: "stale-acknowledgement", Group: "etcd", About: "the leader reaches only one member, etcd's leader, and that hangs for most of the leader's time",
		Members: 3, Either: true, Change: onlyEtcdsLeader, Prepare: dependOnEtcdsLeader, Strike: stale(false, false)},
	{Name: "stale-acknowledgement-dark", Group: "etcd", About: "the same, and the road to it is dark as soon as it has woken",
		Members: 3, Change: onlyEtcdsLeader, Prepare: dependOnEtcdsLeader, Strike: stale(false, true)},
	{Name: "stale-acknowledgement-isolated", Group: "etcd", About: "the same, and when it wakes it can't hear that another leads, and acknowledges renewals for another second",
		Members: 3, Change: onlyEtcdsLeader, Prepare: dependOnEtcdsLeader, Strike: stale(true, false)},
	{Name: "stale-acknowledgement-isolated-long", Group: "etcd", About: "the same with a long TTL",
		Members: 3, TTL: 20 * time.Second, Change: onlyEtcdsLeader, Prepare: dependOnEtcdsLeader, Strike: stale(true, false)},
	{Name: "disk-slow", Group: "etcd", About: "the disk of one member is slow: 400 ms longer for each sync, while keys are written",
		Members: 3, Flags: []string{syncing}, Untouched: true, Strike: slowDisks(1)},
	{Name: "disks-slow", Group: "etcd", About: "the disks of all members are, so that etcd takes a second and more for whatever it is asked",
		Members: 3, Flags: []string{syncing}, Either: true, Strike: slowDisks(3)},
	{Name: "compaction", Group: "etcd", About: "all that has passed is compacted and each member defragmented, while no watch is connected",
		Members: 3, Proxied: true, Untouched: true, Strike: compaction},
	{Name: "token-expiry", Group: "etcd", About: "auth tokens expire, one after the other",
		Members: 3, TTL: 10 * time.Second, Flags: []string{"--auth-token-ttl=1"}, Auth: true, Untouched: true, Strike: tokenExpiry},
}

// A fault befalls one member of etcd.
type fault func(ctx context.Context, t *Trial, m *harness.Member) error

func kill(_ context.Context, _ *Trial, m *harness.Member) error {
	m.Kill()
	return nil
}

// silence is for how long pause waits for a member to answer nothing.
const silence = time.Second

func pause(ctx context.Context, _ *Trial, m *harness.Member) error {
	if err := m.Pause(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, silence)
	defer cancel()
	if _, err := m.Metric(ctx, "etcd_server_is_leader"); err == nil {
		return fmt.Errorf("etcd member %s answers, and should hang", m.Name)
	}
	<-ctx.Done()
	return nil
}

// pauseForLong pauses etcd's leader, for another time in each trial.
func pauseForLong(ctx context.Context, t *Trial) error {
	if err := leader(pause)(ctx, t); err != nil {
		return err
	}
	const least = 4500 * time.Millisecond
	return harness.Wait(ctx, t.At+least+time.Duration(spread(t.Index)*float64(longPause-least))-harness.Now())
}

// isolate cuts a member off from the others.
func isolate(_ context.Context, t *Trial, m *harness.Member) error {
	return noLoss(t.Network.Cut)(harness.LinksBetween(m.Node, otherNodes(t, m)...)...)
}

// cutOff cuts a member off from the others and from the candidates.
func cutOff(_ context.Context, t *Trial, m *harness.Member) error {
	return noLoss(t.Network.Cut)(harness.LinksBetween(m.Node, append(otherNodes(t, m), t.Leader.Node, t.Standby.Node)...)...)
}

func otherNodes(t *Trial, m *harness.Member) []*harness.Node {
	return slices.DeleteFunc(t.Etcd.Nodes(), func(n *harness.Node) bool { return n == m.Node })
}

// struck is where a trial notes the member that the fault befell.
const struck = "member"

func member(t *Trial) *harness.Member {
	m, _ := t.Notes[struck].(*harness.Member) // set by Strike, before anybody asks
	return m
}

// leader lets a fault befall etcd's leader.
func leader(f fault) func(context.Context, *Trial) error {
	return func(ctx context.Context, t *Trial) error {
		m, err := t.Etcd.Leader(ctx)
		if err != nil {
			return err
		}
		t.Notes[struck] = m
		t.Begin()
		return f(ctx, t, m)
	}
}

// follower lets a fault befall one of the other members.
func follower(f fault) func(context.Context, *Trial) error {
	return func(ctx context.Context, t *Trial) error {
		m, err := t.Etcd.Leader(ctx)
		if err != nil {
			return err
		}
		followers := slices.DeleteFunc(slices.Clone(t.Etcd.Members), func(other *harness.Member) bool { return other == m })
		t.Notes[struck] = followers[t.Index%len(followers)]
		t.Begin()
		return f(ctx, t, member(t))
	}
}

func restart(ctx context.Context, t *Trial) error {
	return errors.Join(member(t).Start(), t.Etcd.WaitHealthy(ctx))
}

func resume(ctx context.Context, t *Trial) error {
	return errors.Join(member(t).Continue(), t.Etcd.WaitHealthy(ctx))
}

func join(ctx context.Context, t *Trial) error {
	return errors.Join(somethingDropped(ctx, t), t.Network.Recover(), t.Etcd.WaitHealthy(ctx))
}

// deposed makes sure that etcd has another leader before the fault is ended.
func deposed(heal func(context.Context, *Trial) error) func(context.Context, *Trial) error {
	return func(ctx context.Context, t *Trial) error {
		_, err := successor(ctx, t, member(t))
		return errors.Join(err, heal(ctx, t))
	}
}

// successor waits until another member leads etcd.
func successor(ctx context.Context, t *Trial, old *harness.Member) (*harness.Member, error) {
	var leads *harness.Member
	err := within(ctx, patience, "no other leader of etcd", func(ctx context.Context) error {
		return harness.Until(ctx, func() error {
			for _, m := range t.Etcd.Members {
				if m == old {
					continue
				}
				if v, err := m.Metric(ctx, "etcd_server_is_leader"); err == nil && v == 1 {
					leads = m
					return nil
				}
			}
			return fmt.Errorf("etcd has no other leader than %s", old.Name)
		})
	})
	return leads, err
}

func moveLeaders(ctx context.Context, t *Trial) error {
	for range 5 {
		if err := harness.Wait(ctx, time.Second); err != nil {
			return err
		}
		old, err := t.Etcd.Leader(ctx)
		if err != nil {
			return err
		}
		at := slices.Index(t.Etcd.Members, old)
		if err := moveLeader(ctx, t, t.Etcd.Members[(at+1)%len(t.Etcd.Members)]); err != nil {
			return err
		}
	}
	return nil
}

// moveLeader makes a member the leader of etcd.
func moveLeader(ctx context.Context, t *Trial, to *harness.Member) error {
	list, err := t.Client.MemberList(ctx)
	if err != nil {
		return err
	}
	for _, m := range list.Members {
		if m.Name != to.Name {
			continue
		}
		if _, err := t.Etcd.Etcdctl(ctx, "move-leader", fmt.Sprintf("%x", m.ID)); err != nil {
			return err
		}
		return harness.Until(ctx, func() error {
			v, err := to.Metric(ctx, "etcd_server_is_leader")
			if err == nil && v != 1 {
				err = fmt.Errorf("%s does not lead etcd", to.Name)
			}
			return err
		})
	}
	return fmt.Errorf("etcd does not know its member %s", to.Name)
}

func restartInTurn(ctx context.Context, t *Trial) error {
	for i := range t.Etcd.Members {
		if err := t.Etcd.Members[(t.Index+i)%len(t.Etcd.Members)].Restart(ctx); err != nil {
			return err
		}
	}
	return nil
}

// restartAtOnce is an outage of all of etcd that must be shorter than the
// renewal budget: from a renewal that was due just then to stop-at.
func restartAtOnce(ctx context.Context, t *Trial) error {
	for _, m := range t.Etcd.Members {
		m.Kill()
	}
	for _, m := range t.Etcd.Members {
		if err := m.Start(); err != nil {
			return err
		}
	}
	if err := t.Etcd.WaitHealthy(ctx); err != nil {
		return err
	}
	outage := harness.Now() - t.At
	t.Figure("outage", outage)
	if budget := t.Row.ttl() / 2; outage > budget {
		return fmt.Errorf("etcd was away for %v, and this row is of an outage of up to %v", outage, budget)
	}
	return nil
}

func killQuorum(_ context.Context, t *Trial) error {
	for i, m := range t.Etcd.Members {
		if i != t.Index%len(t.Etcd.Members) {
			m.Kill()
		}
	}
	return nil
}

// restoreQuorum makes sure first that nobody runs. That leasehold's job died in
// time shows when the lease is taken by the time of the last renewal: etcd
// itself could not have told it anything.
func restoreQuorum(ctx context.Context, t *Trial) error {
	if t.Of.ours() {
		end := time.Duration(0)
		for _, term := range t.Witness.Terms() {
			if term.End == 0 {
				t.violated("a job of %s runs when etcd has had no quorum for %v", term.Candidate, harness.Now()-t.At)
			}
			end = max(end, term.End)
		}
		if dead := end - t.At; dead > t.Row.ttl() {
			t.violated("the job died %v after etcd had lost its quorum, later than the lease's end", dead)
		}
	}
	for i, m := range t.Etcd.Members {
		if i != t.Index%len(t.Etcd.Members) {
			if err := m.Start(); err != nil {
				return err
			}
		}
	}
	return t.Etcd.WaitHealthy(ctx)
}

// onlyEtcdsLeader has the leader of a peer know of no member but etcd's leader:
// its client takes turns, and would lose its lease for the others' sake.
// leasehold has to find out.
func onlyEtcdsLeader(t *Trial, cfg *harness.CandidateConfig) error {
	if t.Leader != nil || t.Of.ours() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := t.Etcd.Leader(ctx)
	if err != nil {
		return err
	}
	all := strings.Join(t.Etcd.Endpoints(), ",")
	for _, words := range [][]string{cfg.Args, cfg.Env} {
		for i := range words {
			words[i] = strings.ReplaceAll(words[i], all, m.ClientURL)
		}
	}
	return nil
}

// dependOnEtcdsLeader cuts the leader off from all members but etcd's leader,
// and waits until it is used to it.
func dependOnEtcdsLeader(ctx context.Context, t *Trial) error {
	m, err := t.Etcd.Leader(ctx)
	if err != nil {
		return err
	}
	t.Notes[struck] = m
	if err := t.Dark(t.Leader, otherNodes(t, m)...); err != nil {
		return err
	}
	if !t.Of.ours() {
		return harness.Wait(ctx, time.Second)
	}
	return t.calm(ctx)
}

// spread is a number from 0 to 1 for each trial. Those of the first few trials
// are spread as evenly as those of many.
func spread(index int) float64 {
	_, f := math.Modf(float64(index) * (math.Sqrt(5) - 1) / 2)
	return f
}

// stale is an acknowledgement of renewals by a member that led etcd, was paused,
// and does not yet know that another leads: what it grants is worth nothing.
// The pause ends at another moment in each trial, from when another leads to
// when the leader's time is up. The road to the member may be dark from when it
// has woken; or the member may be isolated, and then acknowledges renewals until
// it misses the others.
func stale(isolated, darkAfter bool) func(context.Context, *Trial) error {
	return func(ctx context.Context, t *Trial) error {
		m := member(t)
		if now, err := t.Etcd.Leader(ctx); err != nil {
			return err
		} else if now != m { // on a machine that is too busy etcd's leaders change by themselves
			if err := moveLeader(ctx, t, m); err != nil {
				return err
			}
		}
		probe, err := newProbe(ctx, t, m)
		if err != nil {
			return err
		}
		defer probe.close()
		t.Begin()
		// Before it hangs, or what the others have sent meanwhile would be there when it wakes.
		if isolated {
			if err := isolate(ctx, t, m); err != nil {
				return err
			}
		}
		if err := m.Pause(); err != nil {
			return err
		}
		if _, err := successor(ctx, t, m); err != nil {
			return err
		}
		// The leader's time is up 0.7 TTL after its last renewal, which was sent
		// at most 0.2 TTL before the pause.
		least, most := t.Row.ttl()*45/100, t.Row.ttl()*70/100
		until := t.At + least + time.Duration(float64(most-least)*spread(t.Index))
		if err := harness.Wait(ctx, until-harness.Now()); err != nil {
			return err
		}
		if err := m.Continue(); err != nil {
			return err
		}
		t.Figure("woken", harness.Now()-t.At)
		if darkAfter {
			if err := harness.Wait(ctx, time.Duration(float64(20*time.Millisecond)*spread(3*t.Index+1))); err != nil {
				return err
			}
			return t.Dark(t.Leader)
		}
		if isolated {
			return probe.acknowledged(ctx)
		}
		return nil // whether it acknowledges anything before it hears from the others is a matter of luck
	}
}

// probe renews a lease of its own at one member, as a candidate would.
type probe struct {
	trial  *Trial
	client *clientv3.Client
	lease  clientv3.LeaseID
	term   uint64 // of etcd when the lease was granted
}

func newProbe(ctx context.Context, t *Trial, at *harness.Member) (*probe, error) {
	granted, err := t.Client.Grant(ctx, 60)
	if err != nil {
		return nil, err
	}
	p := &probe{trial: t, lease: granted.ID, term: granted.RaftTerm}
	p.client, err = clientv3.New(clientv3.Config{Endpoints: []string{at.ClientURL}, Logger: zap.NewNop()})
	if err != nil {
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
	return within(ctx, 2*time.Second, "no stale acknowledgement", func(ctx context.Context) error {
		return harness.Until(ctx, func() error {
			ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			defer cancel()
			resp, err := p.client.KeepAliveOnce(ctx, p.lease)
			if err == nil && resp.RaftTerm != p.term {
				err = fmt.Errorf("the acknowledgement is of raft term %d, want %d", resp.RaftTerm, p.term)
			}
			return err
		})
	})
}

func (p *probe) close() {
	_ = p.client.Close()
	// Without it the lease would be taken for one that a candidate has left.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, _ = p.trial.Client.Revoke(ctx, p.lease)
}

// slowsDisks tells if the row's etcd syncs to its disk, for that to be slow.
func (r *Row) slowsDisks() bool { return slices.Contains(r.Flags, syncing) }

// slowDisks makes the disks of so many members slow for a while.
func slowDisks(n int) func(context.Context, *Trial) error {
	return func(ctx context.Context, t *Trial) error {
		var slowed []*harness.Member
		var before []syncs
		for i := range n {
			m := t.Etcd.Members[(t.Index+i)%len(t.Etcd.Members)]
			s, err := readSyncs(ctx, m)
			if err != nil {
				return err
			}
			slowed, before = append(slowed, m), append(before, s)
			end, err := m.SlowDisk(ctx, syncDelay)
			if err != nil {
				return err
			}
			defer end()
		}
		t.Begin()
		if err := writeFor(ctx, t, longPause); err != nil {
			return err
		}
		for i, m := range slowed {
			after, err := readSyncs(ctx, m)
			if err != nil {
				return err
			}
			count, took := after.count-before[i].count, after.seconds-before[i].seconds
			mean := time.Duration(took / max(count, 1) * float64(time.Second))
			if count < 3 || mean < syncDelay/2 {
				return fmt.Errorf("%s has synced %.0f times, for %v each: its disk was not slow", m.Name, count, mean)
			}
			t.Figure("sync", mean)
		}
		return nil
	}
}

// syncs are those of a member's log of what etcd has agreed on.
type syncs struct{ count, seconds float64 }

func readSyncs(ctx context.Context, m *harness.Member) (syncs, error) {
	const name = "etcd_disk_wal_fsync_duration_seconds_"
	count, err := m.Metric(ctx, name+"count")
	if err != nil {
		return syncs{}, err
	}
	seconds, err := m.Metric(ctx, name+"sum")
	return syncs{count, seconds}, err
}

// writeFor has two clients write keys for a while, for etcd syncs to disk only
// what is written, and renewals are not.
func writeFor(ctx context.Context, t *Trial, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var writers sync.WaitGroup
	for i := range 2 {
		writers.Go(func() {
			for ctx.Err() == nil {
				_, _ = t.Client.Put(ctx, fmt.Sprintf("%swriter-%d", stray, i), "") // how it fares is no matter
			}
		})
	}
	writers.Wait()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil
	}
	return context.Cause(ctx)
}

// compaction takes all watches' past away: their connections are closed, new
// ones hear nothing, and meanwhile etcd's revision goes on and what was before
// is compacted.
func compaction(ctx context.Context, t *Trial) error {
	var roads []*harness.Proxy
	for _, c := range []*Contestant{t.Leader, t.Standby} {
		roads = append(roads, c.Roads...)
	}
	for _, road := range roads {
		road.Cut(harness.BothWays)
		road.Drop()
	}
	first, err := t.Client.Put(ctx, stray+"compaction", "")
	if err != nil {
		return err
	}
	last := first
	for range 20 {
		if last, err = t.Client.Put(ctx, stray+"compaction", ""); err != nil {
			return err
		}
	}
	if _, err := t.Client.Compact(ctx, last.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		return err
	}
	for _, m := range t.Etcd.Members {
		if _, err := t.Client.Defragment(ctx, m.ClientURL); err != nil {
			return err
		}
	}
	if _, err := t.Client.Get(ctx, stray+"compaction", clientv3.WithRev(first.Header.Revision)); !errors.Is(err, rpctypes.ErrCompacted) {
		return fmt.Errorf("a read of the past gets %w, and it should be compacted", err)
	}
	t.Figure("compacted", harness.Now()-t.At)
	for _, road := range roads {
		road.Recover()
	}
	return nil
}

// tokenExpiry waits while the candidates' tokens expire. Etcd prolongs a simple
// token whenever it is used; this row's expire between two renewals.
func tokenExpiry(ctx context.Context, t *Trial) error {
	before, err := authentications(ctx, t)
	if err != nil {
		return err
	}
	own, err := t.Client.Authenticate(ctx, authUser, authPassword)
	if err != nil {
		return err
	}
	if err := harness.Wait(ctx, t.Row.ttl()); err != nil {
		return err
	}
	after, err := authentications(ctx, t)
	if err != nil {
		return err
	}
	if n := after - before - 1; t.Of.ours() && n < 2 {
		return fmt.Errorf("the candidates have authenticated %.0f times in a TTL, which should be more often", n)
	}
	// The operator's client would use a token of its own.
	client, err := clientv3.New(clientv3.Config{Endpoints: t.Etcd.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	withToken := metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, own.Token)
	_, err = pb.NewKVClient(client.ActiveConnection()).Range(withToken, &pb.RangeRequest{Key: []byte(prefix)})
	if err = rpctypes.Error(err); !errors.Is(err, rpctypes.ErrInvalidAuthToken) {
		return fmt.Errorf("a token of %v ago gets %w, and it should have expired", t.Row.ttl(), err)
	}
	return nil
}

// authentications is how often a password was checked so far.
func authentications(ctx context.Context, t *Trial) (float64, error) {
	sum := 0.0
	for _, m := range t.Etcd.Members {
		n, err := m.Metric(ctx, `grpc_server_handled_total{grpc_code="OK",grpc_method="Authenticate"`)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}
