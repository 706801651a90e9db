//go:build linux

package image_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"leasehold/e2e/harness"
)

// terminationLog is the file that a kubelet makes for each container: anybody may write to it.
func terminationLog(t *testing.T) (file string, flags []string) {
	t.Helper()
	file = filepath.Join(sharedDir(t), "termination-log")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o666); err != nil {
		t.Fatal(err)
	}
	return file, []string{"-v", file + ":/dev/termination-log"}
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestExitCodes: each exit code comes out of the container, and with each but 0 the termination
// message that `kubectl describe pod` shows says why.
func TestExitCodes(t *testing.T) {
	s := newTestbed(t)
	never := []string{"LEASEHOLD_RESTART=never"}
	etcd := strings.TrimPrefix(s.etcd.Endpoints()[0], "http://")
	leader := s.job("leader", "")
	s.waitJob(leader)

	for _, c := range []struct {
		what     string
		image    string
		args     []string
		env      []string
		during   func(*testbed, *box)
		alone    bool // needs an election of its own to lead
		code     int
		messages []string // what the termination message says; nothing: there is none
	}{
		{
			what: "the job ends with 0", alone: true, code: 0,
			args: []string{"--", "/testjob", "exit=0"},
		},
		{
			what: "the job's code", alone: true, code: 7,
			args: []string{"--", "/testjob", "exit=7"}, env: never,
			messages: []string{"with the job's own code", "exit_code=7"},
		},
		{
			what: "the job dies by a signal", alone: true, code: 137, image: imageJob,
			args: []string{"sh", "-c", "kill -KILL $$"}, env: never,
			messages: []string{"with the job's own code", "exit_code=137"},
		},
		{
			what: "planned stop", alone: true, code: 0,
			args:   []string{"--", "/testjob", "stop-code=9"},
			during: func(s *testbed, b *box) { s.waitJob(b); b.kill(s, "TERM") },
		},
		{
			what: "nothing to run", code: 64,
			messages: []string{"leasehold: say what to run: leasehold -- COMMAND [ARG...]"},
		},
		{
			what: "a flag", code: 64, args: []string{"--ttl=5", "--", "/testjob"},
			messages: []string{
				"write LEASEHOLD_TTL=5s before the command (5 has no unit: write 5s)",
			},
		},
		{
			what: "install without a place", code: 64, args: []string{"install"},
			messages: []string{"leasehold install DEST"},
		},
		{
			what: "install to where nobody may", code: 71, args: []string{"install", "/"},
			messages: []string{"leasehold: install /: write to /: read-only file system"},
		},
		{
			what: "three faults", code: 78, args: []string{"--", "/testjob"},
			env: []string{
				"LEASEHOLD_TTL=15", "LEASEHOLD_ENDPOINT=http://etcd:2379",
				"LEASEHOLD_RESTART=sometimes",
			},
			messages: []string{
				`LEASEHOLD_TTL: "15" has no unit: write 15s`,
				"LEASEHOLD_ENDPOINT: unknown variable: did you mean LEASEHOLD_ENDPOINTS?",
				`LEASEHOLD_RESTART: "sometimes" is unknown`,
			},
		},
		{
			what: "two faults of a sidecar", code: 78, args: []string{"elect"},
			env: []string{"LEASEHOLD_STOP_SIGNAL=INT", "LEASEHOLD_LISTEN=4040"},
			messages: []string{
				"LEASEHOLD_STOP_SIGNAL: it is about a job",
				`LEASEHOLD_LISTEN: "4040" is not host:port`,
			},
		},
		{
			what: "a file that is no program", code: 126,
			args:     []string{"--", "/etc/ssl/certs/ca-certificates.crt"},
			messages: []string{"is not executable", "exit_code=126"},
		},
		{
			what: "no such program", code: 127, args: []string{"--", "backup.sh"},
			messages: []string{`the command \"backup.sh\" is not found`, "exit_code=127"},
		},
		{
			what: "somebody else leads", code: 75,
			args: []string{"--", "/testjob"}, env: []string{"LEASEHOLD_WAIT=0s"},
			messages: []string{"LEASEHOLD_WAIT is over: not elected", "exit_code=75"},
		},
		{
			what: "somebody else leads, of a sidecar", code: 75, args: []string{"elect"},
			env: []string{"LEASEHOLD_WAIT=0s", "LEASEHOLD_LOG_FORMAT=json"},
			messages: []string{
				`"msg":"exiting: LEASEHOLD_WAIT is over: not elected`, `"exit_code":75`,
			},
		},
		{
			what: "the port is taken", code: 71,
			args: []string{"--", "/testjob"}, env: []string{"LEASEHOLD_LISTEN=" + etcd},
			messages: []string{"LEASEHOLD_LISTEN", "address already in use", "exit_code=71"},
		},
		{
			what: "leadership lost", alone: true, code: 76,
			args: []string{"--", "/testjob"}, env: never,
			during: func(s *testbed, b *box) {
				s.waitJob(b)
				_, err := s.etcd.Etcdctl(s.ctx, "del", "--prefix", s.election+"-own/")
				s.must(err)
			},
			messages: []string{"leadership lost", "exit_code=76"},
		},
		{
			what: "electors lost", alone: true, code: 70, args: []string{"--", "/testjob"},
			during: func(s *testbed, b *box) {
				s.waitJob(b)
				s.loseElectors(b)
			},
			messages: []string{"the elector is lost", "exit_code=70"},
		},
	} {
		s.run(c.what, func(s *testbed) {
			file, flags := terminationLog(s.T)
			image := c.image
			if image == "" {
				image = imageLeasehold
			}
			if c.alone {
				c.env = append([]string{"LEASEHOLD_ELECTION=" + s.election + "-own"}, c.env...)
			}
			name := strings.ReplaceAll(c.what, " ", "-")
			b := s.start(name, plan{image: image, args: c.args, env: c.env, flags: flags})
			if c.during != nil {
				c.during(s, b)
			}
			s.waitExit(b, c.code)
			message := read(s.T, file)
			if len(c.messages) == 0 && message != "" {
				s.Errorf("a termination message with exit code 0: %q", message)
			}
			for _, want := range c.messages {
				if !strings.Contains(message, want) {
					s.Errorf("the termination message is %q, want %q", message, want)
				}
			}
			if !strings.Contains(b.Log(), message) {
				s.Errorf("the termination message is %q, and the log says:\n%s", message, b.Log())
			}
			if c.code == 78 && message != b.Log() {
				s.Errorf("the faults are %q, and the termination message is %q", b.Log(), message)
			}
		})
	}
	leader.kill(t, "TERM")
	s.waitExit(leader, 0)
}

// TestTerminationMessage: what else may be at its place.
func TestTerminationMessage(t *testing.T) {
	s := newTestbed(t)
	bad := plan{
		image: imageLeasehold, args: []string{"--", "/testjob"}, env: []string{"LEASEHOLD_TTL=15"},
	}
	s.run("more than Kubernetes reads", func(s *testbed) {
		file, flags := terminationLog(s.T)
		p := plan{image: imageLeasehold, args: []string{"--", "/testjob"}, flags: flags}
		for i := range 100 {
			p.env = append(p.env, fmt.Sprintf("LEASEHOLD_ÜBERFLÜSSIG_%d=1", i))
		}
		s.waitExit(s.start("a", p), 78)
		if m := read(s.T, file); len(m) > 4096 || len(m) < 4000 || !utf8.ValidString(m) ||
			!strings.HasPrefix(m, "LEASEHOLD_") || !strings.HasSuffix(m, "…\n") {
			s.Errorf("%d bytes: %q", len(m), m)
		}
	})
	s.run("what a former container left", func(s *testbed) {
		file, flags := terminationLog(s.T)
		s.must(os.WriteFile(file, []byte(strings.Repeat("old\n", 1000)), 0o666))
		p := bad
		p.flags = flags
		b := s.start("a", p)
		s.waitExit(b, 78)
		if m := read(s.T, file); m != b.Log() {
			s.Errorf("%q, want %q", m, b.Log())
		}
	})
	s.run("the job's own", func(s *testbed) {
		file, flags := terminationLog(s.T)
		s.waitExit(s.start("a", plan{
			image: imageJob,
			args:  []string{"sh", "-c", "echo disk full >/dev/termination-log; exit 3"},
			flags: flags,
			env:   []string{"LEASEHOLD_RESTART=never"},
		}), 3)
		if m := read(s.T, file); m != "disk full\n" {
			s.Errorf("%q, want the job's own", m)
		}
	})
	s.run("a probe has no say", func(s *testbed) {
		file, flags := terminationLog(s.T)
		b := s.start("a", plan{
			image: imageLeasehold, args: []string{"--", "/testjob"}, flags: flags,
		})
		s.waitStatus(b, "/leader", http.StatusOK)
		out, err := command(built.root, "podman", "exec", b.name, "/leasehold", "check", "lead")
		if err == nil {
			s.Errorf("check lead: %s", out)
		}
		out, err = command(built.root,
			"podman", "exec", "--env", "LEASEHOLD_LISTEN=x", b.name, "/leasehold", "check")
		if err == nil {
			s.Errorf("check of an ill-formed LISTEN: %s", out)
		}
		b.kill(s, "TERM")
		s.waitExit(b, 0)
		if m := read(s.T, file); m != "" {
			s.Errorf("%q, want nothing", m)
		}
	})
	s.run("it can't be written to", func(s *testbed) {
		_, flags := terminationLog(s.T)
		p := bad
		p.flags = []string{flags[0], flags[1] + ":ro"}
		s.waitExit(s.start("a", p), 78)
	})
	s.run("a pipe that nobody reads", func(s *testbed) {
		file := filepath.Join(sharedDir(t), "pipe")
		s.must(syscall.Mkfifo(file, 0o666))
		s.must(os.Chmod(file, 0o666))
		p := bad
		p.flags = []string{"-v", file + ":/dev/termination-log"}
		s.waitExit(s.start("a", p), 78)
	})
	s.run("none", func(s *testbed) {
		const path = "/dev/termination-log"
		if _, err := os.Lstat(path); err == nil {
			s.Skip("this machine has one")
		}
		// Root could make one here.
		code, _, _, err := harness.RunOnce(s.ctx, nil, built.programs.Leasehold, "--", "true")
		if code != 78 || err != nil {
			s.Errorf("code %d, %v", code, err)
		}
		if _, err := os.Lstat(path); err == nil {
			s.Errorf("%s was made", path)
			_ = os.Remove(path)
		}
	})
}
