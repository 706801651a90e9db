//go:build linux

package main

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// ms is a time in milliseconds.
type ms float64

func milliseconds(d time.Duration) ms { return ms(harness.Milliseconds(d)) }

func (m ms) String() string { return harness.Span(float64(m)) }

// results is the JSON of a run.
type results struct {
	About          harness.About `json:"about"`
	Version        string        `json:"version"` // of leasehold, with its commit
	Seed           uint64        `json:"seed"`
	Faults         int           `json:"faults"`
	TTL            ms            `json:"ttl_ms"`
	Implementation string        `json:"implementation"`
	Violation      string        `json:"violation,omitempty"`

	Lasted     ms             `json:"lasted_ms"` // from the first fault to the end of the last
	Kinds      []kindCount    `json:"kinds"`
	Counts     counts         `json:"counts"`
	Starts     int            `json:"daemon_starts"`
	Exits      map[string]int `json:"daemon_exits"` // by code
	MostLeases int            `json:"most_leases"`

	Overlaps []overlapCount `json:"overlaps"`
	// These are of all actions, an operator's and etcd's own, that took a term whose job lived: how
	// long that was alive beside the next one.
	Actions   distribution `json:"overlap_after_deed"`
	Starved   distribution `json:"overlap_after_deed_starved"`
	Unreached distribution `json:"overlap_after_deed_unheard"`

	Thawed distribution            `json:"overlap_after_thaw"`
	Late   map[string]distribution `json:"leader_yes_after_end"`
	Stale  map[class]distribution  `json:"status_leading_after_deed"`

	// Of what an operator did. Apart is the shortest time from a failback to the next one; 0: there
	// were not two.
	Commands []commandCount `json:"commands"`
	Switched distribution   `json:"switchovers"`
	Silent   distribution   `json:"target_not_renewed_for"`
	ByHold   distribution   `json:"stopped_by_hold"`
	Released distribution   `json:"job_after_release"`
	Apart    ms             `json:"failbacks_apart_ms"`

	JobShare float64      `json:"job_share"` // of the time, with a living job
	Downtime []downtime   `json:"longest_without_job"`
	Recovery distribution `json:"recovery"`
	Bound    ms           `json:"recovery_bound_ms"`
	Stopped  ms           `json:"all_stopped_ms"`
	Cleared  ms           `json:"etcd_empty_ms"`
}

type kindCount struct {
	Name  string `json:"name"`
	Count int    `json:"count"`
	Idle  int    `json:"idle"` // hit nothing
	For   ms     `json:"for_ms"`
}

// lasted is how long those were in all, or "".
func (k kindCount) lasted() string {
	if k.For == 0 {
		return ""
	}
	return k.For.String()
}

// commandCount is what an operator's commands of a kind came to.
type commandCount struct {
	kindCount
	outcomes
}

// nothing is how many were not carried out: etcd did not answer, or there was no daemon to reload.
func (c commandCount) nothing() int { return c.Count - c.Done - c.Refused - c.Unserved }

type overlapCount struct {
	Class class `json:"class"`
	Count int   `json:"count"`
	Max   ms    `json:"max_ms"`
}

type distribution struct {
	N   int `json:"n"`
	P50 ms  `json:"p50_ms"`
	P99 ms  `json:"p99_ms"`
	Max ms  `json:"max_ms"`
}

func distributionOf(times []float64) distribution {
	if len(times) == 0 {
		return distribution{}
	}
	return distribution{
		len(times), ms(harness.Percentile(times, 50)), ms(harness.Percentile(times, 99)),
		ms(slices.Max(times)),
	}
}

func distributions[K comparable](times map[K][]float64) map[K]distribution {
	all := map[K]distribution{}
	for k, t := range times {
		all[k] = distributionOf(t)
	}
	return all
}

func (d distribution) String() string {
	if d.N == 0 {
		return "none"
	}
	return fmt.Sprintf("%d, p50 %v, p99 %v, max %v", d.N, d.P50, d.P99, d.Max)
}

// downtime is a time without a job.
type downtime struct {
	At      ms       `json:"at_ms"` // from the beginning of the run
	For     ms       `json:"for_ms"`
	Silent  ms       `json:"etcd_silent_ms"`    // for so much of it etcd answered no read
	Backoff ms       `json:"leader_backoff_ms"` // a leader waited to start a crashed job again
	During  []string `json:"during"`            // the faults of that time
}

// afterActions are how long the old job lived on beside the next one after each action that met a
// living job, by class: zero where it did not.
func (k *checker) afterActions() map[class]distribution {
	lasted := map[class][]float64{}
	for _, a := range k.excuses.actions {
		longest, found := time.Duration(0), a.hit
		for _, o := range k.overlaps {
			if k.excuses.actionOn(o.Earlier.Token, o.from) == a {
				longest, found = max(longest, o.lasted()), true
			}
		}
		if found {
			c, _ := k.excuses.after(a)
			lasted[c] = append(lasted[c], harness.Milliseconds(longest))
		}
	}
	return distributions(lasted)
}

const (
	// actionBound is what an overlap after an operator's action may last at p99.
	actionBound = 10 * time.Millisecond
	// actionsJudged is how many there must have been before that is judged: p99 of fewer is the
	// longest of all, one bad moment of the machine. Those may last ten times as long.
	actionsJudged = 100
)

// verdict is passed when all is over.
func (k *checker) verdict() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.judge(harness.Now(), true)
	d, bound := k.afterActions()[afterAction], actionBound
	if d.N < actionsJudged {
		bound *= 10
	}
	for _, o := range k.overlaps {
		longest := o.class == afterAction && milliseconds(o.lasted()) == d.Max
		if longest && d.P99 > milliseconds(bound) {
			k.violateAt(o.from+o.lasted(), []string{o.Earlier.Candidate, o.Later.Candidate},
				"%s: two jobs were alive for %v at p99, for %v at most: the %v, and the %v",
				afterAction, d.P99, o.lasted(), o.Earlier, o.Later)
		}
	}
	if v := k.first.Load(); v != nil {
		return v
	}
	return nil
}

func (r *run) results() *results {
	k := r.check
	k.mu.Lock()
	defer k.mu.Unlock()
	if r.faulted.To == 0 {
		r.faulted.To = harness.Now()
	}
	actions, did := k.afterActions(), &k.counts.Steered
	res := &results{
		About: r.about, Version: r.version,
		Seed: r.seed, Faults: r.faults, TTL: milliseconds(r.ttl),
		Implementation: r.name,
		Lasted:         milliseconds(r.faulted.Length()),
		Counts:         k.counts, MostLeases: k.leases.most,
		Exits: map[string]int{}, Late: distributions(k.health.late),
		Stale:   distributions(k.health.excused),
		Actions: actions[afterAction], Starved: actions[starved], Unreached: actions[unreached],
		Switched: distributionOf(did.switched), Silent: distributionOf(did.silent),
		ByHold: distributionOf(did.stopped), Released: distributionOf(did.released),
		Apart:    milliseconds(k.failbacksApart()),
		Recovery: distributionOf(r.recovered), Bound: milliseconds(r.recoveryBound()),
		Stopped: milliseconds(r.stopped), Cleared: milliseconds(r.cleared),
	}
	for _, c := range r.candidates {
		for code, n := range c.exits {
			res.Starts += n
			res.Exits[fmt.Sprint(code)] += n
		}
	}
	for n := range kinds {
		res.Kinds = append(res.Kinds, r.count(&kinds[n]))
	}
	for n := range commands {
		c := commandCount{r.count(&commands[n]), *did.of(commands[n].name)}
		res.Commands = append(res.Commands, c)
	}
	overlaps := map[class][]float64{}
	for _, o := range k.overlaps {
		overlaps[o.class] = append(overlaps[o.class], harness.Milliseconds(o.lasted()))
	}
	for _, c := range slices.Sorted(maps.Keys(overlaps)) {
		lasted := overlaps[c]
		res.Overlaps = append(res.Overlaps, overlapCount{c, len(lasted), ms(slices.Max(lasted))})
	}
	res.Thawed = distributions(overlaps)[afterThaw]
	res.addDowntime(r)
	return res
}

// count counts what was injected of a kind.
func (r *run) count(k *kind) kindCount {
	count := kindCount{Name: k.name}
	for _, i := range r.injected {
		if i.kind == k {
			count.Count++
			count.For += milliseconds(i.Length())
			if i.idle {
				count.Idle++
			}
		}
	}
	return count
}

// failbacksApart is the shortest time from a failback to the next one; 0: there were not two.
func (k *checker) failbacksApart() (least time.Duration) {
	all := slices.Sorted(slices.Values(k.failbacks))
	for i := 1; i < len(all); i++ {
		if apart := all[i] - all[i-1]; least == 0 || apart < least {
			least = apart
		}
	}
	return least
}

// addDowntime adds the longest times without a job, and which faults there were.
func (r *results) addDowntime(of *run) {
	k := of.check
	without := k.downtime(of.faulted)
	r.JobShare = 1 - without.Total().Seconds()/max(of.faulted.Length().Seconds(), 0.001)
	slices.SortFunc(without, func(a, b check.Interval) int {
		return cmp.Compare(b.Length(), a.Length())
	})
	for _, w := range without[:min(3, len(without))] {
		d := downtime{
			At: milliseconds(w.From - k.began), For: milliseconds(w.Length()),
			Silent:  milliseconds(within(k.leases.silent, w)),
			Backoff: milliseconds(within(k.health.backoffs, w)),
		}
		for _, i := range of.injected { // those just before it count too
			if i.From < w.To && i.To > w.From-time.Second {
				d.During = append(d.During, i.name)
			}
		}
		r.Downtime = append(r.Downtime, d)
	}
}

func reportFrom(path, summary string) error {
	r, err := harness.ReadJSON[results](path)
	if err != nil {
		return err
	}
	if summary == "" {
		fmt.Print(r.report())
		return nil
	}
	return os.WriteFile(summary, []byte(r.summary()), 0o644)
}

// line is a figure of the report.
type line struct{ name, value string }

func (r *results) lines() (lines []line) {
	add := func(name, format string, args ...any) {
		lines = append(lines, line{name, fmt.Sprintf(format, args...)})
	}
	c, faults := r.Counts, 0
	for _, k := range r.Kinds {
		faults += k.Count
	}
	add("faults", "%d in %v, TTL %v, seed %d", faults, r.Lasted, r.TTL, r.Seed)
	add("terms", "%d; the job was started %d times in them, as %d processes and more that only "+
		"forked", c.Terms, c.Jobs, c.Processes)
	add("daemons started", "%d times; ended with %s", r.Starts, exits(r.Exits))
	add("time with a living job", "%.1f %%", 100*r.JobShare)
	for i, d := range r.Downtime {
		add([]string{"longest time without", "second longest", "third longest"}[i],
			"%v; for %v of it a leader waited to start a crashed job again, "+
				"for %v etcd answered no read; during: %s",
			d.For, d.Backoff, d.Silent, strings.Join(d.During, ", "))
	}
	add("two jobs alive at once", "%s", r.overlaps(unexcused))
	for _, c := range []class{guardLate, slowThaw} {
		if those := r.overlaps(c); those != "none" {
			add("… "+string(c), "%s", those)
		}
	}
	if r.Implementation != harness.Leasehold.Name {
		return lines
	}
	add("two alive after an operator's action", "%v", r.Actions)
	add("… with the machine starved", "%v", r.Starved)
	add("… with the old leader out of reach", "%v", r.Unreached)
	add("two alive after a thaw past the TTL", "%v", r.Thawed)
	add("/status checked", "%d times, %d of them leading", c.Status, c.Leading)
	add("… still leading after an operator's action", "%v", r.Stale[afterAction])
	add("… the same, the machine starved", "%v", r.Stale[starved])
	add("… the same, the old leader out of reach", "%v", r.Stale[unreached])
	add("/leader checked", "%d times, %d of them 200; %d for a job that was killed before the "+
		"witness knew it", c.Leader, c.Yes, c.Untold)
	add("… 200 for a frozen job, the machine starved", "%d times", c.FrozenYes)
	for _, excuse := range slices.Sorted(maps.Keys(r.Late)) {
		after := cmp.Or(excuse, "leasehold had killed the job")
		add("… still 200 after "+after, "%v", r.Late[excuse])
	}
	add("leases checked", "%d times; at most %d at once", c.Leases, r.MostLeases)
	add("jobs whose elector was lost, and nothing else was wrong",
		"%d, which all ran on; %d more were stopped at stop-at, the machine starved",
		c.Kept, c.KeptStarved)
	add("jobs frozen on loss of contact", "%d, %d of them killed frozen, %d killed unseen; none "+
		"ran meanwhile", c.Frozen, c.KilledFrozen, c.UnknownFrozen)
	did := c.Steered
	add("the election was held", "for %v in all; nobody started whom the hold does not name, and "+
		"no hold ended before its release or its time", ms(did.HeldFor))
	add("… from a hold with --stop until no job ran", "%v", r.ByHold)
	add("… from a release until a job ran, nothing else wrong", "%v", r.Released)
	add("switchovers that happened", "%v", r.Switched)
	add("… that a leader accepted", "%d; all these terms ended", did.Accepted)
	add("… that were refused, or not served in time", "%d, which ended no term; %d",
		r.outcomes().Refused, r.outcomes().Unserved)
	add("failbacks", "%d, all to a higher priority; at least %v apart", did.Failbacks, r.Apart)
	add("since the last renewal of whom a leader chose", "%v", r.Silent)
	add("changes in etcd that were compacted unseen", "%d times", did.Missed)
	add("transitions checked against the model", "%v", c.Transitions)
	add("a job after the last fault of each hundred", "%v (bound: %v; a leader's wait to start "+
		"a crashed job again apart)", r.Recovery, r.Bound)
	add("all stopped, nothing left", "in %v; etcd empty in %v", r.Stopped, r.Cleared)
	return lines
}

// outcomes are those of all commands.
func (r *results) outcomes() (all outcomes) {
	for _, c := range r.Commands {
		all.Done += c.Done
		all.Refused += c.Refused
		all.Unserved += c.Unserved
	}
	return all
}

func (r *results) overlaps(of class) string {
	for _, o := range r.Overlaps {
		if o.Class == of {
			return fmt.Sprintf("%d, max %v", o.Count, o.Max)
		}
	}
	return "none"
}

func exits(byCode map[string]int) string {
	often := func(a, b string) int { return cmp.Or(byCode[b]-byCode[a], cmp.Compare(a, b)) }
	var texts []string
	for _, code := range slices.SortedFunc(maps.Keys(byCode), often) {
		texts = append(texts, fmt.Sprintf("%s: %d", code, byCode[code]))
	}
	return strings.Join(texts, ", ")
}

func (r *results) where() string {
	a := r.About
	version, _, _ := strings.Cut(r.Version, " (")
	return fmt.Sprintf("%s: %s, etcd %s, %s, Linux %s, %d CPUs",
		a.Date, version, a.Etcd, a.Go, a.Kernel, a.CPUs)
}

func (r *results) report() string {
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s under random faults; %s\n", r.Implementation, r.where())
	for _, l := range r.lines() {
		fmt.Fprintf(&text, "  %-45s %s\n", l.name, l.value)
	}
	text.WriteString("\n  fault                   times   of which hit nothing   for\n")
	for _, k := range r.Kinds {
		fmt.Fprintf(&text, "  %-24s %4d   %20d   %v\n", k.Name, k.Count, k.Idle, k.For)
	}
	text.WriteString("\n  command                 times   done   refused   not served   " +
		"nothing   for\n")
	for _, c := range r.Commands {
		fmt.Fprintf(&text, "  %-24s %4d %6d %9d %12d %9d   %v\n",
			c.Name, c.Count, c.Done, c.Refused, c.Unserved, c.nothing(), c.For)
	}
	if r.Violation != "" {
		fmt.Fprintf(&text, "\n  VIOLATION: %s\n", r.Violation)
	}
	return text.String()
}

func (r *results) summary() string {
	var text strings.Builder
	fmt.Fprintf(&text, "# A long run under random faults\n\n"+
		"Written by `bin/soak -from FILE -summary PAGE` from the figures of "+
		"`make soak SEED=%d FAULTS=%d`. Not by hand.\n\n", r.Seed, r.Faults)
	fmt.Fprintf(&text,
		`%d candidates in one election, two of them an ordinary user's without a cgroup, and two
that freeze a job that has lost contact; %d members of etcd; each on a network node of its own.
Faults come one after another and overlapping; jobs ignore SIGTERM, daemonize, are fork bombs,
crash. Meanwhile an operator holds the election, asks for switchovers, and changes priorities.
Checked all the time: lives of jobs, that a frozen one does not run, fencing tokens, /status,
/leader, leases, processes and cgroups; that nobody starts or runs in spite of a hold, that a hold
stays until its release, that a switchover happens, is refused or is withdrawn in time, that it and
a failback go to a candidate that renews its lease, and a failback to one with a higher priority.
The first promise broken would have ended the run. After each hundred faults all of them end. Then
it is checked how soon a job comes back, also from a hold; before, that is only shown. %s.

`, candidateCount, memberCount, r.where())
	if r.Violation != "" {
		fmt.Fprintf(&text, "**A promise was broken, and the run ended with that:** %s.\n\n",
			r.Violation)
	}
	harness.TableHead(&text, "", "")
	for _, l := range r.lines() {
		harness.TableRow(&text, l.name, l.value)
	}
	text.WriteString("\n")
	harness.TableHead(&text, "fault", "times", "of which hit nothing", "for")
	for _, k := range r.Kinds {
		harness.TableRow(&text, k.Name, fmt.Sprint(k.Count), fmt.Sprint(k.Idle), k.lasted())
	}
	text.WriteString("\n")
	harness.TableHead(&text, "command", "times", "done", "refused", "not served in time",
		"came to nothing", "for")
	for _, c := range r.Commands {
		harness.TableRow(&text, c.Name, fmt.Sprint(c.Count), fmt.Sprint(c.Done),
			fmt.Sprint(c.Refused), fmt.Sprint(c.Unserved), fmt.Sprint(c.nothing()), c.lasted())
	}
	return text.String()
}
