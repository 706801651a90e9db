//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"leasehold/e2e/harness"
)

// directories are those of the packages whose tests are run: such a program is bin/NAME.test.
var directories = map[string]string{"election": "election", "scenario": "e2e/scenario"}

// shortTests are those of the short form: they touch grant, watch, compaction, changes of etcd's
// leader, revoke, auth and TLS. Tests that mostly wait are left to the long form.
var shortTests = map[string]string{
	"election": "^TestCandidate_(PlannedHandOver|KeyDeletedWhileLeading|LeaseRevokedWhileLeading|" +
		"Compaction|NestedElections|StandbyOnAnUnreachableMember|Auth|TLS)$",
	"scenario": "^(TestAuth_RevokeTakesTheToken|TestInterop_EtcdctlElect|TestUntouched_Upgrade|" +
		"TestTLS_NewCertificates)$",
}

// rows are the faults that are run: those in which etcd has a part.
var rows = []string{
	"elector-killed", "link-unreachable", "member-paused", "member-cut", "etcd-leader-killed",
	"etcd-leader-paused", "etcd-leader-paused-long", "etcd-leader-isolated", "etcd-leader-moved",
	"all-restarted", "all-restarted-at-once", "quorum-lost", "stale-acknowledgement",
	"stale-acknowledgement-isolated", "compaction", "token-expiry", "lease-revoked", "key-deleted",
}

// shortRows are those of the short form.
var shortRows = []string{
	"etcd-leader-killed", "stale-acknowledgement-isolated", "compaction", "lease-revoked",
}

// withoutRow are the faults that a version can't have. The harness' own client, which is that of
// etcd 3.7, gets no second token from an etcd before 3.4.28.
var withoutRow = map[string]string{"3.4": "token-expiry"}

// runTests runs the tests of a package.
func (r *runner) runTests(ctx context.Context, v *Version, part string) error {
	directory, found := directories[part]
	if !found {
		return fmt.Errorf("no part of that name: election, scenario and faults are")
	}
	program, err := filepath.Abs("bin/" + part + ".test")
	if err != nil {
		return err
	}
	pattern := r.pattern
	if r.short && pattern == "" {
		pattern = shortTests[part]
	}
	cmd := command(ctx, v, program, "-test.v=test2json", "-test.timeout=20m", "-test.run="+pattern)
	cmd.Dir = directory
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	err = cmd.Run()
	log := fmt.Sprintf("bin/etcd-%s.%s.log", v.Name, part)
	err = errors.Join(err, os.WriteFile(log, output.Bytes(), 0o644))
	verdicts := readVerdicts(output.Bytes())
	if len(verdicts) == 0 {
		return errors.Join(err, fmt.Errorf("no test was run; %s has the output", log))
	}
	if v.Tests == nil {
		v.Tests = map[string]map[string]string{}
	}
	if v.Tests[part] == nil {
		v.Tests[part] = map[string]string{}
	}
	for test, verdict := range verdicts {
		v.Tests[part][test] = verdict
		if verdict == "FAIL" {
			err = errors.Join(err, fmt.Errorf("%s failed; %s has the output", test, log))
		}
	}
	return err
}

// verdict is the line about a test. The first byte keeps it apart from what tests write. Subtests
// have a slash in their names.
var verdict = regexp.MustCompile(`\x16--- (PASS|FAIL|SKIP): ([^/ ]+) \(`)

// readVerdicts reads PASS, FAIL or SKIP for each test.
func readVerdicts(output []byte) map[string]string {
	verdicts := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(output))
	lines.Buffer(nil, len(output)+1)
	for lines.Scan() {
		if found := verdict.FindStringSubmatch(lines.Text()); found != nil {
			verdicts[found[2]] = found[1]
		}
	}
	return verdicts
}

// runFaults runs the rows of the table, each once with root and most once with an ordinary user.
func (r *runner) runFaults(ctx context.Context, v *Version) error {
	wanted := rows
	switch {
	case r.rows != "":
		wanted = strings.Split(r.rows, ",")
	case r.short:
		wanted = shortRows
	}
	wanted = slices.DeleteFunc(slices.Clone(wanted), func(row string) bool {
		return row == withoutRow[v.Name]
	})
	found := fmt.Sprintf("bin/etcd-%s.faults.json", v.Name)
	if err := os.RemoveAll(found); err != nil {
		return err
	}
	log, err := os.Create(fmt.Sprintf("bin/etcd-%s.faults.log", v.Name))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // for whoever looks for the reason of a failure
	cmd := command(ctx, v, "bin/faults",
		"-n", "1", "-peers-n", "0", "-rows", strings.Join(wanted, ","), "-json", found)
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Run()
	if err != nil {
		err = fmt.Errorf("%w; %s has the output", err, log.Name())
	}
	got, errRead := harness.ReadJSON[struct {
		Samples []Sample `json:"samples"`
	}](found)
	if errRead != nil {
		return errors.Join(err, errRead)
	}
	v.Samples = slices.DeleteFunc(v.Samples, func(s Sample) bool {
		return slices.ContainsFunc(got.Samples, func(g Sample) bool { return g.Row == s.Row })
	})
	v.Samples = append(v.Samples, got.Samples...)
	return err
}

// command is a program that starts etcd, and ends what it has started when it is interrupted.
func command(ctx context.Context, v *Version, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = v.env()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}
