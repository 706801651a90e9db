// Histories judges the record that the soak writes with -history: is the storage that the jobs
// write linearizable, and does the lock keep its promise?
//
//	histories FILE [-picture FILE.html]
//
// It prints one line. If the record is guilty, it prints the first operation that fits nowhere and
// those before it, draws a picture of the whole (porcupine's), and exits with 1.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

func main() {
	var out strings.Builder
	code := run(os.Args[1:], &out)
	fmt.Print(out.String())
	os.Exit(code)
}

func run(args []string, out *strings.Builder) int {
	flags := flag.NewFlagSet("histories", flag.ContinueOnError)
	picture := flags.String("picture", "", "where to draw what is guilty; default: beside FILE")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	if flags.NArg() != 1 {
		fmt.Fprintln(out, "usage: histories [-picture FILE.html] FILE")
		return 64
	}
	path := flags.Arg(0)
	if *picture == "" {
		*picture = path + ".html"
	}
	began := time.Now()
	h, err := load(path)
	if err != nil {
		fmt.Fprintln(out, "histories:", err)
		return 1
	}
	if h.accepted == 0 || h.terms == 0 {
		fmt.Fprintf(out, "histories: %s shows nothing: %d writes were accepted, in %d terms\n",
			path, h.accepted, h.terms)
		return 1
	}
	for _, p := range h.parts() {
		if !p.check(out, *picture) {
			return 1
		}
	}
	fmt.Fprintf(out, "histories: %d operations on %d registers, linearizable "+
		"(%d writes accepted, %d refused, %d unknown); the lock held in %d terms, %d of them "+
		"taken; checked in %.1f s\n", h.operations, len(h.registers),
		h.accepted, h.refused, h.unknown, h.terms, h.taken(), time.Since(began).Seconds())
	return 0
}

// part is a history that is judged by itself: of a register, or of the lock.
type part struct {
	name  string
	model porcupine.Model
	// until returns what of the history has returned by a moment.
	until func(at int64) []porcupine.Operation
	began int64 // for people
}

const forever = int64(1) << 62

// checkTimeout bounds one check. The soak's take seconds.
const checkTimeout = 5 * time.Minute

// check reports whether the part follows its model, and otherwise tells what does not.
func (p part) check(out *strings.Builder, picture string) bool {
	all := p.until(forever)
	result := porcupine.CheckOperationsTimeout(p.model, all, checkTimeout)
	if result == porcupine.Ok {
		return true
	}
	if result == porcupine.Unknown {
		fmt.Fprintf(out, "histories: %s: undecided after %v\n", p.name, checkTimeout)
		return false
	}
	prefix, last := p.shortest(all)
	fmt.Fprintf(out, "histories: GUILTY: %s: this operation fits nowhere:\n  %s\n",
		p.name, p.tell(last))
	fmt.Fprintln(out, "those that were called before it:")
	for _, o := range before(prefix, last, 12) {
		fmt.Fprintln(out, " ", p.tell(o))
	}
	_, info := porcupine.CheckOperationsVerbose(p.model, prefix, checkTimeout)
	if err := porcupine.VisualizePath(p.model, info, picture); err != nil {
		fmt.Fprintln(out, "draw a picture:", err)
		return false
	}
	fmt.Fprintln(out, "picture:", picture)
	return false
}

// shortest is the shortest beginning of the part that is guilty, and the operation that makes it
// so.
func (p part) shortest(all []porcupine.Operation) (prefix []porcupine.Operation, last operation) {
	returns := sortedReturns(all)
	low, high := 0, len(returns)-1
	for low < high {
		middle := (low + high) / 2
		if porcupine.CheckOperations(p.model, p.until(returns[middle])) {
			low = middle + 1
		} else {
			high = middle
		}
	}
	prefix = p.until(returns[low])
	for _, o := range prefix {
		if in := o.Input.(operation); in.Return == returns[low] || last.Kind == "" {
			last = in
		}
	}
	return prefix, last
}

// tell is a line about an operation, with the seconds since the record's beginning.
func (p part) tell(o operation) string {
	to := "no answer"
	if o.Return != 0 {
		to = fmt.Sprintf("%.4f", float64(o.Return-p.began)/1e9)
	}
	return fmt.Sprintf("%10.4f … %-9s %-24s %s", float64(o.Call-p.began)/1e9, to, o.Client, o)
}
