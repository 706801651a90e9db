//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// done is a fault as it was carried out.
type done struct {
	fault
	span
	idle bool // there was nothing to hit
}

// executor carries the schedule out, one step at a time in a single goroutine,
// so that faults that last overlap and steps do not.
type executor struct {
	*stage
	ctx   context.Context
	steps []step // what is yet to come of faults that have begun
	// disturbed is when a candidate or member, by name, was last under a fault that
	// keeps it from hearing.
	disturbed map[string]time.Duration
}

type step struct {
	at time.Duration
	do func() error
	// heals: without it something would stay broken.
	heals bool
}

// execute returns when the last fault is healed.
func (s *stage) execute(ctx context.Context) (err error) {
	x := &executor{stage: s, ctx: ctx, disturbed: map[string]time.Duration{}}
	defer s.busy.Wait()
	defer func() {
		for _, st := range x.steps { // only after an error there are any
			if st.heals {
				_ = st.do() // there is an error already
			}
		}
	}()
	s.faulted.from = harness.Now()
	for i := 0; i < len(s.schedule) || len(x.steps) > 0; {
		next := step{at: forever}
		if i < len(s.schedule) {
			next.at = s.faulted.from + s.schedule[i].at
		}
		slices.SortStableFunc(x.steps, func(a, b step) int { return int(a.at - b.at) })
		later := len(x.steps) > 0 && x.steps[0].at <= next.at
		if later {
			next = x.steps[0]
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(next.at - harness.Now()):
		}
		if later {
			x.steps = x.steps[1:]
			err = next.do()
		} else {
			err = x.begin(s.schedule[i])
			i++
		}
		if err != nil {
			return err
		}
	}
	s.busy.Wait()
	s.faulted.to = harness.Now()
	s.check.note("the last fault is healed")
	return context.Cause(ctx)
}

// later has the fault healed when it has lasted long enough.
func (x *executor) later(f fault, whom string, heal func() error) {
	n := len(x.done)
	x.steps = append(x.steps, step{at: harness.Now() + f.lasts, heals: true, do: func() error {
		err := heal()
		x.done[n-1].to = harness.Now()
		x.check.note("  #%d healed: %s", f.number, f.deed(whom))
		return err
	}})
}

func (x *executor) begin(f fault) error {
	now := harness.Now()
	x.done = append(x.done, done{fault: f, span: span{now, now}})
	var err error
	switch f.what {
	case onCandidate:
		c := x.candidate(f, func(c *candidate) bool { return !c.hit && c.running() != nil })
		if c == nil {
			return x.nothing(f)
		}
		err = x.hitCandidate(f, c)
	case onRoad:
		err = x.hitRoad(f, x.candidate(f, func(*candidate) bool { return true }))
	case onMember:
		m := x.member(f)
		if m == nil {
			return x.nothing(f)
		}
		err = x.hitMember(f, m)
	case onEtcd:
		err = x.hitEtcd(f)
	case onElection:
		x.hitElection(f)
	case onMachine:
		err = x.starve(f)
	}
	if err != nil {
		return fmt.Errorf("fault %d, %s: %w", f.number, f.deed(""), err)
	}
	return nil
}

// begins puts the fault into the time line before it happens.
func (x *executor) begins(f fault, whom string) {
	x.check.note("#%d: %s", f.number, f.deed(whom))
}

func (x *executor) nothing(f fault) error {
	x.done[len(x.done)-1].idle = true
	x.check.note("#%d: %s: there is nothing to hit", f.number, f.deed(""))
	return nil
}

// candidate finds whom a fault is for.
func (x *executor) candidate(f fault, free func(*candidate) bool) *candidate {
	if f.leader {
		leader := x.check.leading()
		for _, c := range x.candidates {
			if c.name == leader && free(c) {
				return c
			}
		}
	}
	for i := range x.candidates {
		if c := x.candidates[(f.index+i)%candidateCount]; free(c) {
			return c
		}
	}
	return nil
}

func (x *executor) member(f fault) *member {
	if f.leader {
		if m := x.etcdLeader(); m != nil && !m.hit {
			return m
		}
	}
	for i := range x.members {
		if m := x.members[(f.index+i)%memberCount]; !m.hit {
			return m
		}
	}
	return nil
}

// etcdLeader asks all members at once; one that is paused does not answer.
func (x *executor) etcdLeader() *member {
	ctx, cancel := context.WithTimeout(x.ctx, 300*time.Millisecond)
	defer cancel()
	leads := make([]bool, memberCount)
	var asking sync.WaitGroup
	for i, m := range x.members {
		asking.Go(func() {
			v, err := m.Metric(ctx, "etcd_server_is_leader")
			leads[i] = err == nil && v == 1
		})
	}
	asking.Wait()
	if i := slices.Index(leads, true); i >= 0 {
		return x.members[i]
	}
	return nil
}

func (x *executor) hitCandidate(f fault, c *candidate) error {
	d := c.running()
	if d == nil {
		return x.nothing(f)
	}
	find := d.Elector
	if strings.HasPrefix(f.name, "spawner") {
		find = d.Spawner
	}
	child, err := openChild(d, find)
	if err != nil && x.contender == leasehold {
		return x.nothing(f) // it has just started, or is ending
	}
	// Errors of signals mean that the process has ended meanwhile.
	signal := func(sig syscall.Signal) { _ = d.Signal(sig) }
	signalChild := func(sig syscall.Signal) {
		if child < 0 {
			signal(sig)
			return
		}
		_ = unix.PidfdSendSignal(child, sig, nil, 0)
	}
	closeChild := func() {
		if child >= 0 {
			_ = unix.Close(child)
		}
	}
	x.begins(f, c.name)
	lasting := func(heal func()) {
		c.hit = true
		x.later(f, c.name, func() error {
			c.hit = false
			x.disturbed[c.name] = harness.Now()
			heal()
			closeChild()
			return nil
		})
	}
	switch f.name {
	case "guard stopped":
		x.check.stops(c.name)
		signal(syscall.SIGSTOP)
		lasting(func() { signal(syscall.SIGCONT) })
		return nil
	case "elector stopped", "spawner stopped":
		signalChild(syscall.SIGSTOP)
		lasting(func() { signalChild(syscall.SIGCONT) })
		return nil
	case "frozen briefly", "frozen for long":
		thaw, err := x.freeze(c)
		lasting(thaw)
		return err
	}
	defer closeChild()
	switch f.name {
	case "guard killed":
		x.check.kills(c.name)
		signal(syscall.SIGKILL)
	case "elector killed", "spawner killed":
		signalChild(syscall.SIGKILL)
	case "asked to end twice":
		signal(syscall.SIGTERM)
		signal(syscall.SIGTERM)
	case "asked to end":
		signal(syscall.SIGTERM)
	}
	return nil
}

// openChild holds a child of the guard, so that a later signal hits no other.
func openChild(d *daemon, find func() (int, error)) (int, error) {
	pid, err := find()
	if err != nil {
		return -1, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	if again, err := find(); err != nil || again != pid {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("the guard of %s has another child now", d.Identity)
	}
	return fd, nil
}

// freeze freezes a candidate and all that it has started. Nothing can be
// started in there meanwhile: a fork would wait for the thaw.
func (x *executor) freeze(c *candidate) (thaw func(), err error) {
	file := filepath.Join(c.cgroup, "cgroup.freeze")
	c.starting.Lock()
	err = os.WriteFile(file, []byte("1"), 0)
	ctx, cancel := context.WithTimeout(x.ctx, patience)
	defer cancel()
	if err == nil {
		err = harness.Until(ctx, func() error {
			events, err := os.ReadFile(filepath.Join(c.cgroup, "cgroup.events"))
			if err == nil && !strings.Contains(string(events), "frozen 1") {
				err = fmt.Errorf("candidate %s is not frozen", c.name)
			}
			return err
		})
	}
	x.check.freezes(c.name)
	return func() {
		x.check.thaws(c.name)
		_ = os.WriteFile(file, []byte("0"), 0) // it could be written to before
		c.starting.Unlock()
	}, err
}

func (x *executor) hitRoad(f fault, c *candidate) error {
	var ways []harness.Link
	for _, m := range f.reach {
		to, from := harness.Link{From: c.node, To: x.members[m].Node}, harness.Link{From: x.members[m].Node, To: c.node}
		switch f.name {
		case "road cut to etcd":
			ways = append(ways, to)
		case "road cut from etcd":
			ways = append(ways, from)
		default:
			ways = append(ways, to, from)
		}
	}
	loss := 100
	if f.name == "road lossy" {
		loss = f.loss
	}
	x.begins(f, c.name)
	end := harness.Now() + f.lasts
	x.later(f, c.name, func() error {
		x.disturbed[c.name] = harness.Now()
		return x.roads.clear(f.number)
	})
	var flap func(cut bool) func() error
	flap = func(cut bool) func() error {
		return func() error {
			if next := harness.Now() + f.period; f.name == "road flapping" && next < end {
				x.steps = append(x.steps, step{at: next, do: flap(!cut)})
			}
			if !cut {
				x.disturbed[c.name] = harness.Now() // what was lost while it was dark is still to be sent again
				return x.roads.clear(f.number)
			}
			return x.roads.set(f.number, loss, ways)
		}
	}
	return flap(true)()
}

func (x *executor) hitMember(f fault, m *member) error {
	var heal func() error
	led := x.etcdLeader() == m
	whom := m.Name
	if led {
		whom += ", which leads"
	}
	x.begins(f, whom)
	switch f.name {
	case "member killed":
		m.Kill()
		heal = m.Start
	case "member paused":
		if err := m.Pause(); err != nil {
			return err
		}
		heal = func() error {
			// https://github.com/etcd-io/etcd/issues/15247: it may expire leases that
			// were renewed elsewhere. That is as if an operator had revoked them.
			if led && f.lasts > x.ttl*7/10 {
				deaf := ""
				for _, other := range x.members {
					if other != m && x.away(other.Name, other.hit, other.Node) {
						deaf = "etcd's other members were not all there"
					}
				}
				x.check.did(deed{at: harness.Now(), until: harness.Now() + 3*time.Second, cause: fmt.Sprintf("a leader of etcd went on after a pause of %v", f.lasts), deaf: deaf})
			}
			return m.Continue()
		}
	case "member cut off":
		var others []*harness.Node
		for _, other := range x.members {
			if other != m {
				others = append(others, other.Node)
			}
		}
		if err := x.roads.set(f.number, 100, harness.LinksBetween(m.Node, others...)); err != nil {
			return err
		}
		heal = func() error { return x.roads.clear(f.number) }
	}
	m.hit = true
	x.later(f, whom, func() error {
		m.hit = false
		x.disturbed[m.Name] = harness.Now()
		return heal()
	})
	return nil
}

func (x *executor) hitEtcd(f fault) error {
	x.begins(f, "")
	if f.name == "all members restarted" {
		var down []*member
		for _, m := range x.members {
			if !m.hit {
				m.hit = true
				m.Kill()
				down = append(down, m)
			}
		}
		x.later(f, "", func() error {
			for _, m := range down {
				m.hit = false
				x.disturbed[m.Name] = harness.Now()
				if err := m.Start(); err != nil {
					return err
				}
			}
			return nil
		})
		return nil
	}
	leader := x.etcdLeader()
	x.operate(f, func(ctx context.Context) error {
		if f.name == "compacted" {
			got, err := x.client.Get(ctx, election)
			if err == nil {
				_, err = x.client.Compact(ctx, got.Header.Revision)
			}
			if err == nil && f.defrag {
				_, err = x.client.Defragment(ctx, x.members[f.index].ClientURL)
			}
			return err
		}
		if leader == nil {
			return fmt.Errorf("no member of etcd leads")
		}
		status, err := x.client.Status(ctx, x.members[f.index].ClientURL)
		if err != nil {
			return err
		}
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{leader.ClientURL}, Logger: zap.NewNop()})
		if err != nil {
			return err
		}
		defer func() { _ = client.Close() }()
		_, err = client.MoveLeader(ctx, status.Header.MemberId)
		return err
	})
	return nil
}

const (
	operatorWaits = 2 * time.Second
	// etcdWorks is how long etcd may still work on a request that nobody waits
	// for any more: five seconds and two elections (its ServerConfig.ReqTimeout).
	etcdWorks = 7 * time.Second
)

// operate does what an operator would, who waits for etcd while other faults
// begin. That it does not work out in the middle of them is no error.
func (x *executor) operate(f fault, deed func(context.Context) error) {
	n := len(x.done) - 1
	x.busy.Go(func() {
		ctx, cancel := context.WithTimeout(x.ctx, operatorWaits)
		defer cancel()
		if err := deed(ctx); err != nil {
			x.check.note("  #%d came to nothing: %v", f.number, err)
			x.check.idle(n)
		}
	})
}

// hitElection takes the leadership from whoever leads, as an operator could.
func (x *executor) hitElection(f fault) {
	deaf := map[string]string{}
	for _, m := range x.members {
		if x.away(m.Name, m.hit, m.Node) {
			for _, c := range x.candidates {
				deaf[c.name] = "etcd's members were not all there"
			}
		}
	}
	for _, c := range x.candidates {
		if x.away(c.name, c.hit, c.node) {
			deaf[c.name] = "its daemon or its road was under another fault"
		}
	}
	x.operate(f, func(ctx context.Context) error {
		got, err := x.client.Get(ctx, election+"/", append(clientv3.WithFirstCreate(), clientv3.WithPrefix())...)
		if err != nil {
			return err
		}
		if len(got.Kvs) == 0 {
			return fmt.Errorf("nobody leads")
		}
		key := got.Kvs[0]
		leader := string(key.Value)
		x.begins(f, fmt.Sprintf("%s, token %d", leader, key.CreateRevision))
		now := harness.Now()
		n := x.check.did(deed{at: now, until: now + operatorWaits + etcdWorks + x.ttl, token: key.CreateRevision, cause: f.name, deaf: deaf[leader]})
		if f.name == "leader's key deleted" {
			_, err = x.client.Delete(ctx, string(key.Key))
		} else {
			_, err = x.client.Revoke(ctx, clientv3.LeaseID(key.Lease))
		}
		if err == nil {
			x.check.worked(n)
		}
		return err
	})
}

// away tells if something keeps a candidate or a member from hearing of things
// at once.
func (x *executor) away(name string, hit bool, node *harness.Node) bool {
	at, ever := x.disturbed[name]
	return hit || ever && harness.Now() < at+recovers || x.roads.touched(node, x.etcd.Nodes())
}

// starve keeps the processors busy.
func (x *executor) starve(f fault) error {
	dir := filepath.Join(x.cgroup, "starved")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	cgroup, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = cgroup.Close() }()
	x.begins(f, "")
	var loops []*exec.Cmd
	x.later(f, "", func() error {
		for _, l := range loops {
			_ = l.Process.Kill() // the run may have been killed already
			_ = l.Wait()         // by SIGKILL
		}
		return nil
	})
	for range f.hogs {
		l := exec.Command("sh", "-c", "while :; do :; done")
		l.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
		if err := l.Start(); err != nil {
			return err
		}
		loops = append(loops, l)
	}
	return nil
}
