//go:build linux

package main

import (
	"fmt"
	"strings"

	"leasehold/e2e/harness"
)

// compare writes a table of two runs' figures of leasehold into a page.
func compare(page, before, after string) error {
	first, err := harness.ReadJSON[results](before)
	if err != nil {
		return err
	}
	second, err := harness.ReadJSON[results](after)
	if err != nil {
		return err
	}
	return harness.Refresh(page, map[string]string{"bench": comparison(first, second)})
}

// comparison is that table, and where it was measured.
func comparison(before, after *results) string {
	var b strings.Builder
	a, ours := after.About, harness.Leasehold.Name
	trials := func(fault, via string) int { return len(after.of(fault, ours, via)) }
	fmt.Fprintf(&b, "etcd %s, %s, Linux %s, %d CPUs.\n", a.Etcd, a.Go, a.Kernel, a.CPUs)
	fmt.Fprintf(&b, "Times are medians, and in brackets the maximum, of %d planned stops and "+
		"%d kills (plain), and of\n%d each (tls, auth).\n\n",
		trials("stop", "plain"), trials("kill", "plain"), trials("kill", "tls"))
	harness.TableHead(&b, "", before.title(), after.title())
	row := func(name string, figure func(*results) string) {
		if x, y := figure(before), figure(after); x != "" && y != "" {
			harness.TableRow(&b, name, x, y)
		}
	}
	for _, via := range vias {
		times := func(name, fault, of string, f func(Sample) float64) {
			row(name+", "+via, func(r *results) string {
				g := r.of(fault, of, via)
				if len(g) == 0 {
					return ""
				}
				median, _, most := g.spans(f)
				return fmt.Sprintf("%s (%s)", median, most)
			})
		}
		times("planned stop until the next job runs", "stop", ours, next)
		if via == plain[0] {
			times("the same, the naive client", "stop", harness.NaiveClient.Name, next)
		}
		times("guard killed until the next job runs", "kill", ours, next)
		times("elector killed, until the lease is renewed", killElector, ours, renewed)
	}
	for _, of := range []harness.Implementation{harness.Leasehold, harness.NaiveClient} {
		for i, m := range after.Memory {
			if m.Implementation != of.Name {
				continue
			}
			row(fmt.Sprintf("memory of a standby, %s, %s", m.When, of.Name),
				func(r *results) string {
					if len(r.Memory) != len(after.Memory) {
						return ""
					}
					return fmt.Sprintf("%.1f MiB, one more %.1f MiB",
						mebibytes(r.Memory[i].KiB), mebibytes(r.Memory[i].Own))
				})
		}
		for i, c := range after.CPU {
			if c.Implementation != of.Name {
				continue
			}
			row(fmt.Sprintf("idle CPU of a %s, %s", c.Role, of.Name), func(r *results) string {
				if len(r.CPU) != len(after.CPU) {
					return ""
				}
				return fmt.Sprintf("%.3f %% of a core", r.CPU[i].percent())
			})
		}
	}
	row("binary", func(r *results) string {
		return fmt.Sprintf("%.1f MB", float64(r.Binaries[ours])/1e6)
	})
	return b.String()
}

// title is the head of a column.
func (r *results) title() string {
	version, _, _ := strings.Cut(r.Version, " (")
	return fmt.Sprintf("%s, %s", version, r.About.Date)
}
