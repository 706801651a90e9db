//go:build linux

package k8s_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// helm runs the tree's own Helm in the cluster's namespace.
func (c *cluster) helm(args ...string) (string, error) {
	cmd := exec.CommandContext(c.t.Context(), filepath.Join(c.root, "bin", "helm"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.config)
	cmd.Dir = c.root
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("helm %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

const helmValues = `
image: {repository: %s, tag: %q}
job:
  image: {repository: %s, tag: %q}
  command: [/job]
  args: [live, /lives]
  volumeMounts: [{name: lives, mountPath: /lives}]
app:
  image: {repository: %[3]s, tag: %[4]q}
  command: [/job]
  args: [app, /lives]
  volumeMounts: [{name: lives, mountPath: /lives}]
volumes: [{name: lives, hostPath: {path: %[5]s}}]
`

// A release is installed, upgraded, upgraded in vain and rolled back, in each form. A job runs all
// that time, but for planned hand-overs, and never two.
func TestCluster_Helm(t *testing.T) {
	c, job := newFaultyCluster(t)
	for _, form := range c.forms() {
		t.Run(form.name, func(t *testing.T) {
			c := *c
			c.t = t
			c.release(form, job)
		})
	}
}

func (c *cluster) release(form form, job string) {
	t := c.t
	t.Helper()
	value := map[string]string{"plain": "plain-sidecar"}[form.name]
	if value == "" {
		value = form.name
	}
	// A rollout that is in order hands over as a deleted pod does.
	planned := faults[0].within[form.name]
	name := "helm-" + form.name
	c.keepLives(name)
	file := filepath.Join(t.TempDir(), "values.yaml")
	text := fmt.Sprintf(helmValues, repository(c.image), tag(c.image), repository(job), tag(job),
		c.lives)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	with := func(verb string, more ...string) []string {
		return append([]string{
			verb, name, "charts/leasehold", "--values", file, "--set", "form=" + value, "--wait",
		}, more...)
	}
	well := func(args ...string) string {
		t.Helper()
		out, err := c.helm(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	well(with("install", "--timeout=5m")...)
	defer func() {
		if _, err := c.helm("uninstall", name, "--wait"); err != nil {
			t.Error(err)
		}
		for _, o := range overlaps(c.jobs()) {
			t.Errorf("two jobs at once: %s", o)
		}
	}()
	first := c.leader()
	c.candidates(name, first.pod, 3)

	// The pods are replaced one by one. Each waits until it may lead.
	const upgrade = "--set=ttl=20s,leaderService.name=leader"
	well(with("upgrade", "--timeout=5m", upgrade)...)
	upgraded := c.follower(first, time.Minute)
	c.candidates(name, upgraded.pod, 3)
	c.routed(upgraded.pod)
	const ttl = "jsonpath={..env[?(@.name==\"LEASEHOLD_TTL\")].value}"
	if got := c.kubectl("get", "deployment", name, "-o", ttl); got != "20s" {
		t.Errorf("the TTL is %q after the upgrade", got)
	}

	// These change nothing.
	for set, want := range map[string]string{
		"ttl=20":              "/ttl",
		"election=jobs/other": "two jobs would run at once",
	} {
		_, err := c.helm(with("upgrade", "--set="+set)...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("upgrade with %s: %v, want a fault that says %q", set, err, want)
		}
	}
	if l := c.leader(); l.began != upgraded.began {
		t.Errorf("upgrades that are refused end %v, and %v follows", upgraded, l)
	}

	// These stop at the first pod.
	for _, set := range []string{
		"image.tag=none", "env[0].name=LEASEHOLD_TLL,env[0].value=5s",
	} {
		out, err := c.helm(with("upgrade", "--timeout=20s", upgrade+","+set)...)
		if err == nil {
			t.Errorf("upgrade with %s: well, want an end after 20 s:\n%s", set, out)
		}
		c.until(2*time.Minute, func() error {
			got := c.kubectl("get", "deployment", name, "-o", "jsonpath="+
				"{.status.updatedReplicas} {.status.replicas} {.status.readyReplicas}")
			if got != "1 3 2" {
				return fmt.Errorf("updated, all and ready pods: %s, want 1 3 2", got)
			}
			return nil
		})
		c.leader()
		well("rollback", name, "--wait", "--timeout=5m")
		last := c.leader()
		c.candidates(name, last.pod, 3)
		c.routed(last.pod)
	}

	lives := c.jobs()
	gap := longestGap(lives)
	t.Logf("%d jobs, one after the other; no job for %v at most", len(lives), gap)
	if gap > planned {
		t.Errorf("for %v there was no job, want at most %v", gap, planned)
	}
}

// candidates asks as the release's notes tell who leads and how many candidates there are.
func (c *cluster) candidates(release, leader string, count int) {
	c.t.Helper()
	notes, err := c.helm("get", "notes", release)
	if err != nil {
		c.t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(notes), "\n")
	command := strings.TrimSpace(lines[len(lines)-1]) + " --json"
	c.until(time.Minute, func() error {
		ask := exec.CommandContext(c.t.Context(), "sh", "-c", command)
		ask.Env = append(os.Environ(), "KUBECONFIG="+c.config)
		out, err := ask.Output()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			return fmt.Errorf("%s: %w: %s", command, err, exit.Stderr)
		}
		var status struct {
			Leader struct{ Identity string }
			Queue  []struct{ Identity string }
		}
		if err := json.Unmarshal(out, &status); err != nil {
			return fmt.Errorf("%s: %w: %s", command, err, out)
		}
		if status.Leader.Identity != leader || len(status.Queue) != count {
			return fmt.Errorf("%s leads, of %d candidates; want %s, of %d",
				status.Leader.Identity, len(status.Queue), leader, count)
		}
		return nil
	})
}
