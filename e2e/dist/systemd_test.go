//go:build linux

package dist_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
	"leasehold/e2e/systemd"
)

func TestMain(m *testing.M) {
	// The machine's network is made in a namespace of the program's own.
	if os.Getenv("LEASEHOLD_SHIP") == "1" && os.Geteuid() == 0 {
		if inside, code := harness.EnterNetwork(); !inside {
			os.Exit(code)
		}
	}
	os.Exit(m.Run())
}

// TestDeb_OnSystemd installs, installs again and removes the package on a
// machine where systemd runs, as an administrator would: nothing is started,
// systemd knows the unit without being told, a new installation leaves the job
// alone, a removal that can't stop it fails, and one that can hands over and
// leaves nothing enabled.
func TestDeb_OnSystemd(t *testing.T) {
	needs(t, "/lib/systemd/systemd", "nsenter", "ip", "dbus-daemon")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	network, err := harness.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(network.Close)
	etcd := harness.NewTestCluster(t, harness.ClusterConfig{Network: network})
	m, err := systemd.Boot(ctx, systemd.MachineConfig{
		Name: "a", Network: network,
		Files: map[string]string{"/root/leasehold.deb": artifact(t, "leasehold_*_amd64.deb")},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	on := func(args ...string) string {
		t.Helper()
		out, err := m.Run(ctx, args...)
		if err != nil {
			t.Fatalf("%v\n%s\n%s", err, out, m.Journal(ctx, "leasehold@job"))
		}
		return out
	}
	waitFor := func(want map[string]string) map[string]string {
		t.Helper()
		var properties map[string]string
		bound, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		if err := harness.Until(bound, func() (err error) {
			if properties, err = m.Show(ctx, "leasehold@job"); err != nil {
				return err
			}
			for name, value := range want {
				if !strings.HasPrefix(properties[name], value) {
					return fmt.Errorf("%s is %q, want %q", name, properties[name], value)
				}
			}
			return nil
		}); err != nil {
			t.Fatalf("%v\n%s", err, m.Journal(ctx, "leasehold@job"))
		}
		return properties
	}

	on("dpkg", "-i", "/root/leasehold.deb")
	out := on("systemctl", "list-units", "--all", "--plain", "--no-legend", "leasehold@*")
	if out != "" {
		t.Errorf("the package has started something: %s", out)
	}
	settings := "JOB=sleep 3600\nLEASEHOLD_ELECTION=jobs/job\n" +
		"LEASEHOLD_ENDPOINTS=" + strings.Join(etcd.Endpoints(), ",") + "\n"
	if err := m.Write("/etc/leasehold/job.env", settings); err != nil {
		t.Fatal(err)
	}
	on("systemctl", "enable", "--now", "leasehold@job")
	const link = "/etc/systemd/system/multi-user.target.wants/leasehold@job.service"
	enabled := func() bool {
		_, err := os.Lstat(m.Path(link))
		return err == nil
	}
	leading := map[string]string{
		"ActiveState": "active", "StatusText": "leading, token ", "NeedDaemonReload": "no",
	}
	before := waitFor(leading)
	const file = "/usr/lib/systemd/system/leasehold@.service"
	if before["FragmentPath"] != file && "/usr"+before["FragmentPath"] != file {
		t.Errorf("the unit is %s", before["FragmentPath"])
	}

	on("dpkg", "-i", "/root/leasehold.deb")
	after := waitFor(leading)
	if after["MainPID"] != before["MainPID"] || after["StatusText"] != before["StatusText"] {
		t.Errorf("after another installation it is %s, %s; before it was %s, %s",
			after["MainPID"], after["StatusText"], before["MainPID"], before["StatusText"])
	}
	if !enabled() {
		t.Error("another installation has disabled the instance")
	}

	// Whatever the reason for which systemd can't stop it.
	const noStop = "#!/bin/sh\n[ \"$1\" != stop ] || exit 1\nexec /usr/bin/systemctl \"$@\"\n"
	if err := m.Write("/root/no/systemctl", noStop); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(m.Path("/root/no/systemctl"), 0o755); err != nil {
		t.Fatal(err)
	}
	const path = "PATH=/root/no:/usr/sbin:/usr/bin:/sbin:/bin"
	if out, err := m.Run(ctx, "env", path, "dpkg", "-r", "leasehold"); err == nil {
		t.Errorf("the package is removed though its job is not stopped:\n%s", out)
	}
	still := waitFor(map[string]string{"ActiveState": "active"})
	if still["MainPID"] != before["MainPID"] || !enabled() {
		t.Errorf("after a removal that failed it is %s (enabled: %v); before it was %s",
			still["MainPID"], enabled(), before["MainPID"])
	}
	if _, err := os.Stat(m.Path("/usr/bin/leasehold")); err != nil {
		t.Errorf("after a removal that failed: %v", err)
	}

	on("dpkg", "-r", "leasehold")
	gone := waitFor(map[string]string{"ActiveState": "inactive"})
	if gone["LoadState"] != "not-found" {
		t.Errorf("after removal the unit is %s: systemd was not told", gone["LoadState"])
	}
	keys, err := etcd.Etcdctl(ctx, "get", "--prefix", "--keys-only", "jobs/job")
	if err != nil || strings.TrimSpace(keys) != "" {
		t.Errorf("after removal the election has %q (%v)", keys, err)
	}
	if _, err := os.Stat(m.Path("/etc/leasehold/job.env")); err != nil {
		t.Errorf("the instance's settings are gone: %v", err)
	}
	if enabled() {
		t.Errorf("%s is left", link)
	}
	if left, err := filepath.Glob(m.Path("/usr/*/*leasehold*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q (%v)", left, err)
	}
}
