//go:build linux

package k8s_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// leader waits until one of the daemons leads and returns it and the others.
func leader(t *testing.T, daemons []*process) (*process, []*process) {
	t.Helper()
	var found *process
	until(t, "a leader", func() error {
		for _, d := range daemons {
			if code, err := d.get(4040, "/leader"); err == nil && code == http.StatusOK {
				found = d
				return nil
			}
		}
		return errors.New("nobody leads")
	})
	return found, slices.DeleteFunc(slices.Clone(daemons), func(d *process) bool {
		return d == found
	})
}

// startPods starts pods of a Deployment: its init containers, then the others; leasehold's are
// returned, and the others.
func (w *world) startPods(
	objects []object, name string, count int, changes ...func(*corev1.PodSpec),
) (daemons, others []*process) {
	w.t.Helper()
	spec := find[appsv1.Deployment](w.t, objects, name).Spec.Template.Spec
	for _, change := range changes {
		change(&spec)
	}
	for i := range count {
		p := w.pod(fmt.Sprintf("%s-7d4b9c6f5-%d", name, i), spec, nil)
		for _, c := range spec.InitContainers {
			started := p.start(c)
			if c.RestartPolicy != nil {
				daemons = append(daemons, started)
			} else if code := started.end(w.t, time.Minute); code != 0 {
				w.t.Fatalf("init container %s ended with %d: %s", c.Name, code, started.out)
			}
		}
		for _, c := range spec.Containers {
			if started := p.start(c); c.Name == leaseholdIn(spec).Name {
				daemons = append(daemons, started)
			} else {
				others = append(others, started)
			}
		}
	}
	for _, d := range daemons {
		until(w.t, d.pod.name+" to be ready", func() error {
			return errors.Join(d.probe(d.spec.LivenessProbe), d.probe(d.spec.ReadinessProbe))
		})
	}
	return daemons, others
}

// The etcd of the manifests, as processes: the certificates let in who has one, and the
// probes say what they should.
func TestLive_Etcd(t *testing.T) {
	w := newWorld(t, shared.rendered["etcd"])
	pods := w.etcdPods()
	first := pods[0].start(pods[0].spec.Containers[0])
	probes := first.spec
	until(t, "the first member to be live", func() error {
		return first.probe(probes.StartupProbe)
	})
	if err := first.probe(probes.ReadinessProbe); err == nil {
		t.Error("a member without a majority is ready")
	}
	members := []*process{first}
	for _, p := range pods[1:] {
		members = append(members, p.start(p.spec.Containers[0]))
	}
	for _, m := range members {
		until(t, m.pod.name+" to be ready", func() error { return m.probe(probes.ReadinessProbe) })
	}

	secret := func(name string) map[string][]byte {
		return find[corev1.Secret](t, w.configs, name).Data
	}
	ask := func(port int, authority []byte, pair map[string][]byte) error {
		config := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "etcd-0.etcd"}
		config.RootCAs.AppendCertsFromPEM(authority)
		if pair != nil {
			cert, err := tls.X509KeyPair(pair["tls.crt"], pair["tls.key"])
			if err != nil {
				t.Fatal(err)
			}
			config.Certificates = []tls.Certificate{cert}
		}
		client := http.Client{
			Timeout:   10 * time.Second,
			Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true},
		}
		resp, err := client.Get(fmt.Sprintf("https://%s:%d/version", first.pod.node.Addr, port))
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	authority := secret("etcd-client-tls")["ca.crt"]
	stranger := t.TempDir()
	if err := makeCerts(stranger, "default"); err != nil {
		t.Fatal(err)
	}
	strange := readPair(t, stranger, "client")
	for _, c := range []struct {
		who     string
		port    int
		trusted []byte
		pair    map[string][]byte
		in      bool
	}{
		{"a client", 2379, authority, secret("etcd-client-tls"), true},
		{"a client without a certificate", 2379, authority, nil, false},
		{"a client with a stranger's", 2379, authority, strange, false},
		{
			"a client that trusts a stranger", 2379,
			strange["ca.crt"], secret("etcd-client-tls"), false,
		},
		{"a peer without a certificate", 2380, authority, nil, false},
		{"a peer with a stranger's", 2380, authority, strange, false},
		// Its address is this test's, not a member's.
		{"a peer from elsewhere", 2380, authority, secret("etcd-peer-tls"), false},
	} {
		if err := ask(c.port, c.trusted, c.pair); (err == nil) != c.in {
			t.Errorf("%s: let in %v, want %v: %v", c.who, err == nil, c.in, err)
		}
	}

	// With the majority gone the last one is not ready, and yet not to be restarted.
	for _, m := range members[1:] {
		m.stop(t)
		m.end(t, time.Duration(*m.pod.spec.TerminationGracePeriodSeconds)*time.Second)
	}
	until(t, "the last member not to be ready", func() error {
		if first.probe(probes.ReadinessProbe) == nil {
			return errors.New("it is ready")
		}
		return nil
	})
	if err := first.probe(probes.LivenessProbe); err != nil {
		t.Errorf("a member that has lost its majority would be restarted: %v", err)
	}
	members[1] = pods[1].start(pods[1].spec.Containers[0])
	until(t, "two members to be ready", func() error {
		return errors.Join(first.probe(probes.ReadinessProbe),
			members[1].probe(probes.ReadinessProbe))
	})
}

func readPair(t *testing.T, dir, name string) map[string][]byte {
	t.Helper()
	return map[string][]byte{
		"ca.crt":  read(t, dir, "ca.crt"),
		"tls.crt": read(t, dir, name+".crt"),
		"tls.key": read(t, dir, name+".key"),
	}
}

// The wrapper against that etcd: a leader's pod is stopped as Kubernetes does it, a member is lost,
// the certificates are renewed.
func TestLive_Wrapper(t *testing.T) {
	busybox(t)
	w := newWorld(t, shared.rendered["etcd"])
	members := w.startEtcd()
	daemons, _ := w.startPods(shared.rendered["wrapper"], "wrapper", 3)
	first, others := leader(t, daemons)
	until(t, "the job", func() error {
		return says(first, "running in "+first.pod.name+", token ")
	})

	// One member lost is no reason to move the job.
	members[0].stop(t)
	members[0].end(t, 30*time.Second)

	// Renewed certificates, mounted where the old ones are.
	renewed := filepath.Join(t.TempDir(), "k8s")
	if err := copyTree(shared.tree, renewed); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"ca.crt", "ca.key"} {
		data := read(t, filepath.Join(shared.tree, "certs"), file)
		if err := os.WriteFile(filepath.Join(renewed, "certs", file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := makeCerts(filepath.Join(renewed, "certs"), "default"); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.configs, err = render(filepath.Join(renewed, "etcd")); err != nil {
		t.Fatal(err)
	}
	for _, p := range append(slices.Clone(members), daemons...) {
		for _, v := range p.pod.spec.Volumes {
			if v.Secret != nil {
				w.mountSecret(p.pod.volumes[v.Name], v.Secret)
			}
		}
	}
	again := members[0].pod.start(members[0].spec)
	until(t, "the member to be back", func() error {
		return again.probe(again.spec.ReadinessProbe)
	})
	if code, err := first.get(4040, "/leader"); err != nil || code != http.StatusOK {
		t.Errorf("the leader's /leader: %d (%v)", code, err)
	}

	begin := time.Now()
	first.stop(t)
	second, _ := leader(t, others)
	// Milliseconds, and a busy machine's. A lease that is not given back costs more than ten
	// seconds.
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("a new leader only %v after the old one's SIGTERM", took.Round(time.Millisecond))
	}
	if code := first.end(t, time.Minute); code != 0 {
		t.Errorf("the stopped pod ended with %d", code)
	}
	until(t, "the next job", func() error {
		return says(second, "running in "+second.pod.name+", token ")
	})
	resp, err := http.Get(fmt.Sprintf("http://%s:4040/", second.pod.node.Addr))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var status struct{ Name, Election string }
	err = json.NewDecoder(resp.Body).Decode(&status)
	if err != nil || status.Name != second.pod.name || status.Election != "jobs/wrapper" {
		t.Errorf("status %+v (%v), want the leader's name %s", status, err, second.pod.name)
	}
}

func read(t *testing.T, dir, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// busybox is what stands for the image of the examples.
func busybox(t *testing.T) { needs(t, "busybox") }

func says(p *process, text string) error {
	if !strings.Contains(p.out.String(), text) {
		return fmt.Errorf("container %s of pod %s has not said %q", p.spec.Name, p.pod.name, text)
	}
	return nil
}

// Both forms of the sidecar, with the app that asks it, stopped in the order in which Kubernetes
// stops them. One member of etcd.
func TestLive_Sidecar(t *testing.T) {
	busybox(t)
	w := newWorld(t, shared.rendered["etcd/one-member"])
	w.startEtcd()
	for _, form := range []string{"sidecar", "sidecar/plain"} {
		t.Run(form, func(t *testing.T) {
			daemons, apps := w.startPods(shared.rendered[form], "sidecar", 2)
			app := func(of *process) *process {
				i := slices.IndexFunc(apps, func(a *process) bool { return a.pod == of.pod })
				return apps[i]
			}
			first, others := leader(t, daemons)
			until(t, "the app to hear of it", func() error {
				return says(app(first), first.pod.name+" leads")
			})
			if says(app(others[0]), "leads") == nil {
				t.Error("the app of a standby was told that it leads")
			}
			env := environment(t, first.spec, "", w.configs)
			held, err := time.ParseDuration(env["LEASEHOLD_STOP_GRACE"])
			if err != nil {
				t.Fatal(err)
			}
			app(first).stop(t)
			if form == "sidecar" { // A native sidecar is stopped when the app is gone.
				app(first).end(t, 30*time.Second)
			}
			begin := time.Now()
			first.stop(t)
			first.turns(t)
			app(first).end(t, 30*time.Second)
			second, _ := leader(t, others)
			took := time.Since(begin)
			if took < held {
				t.Errorf("the lease was given back after %v, for %v it was to be held for the app",
					took, held)
			}
			if took > held+5*time.Second {
				t.Errorf("a new leader only %v after the sidecar's SIGTERM, "+
					"and the lease was to be held for %v", took.Round(time.Millisecond), held)
			}
			t.Logf("a new leader %v after the sidecar's SIGTERM", took.Round(time.Millisecond))
			if code := first.end(t, time.Minute); code != 0 {
				t.Errorf("the sidecar ended with %d", code)
			}
			until(t, "the next app to hear of it", func() error {
				return says(app(second), second.pod.name+" leads")
			})
			second.hurry(t)
		})
	}
}

// turns waits until a sidecar that was stopped says that it does not lead.
func (p *process) turns(t *testing.T) {
	t.Helper()
	until(t, "/leader to turn 503", func() error {
		if code, err := p.get(4040, "/leader"); err != nil ||
			code != http.StatusServiceUnavailable {
			return fmt.Errorf("%d (%w)", code, err)
		}
		return nil
	})
}

// hurry stops a leading sidecar at once: a second signal says so.
func (p *process) hurry(t *testing.T) {
	t.Helper()
	p.stop(t)
	p.turns(t)
	p.stop(t)
	p.end(t, time.Minute)
}

// The sidecar is stopped while the app works, as it may for so long after it has asked: two apps
// never work at once. The kubelet does that to a pod that is deleted by force or evicted, and where
// the sidecar alone is restarted.
func TestLive_SidecarStopsFirst(t *testing.T) {
	busybox(t)
	w := newWorld(t, shared.rendered["etcd/one-member"])
	w.startEtcd()
	for _, c := range []struct {
		name, form string
		forced     bool
		grace      string // in the place of the manifest's
		overlaps   bool
	}{
		{name: "restarted", form: "sidecar"},
		{name: "restarted, second container", form: "sidecar/plain"},
		{name: "forced", form: "sidecar", forced: true},
		{name: "can fail", form: "sidecar", grace: "0s", overlaps: true},
		{name: "can fail, forced", form: "sidecar", forced: true, grace: "0s", overlaps: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			// It ignores TERM, asks, and works for all but a second of the time that it has. The
			// second is for a busy machine.
			tm := timingOf(t, shared.rendered[c.form], "sidecar")
			script := fmt.Sprintf(`trap '' TERM
				while :; do
					read asked _ </proc/uptime
					if wget -q -O /dev/null http://127.0.0.1:4040/leader 2>/dev/null; then
						echo "from $asked"
						sleep %v
						read done _ </proc/uptime
						echo "to $done"
					else
						sleep 0.05
					fi
				done`, (tm.lossGrace - time.Second).Seconds())
			change := func(spec *corev1.PodSpec) {
				isApp := func(c corev1.Container) bool { return c.Name == "app" }
				spec.Containers[slices.IndexFunc(spec.Containers, isApp)].Args = []string{script}
				if c.grace != "" {
					grace := corev1.EnvVar{Name: "LEASEHOLD_STOP_GRACE", Value: c.grace}
					sidecar := leaseholdIn(*spec)
					sidecar.Env = append(sidecar.Env, grace)
				}
			}
			daemons, apps := w.startPods(shared.rendered[c.form], "sidecar", 2, change)
			app := func(of *process) *process {
				i := slices.IndexFunc(apps, func(a *process) bool { return a.pod == of.pod })
				return apps[i]
			}
			first, others := leader(t, daemons)
			steps := func(p *process) int { return strings.Count(app(p).out.String(), "from ") }
			before := steps(first)
			until(t, "a step to begin", func() error {
				if steps(first) == before {
					return errors.New("none has")
				}
				return nil
			})
			first.stop(t)
			if c.forced {
				app(first).stop(t)
				time.Sleep(time.Second) // the grace that the kubelet leaves
				first.kill()
				app(first).kill()
			}
			until(t, "the other app to work", func() error { return says(app(others[0]), "to ") })
			app(first).kill()
			app(others[0]).kill()
			overlap := false
			for _, a := range app(first).worked(t) {
				for _, b := range app(others[0]).worked(t) {
					overlap = overlap || a.from < b.to && b.from < a.to
				}
			}
			if overlap != c.overlaps {
				t.Errorf("two apps worked at once: %v, want %v: %v and %v",
					overlap, c.overlaps, app(first).worked(t), app(others[0]).worked(t))
			}
			first.end(t, time.Minute)
			others[0].hurry(t)
		})
	}
}

type interval struct{ from, to float64 } // in seconds of /proc/uptime

// worked returns when the app of a test worked. Its last step ended with it.
func (p *process) worked(t *testing.T) (steps []interval) {
	t.Helper()
	for line := range strings.Lines(p.out.String()) {
		var at float64
		if _, err := fmt.Sscanf(line, "from %g", &at); err == nil {
			steps = append(steps, interval{at, p.killed})
		} else if _, err := fmt.Sscanf(line, "to %g", &at); err == nil {
			steps[len(steps)-1].to = at
		}
	}
	return steps
}

// What is wrong with a manifest's settings is the termination message of its pod: every fault.
func TestLive_TerminationMessage(t *testing.T) {
	busybox(t)
	w := newWorld(t, shared.rendered["etcd"])
	for app, form := range map[string]string{"wrapper": "wrapper", "sidecar": "sidecar"} {
		spec := find[appsv1.Deployment](t, shared.rendered[form], app).Spec.Template.Spec
		p := w.pod(app, spec, nil)
		for _, c := range spec.InitContainers {
			if c.RestartPolicy == nil {
				p.start(c).end(t, time.Minute)
			}
		}
		c := *leaseholdIn(spec)
		if c.TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError {
			t.Errorf("k8s/%s: other endings leave no message: %s", form, c.TerminationMessagePolicy)
		}
		c.Env = append(c.Env,
			corev1.EnvVar{Name: "LEASEHOLD_TLL", Value: "5s"},
			corev1.EnvVar{Name: "LEASEHOLD_TTL", Value: "15"})
		if code := p.start(c).end(t, time.Minute); code != 78 {
			t.Errorf("k8s/%s: exit code %d, want 78", form, code)
		}
		message := string(read(t, filepath.Join(w.dir, app), c.Name+".termination-log"))
		if !strings.Contains(message, "LEASEHOLD_TLL: unknown variable") ||
			!strings.Contains(message, "LEASEHOLD_TTL: ") {
			t.Errorf("k8s/%s: termination message %q", form, message)
		}
	}
}
