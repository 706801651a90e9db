//go:build linux

package scenario_test

import (
	"net/http"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// inNetwork reports whether the test runs in a network namespace of its own, which a network needs.
// If it does not, it runs the test again in one, and passes on how that has ended.
func inNetwork(t *testing.T, timeout string) bool {
	t.Helper()
	harness.NeedsRoot(t)
	if _, err := exec.LookPath("nft"); err != nil {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatal("needs nft, and E2E_NO_SKIP=1 forbids to skip")
		}
		t.Skip("skipped: needs nft (Debian's package nftables)")
	}
	if os.Getenv(harness.NetworkVariable) != "" {
		return true
	}
	cmd := exec.Command("/proc/self/exe",
		"-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout="+timeout)
	cmd.Env = append(os.Environ(), harness.NetworkVariable+"=1", "E2E_NO_SKIP=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	t.Logf("in a namespace of its own:\n%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

func TestNetwork(t *testing.T) {
	if !inNetwork(t, "3m") {
		return
	}
	ctx := testContext(t, 2*time.Minute)
	network, err := harness.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{Size: 3, Network: network})
	witness := harness.NewTestWitness(t)
	programs := allPrograms(t)
	start := func(identity string) (*harness.Candidate, *harness.Node) {
		node, err := network.Node(identity)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(node.Close)
		c, err := harness.StartCandidate(harness.CandidateConfig{
			Binary: programs.Leasehold, Election: "jobs/network", Identity: identity,
			Endpoints: cluster.Endpoints(), TTL: 3 * time.Second, Node: node,
			Job: []string{programs.Testjob}, Witness: witness,
			Env: []string{"LEASEHOLD_STOP_GRACE=500ms"},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			c.Close()
			if t.Failed() {
				t.Logf("log of candidate %s:\n%s", identity, c.Log())
			}
		})
		return c, node
	}
	leader, node := start("a")
	job, err := witness.WaitForJob(ctx, func(l harness.Life) bool { return l.Candidate == "a" })
	if err != nil {
		t.Fatal(err)
	}
	standby, _ := start("b")
	if err := standby.WaitStatus(ctx, "/standby", http.StatusOK); err != nil {
		t.Fatal(err)
	}

	// One member unreachable: nothing happens. All: the job moves, and there are never two.
	if _, err := network.Cut(harness.LinksBetween(node, cluster.Members[0].Node)...); err != nil {
		t.Fatal(err)
	}
	if _, err := witness.WaitForNext(testContext(t, 4*time.Second), job); err == nil {
		t.Fatal("the job has moved though two members could be reached")
	}
	at := harness.Now()
	if _, err := network.Cut(harness.LinksBetween(node, cluster.Nodes()...)...); err != nil {
		t.Fatal(err)
	}
	next, err := witness.WaitForNext(ctx, job)
	if err != nil {
		t.Fatal(err)
	}
	if next.Started-at < time.Second {
		t.Errorf("the job moved after %v: was the link cut, or the connection closed?",
			next.Started-at)
	}
	for _, o := range check.Overlaps(witness.Lives()) {
		t.Error(o)
	}
	if err := network.Recover(); err != nil {
		t.Fatal(err)
	}
	if err := leader.WaitStatus(ctx, "/standby", http.StatusOK); err != nil {
		t.Fatal(err)
	}
}
