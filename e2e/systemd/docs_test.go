//go:build linux

package systemd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"leasehold/e2e/harness"
)

var shellBlock = regexp.MustCompile("(?ms)^```sh\n(.*?)^```$")

// dropIns are the rows of the table with drop-ins, and setting what they set.
var (
	dropIns = regexp.MustCompile("(?m)^\\| [^|]+ \\| ([^|]*`[A-Z][A-Za-z]+=[^|]*) \\|$")
	setting = regexp.MustCompile("`([A-Z][A-Za-z]+=[^`]*)`")
)

// TestDocs types what docs/systemd.md says, in its order.
func TestDocs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	root, err := harness.ModuleRoot()
	w.must(err)
	text, err := os.ReadFile(filepath.Join(root, "docs", "systemd.md"))
	w.must(err)
	blocks := shellBlock.FindAllStringSubmatch(string(text), -1)
	if len(blocks) < 5 {
		t.Fatalf("docs/systemd.md has %d blocks of commands", len(blocks))
	}
	packaged := os.Getenv("LEASEHOLD_DEB") != ""
	if !packaged { // it says how to install
		unitFile := filepath.Join(root, "systemd", "leasehold@.service")
		w.files = map[string]string{
			"/root/leasehold/leasehold":                  built.programs.Leasehold,
			"/root/leasehold/systemd/leasehold@.service": unitFile,
		}
	}
	m := w.boot("a")
	const service = "leasehold@backup.service"
	leads := func() string {
		t.Helper()
		w.waitFor(m, service, waitTimeout, state{
			"ActiveState": "active", "StatusText": "leading, token …",
		})
		guard, elector, err := m.Processes(w.ctx, service)
		w.must(err)
		var status []byte
		w.until(waitTimeout, func() error { // the job may be between fork and exec
			for _, pid := range harness.Descendants(guard) {
				status, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
				if err != nil || pid == elector ||
					!strings.HasPrefix(string(status), "Name:\tsleep\n") {
					continue
				}
				// Whatever the drop-in, the job keeps its cgroup.
				cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
				if err != nil || !strings.Contains(string(cgroup), service+"/leasehold-") {
					t.Errorf("the job's cgroup: %s, %v", cgroup, err)
				}
				return nil
			}
			return errors.New("there is no job")
		})
		return string(status)
	}
	rows := 0
	for _, block := range blocks {
		commands := block[1]
		has := func(s string) bool { return strings.Contains(commands, s) }
		switch {
		case packaged && has("install -m"):
			continue
		case has("User=root"): // before it come those of the table
			_, table, _ := strings.Cut(string(text), "| the job | the drop-in |")
			for _, row := range dropIns.FindAllStringSubmatch(table, -1) {
				settings := setting.FindAllStringSubmatch(row[1], -1)
				lines := "[Service]\n"
				for _, s := range settings {
					lines += s[1] + "\n"
				}
				if strings.Contains(lines, "User=\n") {
					continue // the block that follows, see below
				}
				w.must(m.Write("/etc/systemd/system/"+service+".d/row.conf", lines))
				w.run(m, "systemctl", "daemon-reload")
				if out := w.run(m, "systemd-analyze", "verify", service); out != "" {
					t.Errorf("%s: %s", lines, out)
				}
				w.run(m, "systemctl", "restart", service)
				status := leads()
				may := strings.Contains(status, "\nCapEff:\t0000000000000400\n")
				if strings.Contains(lines, "CAP_NET_BIND_SERVICE") != may {
					t.Errorf("%s gives:\n%s", lines, status)
				}
				properties, err := m.Show(w.ctx, service)
				w.must(err)
				for _, s := range settings {
					// A user that exists only meanwhile would take back RestrictSUIDSGID=no.
					name, value, _ := strings.Cut(s[1], "=")
					shown := strings.ToLower(properties[name])
					if !strings.Contains(shown, strings.ToLower(value)) {
						t.Errorf("%s gives %s=%s", lines, name, properties[name])
					}
				}
				rows++
			}
			if rows < 6 {
				t.Errorf("the table shows %d drop-ins", rows)
			}
			w.must(os.Remove(m.Path("/etc/systemd/system/" + service + ".d/row.conf")))
		case has("secret"):
			w.must(w.etcd.EnableAuth(w.ctx, "candidate", "secret", "jobs/backup"))
		}
		// Some of it reads the journal, see Machine.logged.
		commands = "mkdir -p /root/leasehold; cd /root/leasehold; journalctl --sync\n" + commands
		out, err := m.Run(w.ctx, "sh", "-euc", commands)
		if err != nil {
			t.Fatalf("%v\n%s\n%s\n%s", errors.Unwrap(err), commands, out, m.Journal(w.ctx, service))
		}
		switch {
		case has("systemctl enable"):
			leads()
		case has("systemctl status"):
			for _, want := range []string{`Status: "leading, token `, "running, token "} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in:\n%s", want, out)
				}
			}
		case has("User=backup"):
			uid := strings.TrimSpace(w.run(m, "id", "-u", "backup"))
			ofUser := fmt.Sprintf("\nUid:\t%s\t%[1]s\t%[1]s\t%[1]s\n", uid)
			if status := leads(); !strings.Contains(status, ofUser) {
				t.Errorf("the job is not of the user %s:\n%s", uid, status)
			}
		case has("User=root"):
			status := leads()
			for _, want := range []string{
				"\nUid:\t0\t0\t0\t0\n", "\nCapBnd:\t" + capabilities(w, m) + "\n",
				"\nNoNewPrivs:\t0\n", "\nSeccomp:\t0\n",
			} {
				if !strings.Contains(status, want) {
					t.Errorf("no %q in:\n%s", want, status)
				}
			}
			// The table's last row: set-user-id programs.
			w.run(m, "sed", "-i", "s/^User=root$/User=backup\\nAmbientCapabilities=CAP_KILL/",
				"/etc/systemd/system/"+service+".d/job.conf")
			w.run(m, "systemctl", "daemon-reload")
			w.run(m, "systemctl", "restart", service)
			if status := leads(); !strings.Contains(status, "\nNoNewPrivs:\t0\n") ||
				strings.Contains(status, "\nUid:\t0\t") {
				t.Errorf("with User=backup:\n%s", status)
			}
		case has("systemctl restart"):
			leads()
		}
	}

	// Every setting of the example is one that the daemon takes.
	example, err := os.ReadFile(filepath.Join(root, "systemd", "example.env"))
	w.must(err)
	settings := strings.ReplaceAll(string(example), "\n#LEASEHOLD_", "\nLEASEHOLD_")
	if !strings.Contains(settings, "\nJOB=/usr/local/bin/backup --verbose\n") {
		t.Fatal("the example has another command by now")
	}
	// That port is the other instance's.
	settings = strings.ReplaceAll(settings, "127.0.0.1:4040", "127.0.0.1:4041")
	w.must(m.Write("/usr/local/bin/backup", "#!/bin/sh\nexec sleep 3600\n"))
	w.must(os.Chmod(m.Path("/usr/local/bin/backup"), 0o755))
	w.must(m.Write("/etc/leasehold/example.env", settings))
	// Ready with valid settings, though it may reach no etcd.
	w.run(m, "systemctl", "start", "leasehold@example")
	for _, address := range []string{"127.0.0.1:4040", "127.0.0.1:4041"} {
		w.run(m, "env", "LEASEHOLD_LISTEN="+address, "leasehold", "check")
	}
}

// capabilities are those that root may have on the machine.
func capabilities(w *world, m *Machine) string {
	w.t.Helper()
	bounding := regexp.MustCompile(`(?m)^CapBnd:\s+(\S+)$`)
	found := bounding.FindStringSubmatch(w.run(m, "cat", "/proc/1/status"))
	if found == nil {
		w.t.Fatal("process 1 has no capabilities")
	}
	return found[1]
}
