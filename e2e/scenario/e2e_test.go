//go:build linux

package scenario_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

func testContext(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestCluster_OfThreeSurvivesTheLossOfItsLeader(t *testing.T) {
	ctx := testContext(t, time.Minute)
	c := harness.NewTestCluster(t, harness.ClusterConfig{Size: 3})
	if _, err := c.Etcdctl(ctx, "put", "k", "v"); err != nil {
		t.Fatal(err)
	}
	first, err := c.Leader(ctx)
	if err != nil {
		t.Fatal(err)
	}
	first.Kill()
	second, err := c.Leader(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if second == first {
		t.Fatalf("%s was killed and leads", first.Name)
	}
	if err := second.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := second.Continue(); err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	if err := first.WaitHealthy(ctx); err != nil {
		t.Fatal(err)
	}
	if err := second.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := c.Etcdctl(ctx, "get", "k", "--print-value-only")
	if err != nil || strings.TrimSpace(out) != "v" {
		t.Fatalf("get k: %q, %v", out, err)
	}
}

func TestCluster_TLSAndAuth(t *testing.T) {
	ctx := testContext(t, time.Minute)
	certs, err := harness.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := harness.NewTestCluster(t, harness.ClusterConfig{
		TLS: certs, Flags: []string{"--auth-token-ttl", "2"},
	})
	if err := c.EnableAuth(ctx, "user", "secret", "jobs/"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Etcdctl(ctx, "put", "k", "v"); err != nil {
		t.Fatal(err)
	}
	n, err := c.Members[0].Metric(ctx, authentications)
	if err != nil || n < 1 {
		t.Fatalf("authentications: %v, %v", n, err)
	}
	c.Auth = ""
	if _, err := c.Etcdctl(ctx, "get", "k"); err == nil {
		t.Fatal("got a key without a user")
	}
}

func TestProxy(t *testing.T) {
	ctx := testContext(t, 20*time.Second)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // an echo server
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	p := harness.NewTestProxy(t, l.Addr().String())
	dial := func() net.Conn {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	send := func(c net.Conn, text string) {
		if _, err := fmt.Fprintln(c, text); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(c net.Conn, want string) {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if got, err := bufio.NewReader(c).ReadString('\n'); err != nil || got != want+"\n" {
			t.Fatalf("received %q, %v, want %q", got, err, want)
		}
	}
	silent := func(c net.Conn) {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := c.Read(make([]byte, 1)); n != 0 || !os.IsTimeout(err) {
			t.Fatalf("received %d bytes, %v through a link that is cut", n, err)
		}
	}
	for name, direction := range map[string]harness.Direction{
		"both": harness.BothWays, "to server": harness.ToServer, "to client": harness.ToClient,
	} {
		c := dial()
		send(c, "one")
		receive(c, "one")
		p.Cut(direction)
		send(c, name)
		silent(c)
		fresh := dial()
		send(fresh, "fresh")
		silent(fresh)
		p.Recover()
		receive(c, name)
		receive(fresh, "fresh")
	}
	c := dial()
	send(c, "last")
	receive(c, "last")
	p.Drop()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Fatalf("a dropped connection still stands: %v", err)
	}
	c = dial()
	send(c, "again")
	receive(c, "again")
}

// The judge is judged: it must see the overlaps that there are and no others.
func TestWitness(t *testing.T) {
	programs := testPrograms(t)
	start := func(
		t *testing.T, w *harness.Witness, candidate, token string, words ...string,
	) (*exec.Cmd, harness.Life) {
		cmd := exec.Command(programs.Testjob, words...)
		cmd.Env = []string{
			"WITNESS=" + w.Addr, "LEASEHOLD_IDENTITY=" + candidate,
			"LEASEHOLD_FENCING_TOKEN=" + token,
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		life, err := w.WaitForJob(testContext(t, 10*time.Second), func(l harness.Life) bool {
			return l.Pid == cmd.Process.Pid
		})
		if err != nil {
			t.Fatal(err)
		}
		return cmd, life
	}

	t.Run("one after the other", func(t *testing.T) {
		w := harness.NewTestWitness(t)
		for i := range 20 {
			cmd, life := start(t, w, "a", fmt.Sprint(i))
			if err := w.Tell(life, "exit 3"); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 3 {
				t.Fatalf("exit code %d, want 3", code)
			}
		}
		if n := len(check.NewHistory(w.Lives())); n != 20 {
			t.Errorf("%d terms, want 20", n)
		}
		for _, o := range check.Overlaps(w.Lives()) {
			t.Error(o)
		}
	})

	t.Run("at the same time", func(t *testing.T) {
		w := harness.NewTestWitness(t)
		start(t, w, "a", "1")
		start(t, w, "b", "2")
		if n := len(check.Overlaps(w.Lives())); n != 1 {
			t.Fatalf("%d overlaps, want 1", n)
		}
	})

	// The first process is dead; a descendant that none of the usual ways of
	// killing reaches is not, and the witness must know.
	for _, behaviour := range []string{
		"daemonize", "setsid", "hold-pipes", "fork-bomb=4", "fill=4",
	} {
		t.Run(behaviour+" survives its first process", func(t *testing.T) {
			w := harness.NewTestWitness(t)
			cmd, _ := start(t, w, "a", "1", behaviour, "wipe-env")
			roles := map[string]string{
				"daemonize": "daemon", "setsid": "setsid", "hold-pipes": "grandchild",
			}
			if role, found := roles[behaviour]; found {
				err := w.Wait(testContext(t, 10*time.Second), func(lives []harness.Life) bool {
					return slices.ContainsFunc(lives, func(l harness.Life) bool {
						return l.Role == role && l.Token == 1
					})
				})
				if err != nil {
					t.Fatal(err)
				}
			} else if err := harness.Until(testContext(t, 10*time.Second), func() error {
				if len(harness.Children(cmd.Process.Pid)) == 0 {
					return fmt.Errorf("no children")
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if terms := check.NewHistory(w.Lives()); len(terms) != 1 || terms[0].End != 0 {
				t.Fatalf("terms %+v, want one that lives", terms)
			}
		})
	}

	t.Run("main-gone", func(t *testing.T) {
		w := harness.NewTestWitness(t)
		cmd, life := start(t, w, "a", "1", "main-gone")
		err := harness.Until(testContext(t, 10*time.Second), func() error {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", life.Pid))
			if err != nil {
				return err
			}
			if !strings.Contains(string(stat), ") Z ") {
				return fmt.Errorf("its state is not Z: %s", stat)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if check.NewHistory(w.Lives())[0].End != 0 {
			t.Error("it ended with its main thread")
		}
		if err := w.Tell(life, "exit 4"); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 4 {
			t.Errorf("exit code %d, want 4 from a thread that ran on", code)
		}
	})

	t.Run("signals", func(t *testing.T) {
		w := harness.NewTestWitness(t)
		for words, want := range map[string]string{
			"": "signal: terminated", "stop-code=5": "exit status 5",
			"slow-stop=50ms": "exit status 0", "ignore-term": "signal: killed",
		} {
			cmd, _ := start(t, w, "a", "1", words)
			_ = cmd.Process.Signal(syscall.SIGTERM)
			if words == "ignore-term" {
				_ = cmd.Process.Kill()
			}
			_ = cmd.Wait()
			if got := cmd.ProcessState.String(); got != want {
				t.Errorf("%q on SIGTERM: %s, want %s", words, got, want)
			}
		}
	})
}
