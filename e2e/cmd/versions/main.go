//go:build linux

// Versions runs the tests of election and e2e/scenario, and those faults of the table that are
// about etcd, against several versions of etcd.
//
//	bin/versions [-short] [-parts election,scenario,faults] [-run PATTERN] 3.4 3.5 3.6 3.7
//	bin/versions -doc docs/etcd-versions.md     put the results into the document
//
// The servers are bin/etcd-VERSION. etcdctl is the same for all. What the tests write is kept in
// bin/etcd-VERSION.PART.log. Results are kept in bin/etcd-versions.json: a run replaces those of
// the same tests and faults, and keeps the others. The exit code is 1 when a test failed or a
// fault broke a promise.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"leasehold/e2e/harness"
)

// file is where the results are kept.
const file = "bin/etcd-versions.json"

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	flags := flag.NewFlagSet("versions", flag.ContinueOnError)
	var r runner
	flags.BoolVar(&r.short, "short", false, "only what depends on etcd most")
	parts := flags.String("parts", "election,scenario,faults", "what to run")
	flags.StringVar(&r.pattern, "run", "", "only tests that match this pattern")
	flags.StringVar(&r.rows, "rows", "", "only these faults")
	doc := flags.String("doc", "",
		"put the results into this file, between their markers, and run nothing")
	if err := flags.Parse(args); err != nil {
		return 64
	}
	results, err := load()
	switch {
	case err != nil:
	case *doc != "":
		err = harness.Refresh(*doc, map[string]string{"versions": results.table()})
	default:
		ctx, stop := harness.Interruptible()
		defer stop()
		err = r.runAll(ctx, results, flags.Args(), strings.Split(*parts, ","))
	}
	return harness.ExitCode("versions", err)
}

// load reads the results of earlier runs, if there are any.
func load() (*Results, error) {
	results, err := harness.ReadJSON[Results](file)
	if errors.Is(err, fs.ErrNotExist) {
		return &Results{}, nil
	}
	return results, err
}

// runner is what all parts use.
type runner struct {
	short         bool
	pattern, rows string
}

// runAll runs the parts with each version, and keeps what it has also when it is interrupted.
func (r *runner) runAll(ctx context.Context, results *Results, names, parts []string) error {
	var versions []*Version
	for _, name := range names {
		v, err := results.version(ctx, name)
		if err != nil {
			return err
		}
		versions = append(versions, v)
	}
	if len(versions) == 0 {
		return errors.New("which versions? such as 3.4 3.5")
	}
	var failed error
	for _, part := range parts {
		err := r.runPart(ctx, versions, part)
		failed = errors.Join(failed, err, harness.WriteJSON(file, results))
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
	}
	fmt.Print(results.table())
	return failed
}

// runPart runs a part with one version after the other: side by side they would disturb each other.
func (r *runner) runPart(ctx context.Context, versions []*Version, part string) error {
	began := time.Now()
	var failed error
	for _, v := range versions {
		run := func() error { return r.runTests(ctx, v, part) }
		if part == "faults" {
			run = func() error { return r.runFaults(ctx, v) }
		}
		if err := run(); err != nil {
			failed = errors.Join(failed, fmt.Errorf("etcd %s: %s: %w", v.About.Etcd, part, err))
		}
	}
	fmt.Printf("%s: %.0f s\n", part, time.Since(began).Seconds())
	return failed
}

// version finds the results of a version, and notes with what they are made.
func (r *Results) version(ctx context.Context, name string) (*Version, error) {
	server, err := filepath.Abs("bin/etcd-" + name)
	if err != nil {
		return nil, err
	}
	about, err := harness.AboutThisRun(ctx, harness.Etcd{Server: server})
	if err != nil {
		return nil, err
	}
	i, found := slices.BinarySearchFunc(r.Versions, name, func(v *Version, name string) int {
		return strings.Compare(v.Name, name)
	})
	switch {
	case !found:
		r.Versions = slices.Insert(r.Versions, i, &Version{Name: name})
	case r.Versions[i].About.Etcd != about.Etcd: // results of another patch
		r.Versions[i] = &Version{Name: name}
	}
	v := r.Versions[i]
	v.About, v.server = about, server
	return v, nil
}

// env is what tells tests and faults which etcd to start. before is the version before this one, if
// it is there: a test upgrades from it.
func (v *Version) env() []string {
	env := append(os.Environ(), "ETCD="+v.server)
	var minor int
	if _, err := fmt.Sscanf(v.Name, "3.%d", &minor); err != nil {
		return env
	}
	before := fmt.Sprintf("%s/etcd-3.%d", filepath.Dir(v.server), minor-1)
	if _, err := os.Stat(before); err == nil {
		env = append(env, "ETCD_BEFORE="+before)
	}
	return env
}
