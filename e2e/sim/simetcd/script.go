package simetcd

import (
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// The methods of this file are the script of faults. Each takes effect at once, and returns a
// description. Members are numbered from 1.

// Elect makes the member etcd's leader, in a new raft term, if a majority can elect it. Its lessor
// gives every lease its whole TTL again, and an election timeout more.
func (c *Cluster) Elect(number int) string {
	return c.fault(number, func(m *member) string {
		if !c.connected(m) || !c.majority() {
			return m.name + " can't become etcd's leader"
		}
		c.elect(m)
		return fmt.Sprintf("%s becomes etcd's leader, raft term %d", m.name, c.term)
	})
}

// NoLeader makes the leader step down. Nobody leads until Elect. All connected members know it.
func (c *Cluster) NoLeader() string {
	return c.fault(1, func(*member) string {
		c.term++
		c.leader = nil
		for _, m := range c.members {
			if c.connected(m) {
				m.term = c.term
				m.setLeader(nil)
			}
		}
		return "etcd has no leader"
	})
}

// Pause stops the member's process (SIGSTOP). Its connections stay, and what it has answered before
// arrives.
func (c *Cluster) Pause(number int) string {
	return c.fault(number, func(m *member) string {
		m.paused = true
		return m.name + " is paused"
	})
}

// Resume lets a paused member go on (SIGCONT). It believes what it believed before, until it hears
// otherwise.
func (c *Cluster) Resume(number int) string {
	return c.fault(number, func(m *member) string {
		m.paused = false
		for _, c := range m.conns {
			c.stall(false)
		}
		delayed := m.delayed
		m.delayed = nil
		for _, f := range delayed {
			f()
		}
		return m.name + " is resumed"
	})
}

// Stop ends the member's process and its connections. Each request that is under way gets an error
// of its own. If the connection were simply reset, all of them would fail at the same moment.
func (c *Cluster) Stop(number int) string {
	return c.fault(number, func(m *member) string {
		if c.leader == m {
			c.leader = nil
		}
		m.running, m.paused, m.hearing, m.delayed = false, false, false, nil
		m.incarnation++
		m.setLeader(nil)
		m.endStreams(rpctypes.ErrGRPCStopped, true)
		for _, conn := range m.conns {
			time.AfterFunc(3*c.cfg.Latency, conn.reset)
		}
		m.conns = nil
		return m.name + " is stopped"
	})
}

// Start starts a member that was stopped. It has applied what it had applied before.
func (c *Cluster) Start(number int) string {
	return c.fault(number, func(m *member) string {
		if m.running {
			return m.name + " runs already"
		}
		m.running = true
		m.after(c.jitter(expiryInterval, "tick", m.name), m.tick)
		return m.name + " is started"
	})
}

// Isolate cuts the member off from the other members, but not from clients.
func (c *Cluster) Isolate(number int) string {
	return c.fault(number, func(m *member) string {
		m.isolated = true
		return m.name + " is cut off from the other members"
	})
}

// Heal ends Isolate.
func (c *Cluster) Heal(number int) string {
	return c.fault(number, func(m *member) string {
		m.isolated = false
		return m.name + " is connected to the other members"
	})
}

// Lag makes the member apply the log later by d. 0 ends that.
func (c *Cluster) Lag(number int, d time.Duration) string {
	return c.fault(number, func(m *member) string {
		m.lag = d
		if c.inContact(m) {
			m.catchUp()
		}
		return fmt.Sprintf("%s applies the log %v late", m.name, d)
	})
}

// Compact compacts the history up to the present revision.
func (c *Cluster) Compact() string {
	return c.fault(1, func(*member) string {
		if !c.canLead() {
			return "nothing is compacted: etcd has no leader"
		}
		rev := c.store.rev
		if _, err := c.commit(func(u *update) error { return u.compactTo(rev) }); err != nil {
			return fmt.Sprintf("nothing is compacted: %v", err)
		}
		return fmt.Sprintf("compacted at revision %d", rev)
	})
}

func (c *Cluster) fault(number int, act func(*member) string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := act(c.members[number-1])
	c.cfg.Log("%s", text)
	c.spread()
	c.settle()
	return text
}

// connected reports whether the member takes part in raft.
func (c *Cluster) connected(m *member) bool { return m.running && !m.paused && !m.isolated }

func (c *Cluster) majority() bool {
	n := 0
	for _, m := range c.members {
		if c.connected(m) {
			n++
		}
	}
	return n > len(c.members)/2
}

// canLead reports whether there is a leader with a majority.
func (c *Cluster) canLead() bool { return c.leader != nil && c.connected(c.leader) && c.majority() }

func (c *Cluster) inContact(m *member) bool { return c.connected(m) && c.canLead() }

// follows reports whether what is proposed at the member is carried out.
func (c *Cluster) follows(m *member) bool {
	return c.inContact(m) && m.leader == c.leader && m.term == c.term
}

// elect makes m the leader. It leads in fact, and its lessor is promoted, once it has applied the
// whole log.
func (c *Cluster) elect(m *member) {
	c.term++
	c.leader = m
	m.term = c.term
	m.setLeader(m)
	upTo, term := len(c.log), c.term
	promote := func() {
		if m.leader == m && m.term == term {
			m.apply(upTo)
			m.lessor.promote(m)
		}
	}
	if m.lag == 0 {
		promote()
	} else {
		m.after(m.lag, promote)
	}
	c.spread()
}

func (m *member) setLeader(leader *member) {
	if leader != nil {
		m.heard++
	}
	m.leader = leader
	m.lessor.demote()
	if leader == nil {
		heard := m.heard
		// Three election timeouts, which etcd counts at its own pace.
		wait := 3*electionTimeout + m.c.jitter(electionTimeout, "streams", m.name)
		m.after(wait, func() {
			if m.leader == nil && m.heard == heard {
				m.endStreams(rpctypes.ErrGRPCNoLeader, false)
			}
		})
	}
}

// spread lets each member learn, in its time, what has changed.
func (c *Cluster) spread() {
	for _, m := range c.members {
		contact := c.inContact(m)
		if (contact || m.leader == nil || !m.running || m.paused) && m.losing != nil {
			m.losing.Stop()
			m.losing = nil
		}
		if contact && m.applied < len(c.log) {
			m.catchUp()
		}
		switch {
		case contact && !c.follows(m) && !m.hearing:
			m.hearing = true
			delay := c.cfg.Hear
			if m.leader != m {
				delay = c.jitter(delay, "hear", m.name)
			}
			m.after(delay, m.hear)
		case !contact && m.leader != nil && m.running && !m.paused && m.losing == nil:
			wait := electionTimeout + c.jitter(electionTimeout, "lose", m.name)
			m.losing = time.AfterFunc(wait, m.lose)
		}
	}
}

// hear makes the member follow the leader.
func (m *member) hear() {
	m.hearing = false
	if m.c.inContact(m) && !m.c.follows(m) {
		m.term = m.c.term
		m.setLeader(m.c.leader)
		m.c.cfg.Log("%s follows %s", m.name, m.leader.name)
	}
}

// lose makes the member forget its leader.
func (m *member) lose() {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	if m.losing == nil || m.c.closed {
		return
	}
	m.losing = nil
	if m.c.leader == m {
		m.c.leader = nil
	}
	m.setLeader(nil)
	m.c.cfg.Log("%s has lost its leader", m.name)
	m.c.spread()
	m.c.settle()
}
