//go:build linux

package cli

import (
	"fmt"
	"strconv"
	"strings"

	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/quote"
)

// statusReport is what `leasehold status --json` prints. Like the endpoint's JSON, with which it
// shares the fields of the same name, it may gain fields and renames none. The desc tags go into
// the reference.
type statusReport struct {
	Name     string             `json:"name" desc:"the leader's identity; \"\" without a leader"`
	Election string             `json:"election" desc:"the election's key prefix"`
	Leader   *statusCandidate   `json:"leader" desc:"the leader, as etcd has it"`
	Lease    *statusLease       `json:"lease" desc:"the leader's lease"`
	Queue    []statusCandidate  `json:"queue" desc:"all candidates in order, the leader first"`
	Blocker  *statusBlocker     `json:"blocker" desc:"the first of the blockers"`
	Blockers []statusBlocker    `json:"blockers" desc:"keys that no candidate made, and that stay"`
	Hold     *health.HoldStatus `json:"hold" desc:"what keeps everybody from becoming leader"`
	Control  *string            `json:"control_problem" desc:"why hold and records are unknown"`
	Version  string             `json:"version" desc:"of the leasehold that asks"`
}

type statusCandidate struct {
	Identity string  `json:"identity" desc:"its name"`
	Key      string  `json:"key" desc:"its key in etcd"`
	Token    int64   `json:"token" desc:"its fencing token: that key's create revision"`
	Priority *int    `json:"priority" desc:"what it says of itself; null: it has no record"`
	Ready    *bool   `json:"ready" desc:"whether it may lead; null: it has no record"`
	Since    *string `json:"since" desc:"when it joined; null: it has no record"`
	URL      *string `json:"url" desc:"of its health endpoint; null: none is known"`
	Version  *string `json:"version" desc:"of its leasehold; null: it has no record"`
}

type statusLease struct {
	ID       string  `json:"id" desc:"in hex, as etcdctl shows it"`
	TTL      float64 `json:"ttl_seconds" desc:"as etcd granted it"`
	ValidFor float64 `json:"valid_for_seconds" desc:"what is left of it, in whole seconds"`
}

type statusBlocker struct {
	Key    string `json:"key" desc:"the key"`
	Why    string `json:"why" desc:"why it stays"`
	Remedy string `json:"remedy" desc:"the command that ends the wait; \"\" while its lease lives"`
}

// ReportFields lists the fields of status --json, for the reference.
func ReportFields() []health.Field { return health.FieldsOf[statusReport]() }

func newStatusCandidate(e election.Entry, r election.Report) statusCandidate {
	c := statusCandidate{Identity: e.Identity, Key: e.Key, Token: e.Token}
	if record, found := r.Records[e.Key]; found {
		c.Priority, c.Ready, c.Version = &record.Priority, &record.Ready, &record.Leasehold
		c.Since, c.URL = timestamp(record.Since), orNull(record.URL)
	}
	return c
}

func reportJSON(name, version string, r election.Report) statusReport {
	out := statusReport{
		Election: name, Queue: []statusCandidate{}, Blockers: []statusBlocker{}, Version: version,
	}
	if r.Leader != nil {
		leader := newStatusCandidate(*r.Leader, r)
		out.Name, out.Leader = leader.Identity, &leader
		out.Lease = &statusLease{
			ID: strconv.FormatInt(r.LeaseID, 16), TTL: r.LeaseTTL.Seconds(),
			ValidFor: r.LeaseLeft.Seconds(),
		}
	}
	for _, e := range r.Queue {
		out.Queue = append(out.Queue, newStatusCandidate(e, r))
	}
	for _, b := range r.Blockers {
		out.Blockers = append(out.Blockers, statusBlocker(b))
	}
	if r.ControlProblem != "" {
		out.Control = &r.ControlProblem
	}
	if h := r.Hold; h != nil {
		out.Hold = (&health.Hold{
			By: h.By, Reason: h.Reason, Since: h.Since, Until: h.Until, Stop: h.Stop,
		}).Status()
	}
	if len(out.Blockers) > 0 {
		out.Blocker = &out.Blockers[0]
	}
	return out
}

func reportText(name string, r election.Report) string {
	var b strings.Builder
	if r.Leader == nil {
		fmt.Fprintf(&b, "%s: no leader\n", quote.Printable(name))
	} else {
		fmt.Fprintf(&b, "%s: leader is %s, token %d, lease %x valid for %s\n",
			quote.Printable(name), quote.Value(r.Leader.Identity),
			r.Leader.Token, r.LeaseID, r.LeaseLeft)
	}
	if r.Hold != nil {
		fmt.Fprintf(&b, "%s\n", election.HoldText(r.Hold))
	}
	if r.ControlProblem != "" {
		fmt.Fprintf(&b, "hold, priorities and versions are not known: %s\n", r.ControlProblem)
	}
	b.WriteString(queueTable(r))
	for _, x := range r.Blockers {
		fmt.Fprintf(&b, "blocked by %s: %s", x.Key, x.Why)
		if x.Remedy != "" {
			fmt.Fprintf(&b, "; to end the wait: %s", x.Remedy)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// queueTable shows the candidates in their order. Of those without a record a dash is shown.
func queueTable(r election.Report) string {
	if len(r.Queue) == 0 {
		return ""
	}
	rows := [][]string{{"#", "CANDIDATE", "TOKEN", "PRIORITY", "READY", "VERSION", "LEASE"}}
	for i, e := range r.Queue {
		priority, ready, version := "-", "-", "-"
		if record, found := r.Records[e.Key]; found {
			priority, ready = strconv.Itoa(record.Priority), "no"
			if record.Ready {
				ready = "yes"
			}
			version = quote.Word(record.Leasehold)
		}
		rows = append(rows, []string{
			strconv.Itoa(i + 1), quote.Word(e.Identity), strconv.FormatInt(e.Token, 10),
			priority, ready, version, e.Key[strings.LastIndexByte(e.Key, '/')+1:],
		})
	}
	return table(rows, 1, 5)
}
