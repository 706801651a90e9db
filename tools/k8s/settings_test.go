//go:build linux

package k8s_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"leasehold/e2e/harness"
)

// judge has the daemon read the settings of a manifest and returns its exit code and what it
// said. It is given a command that does not exist, or no time to be elected: what it does with
// good settings ends at once.
func judge(t *testing.T, overlay string, changes map[string]string) (code int, said string) {
	t.Helper()
	app, _, _ := strings.Cut(overlay, "/")
	etcd := shared.rendered["etcd"]
	pod := find[appsv1.Deployment](t, shared.rendered[overlay], app).Spec.Template.Spec
	c := leaseholdIn(pod)
	env := environment(t, *c, app+"-7d4b9c6f5-x2x7k", etcd)
	for _, m := range c.VolumeMounts {
		i := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool {
			return v.Name == m.Name && v.Secret != nil
		})
		if i < 0 {
			continue
		}
		dir := t.TempDir()
		secret := find[corev1.Secret](t, etcd, pod.Volumes[i].Secret.SecretName)
		for file, data := range secret.Data {
			if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for name, value := range env {
			env[name] = strings.ReplaceAll(value, m.MountPath, dir)
		}
	}
	// The port may be taken here; that the daemon takes the setting is what TestLive shows.
	env["LEASEHOLD_LISTEN"] = "127.0.0.1:0"
	args := []string{"--", "/no/such/job"}
	if slices.Equal(c.Args, []string{"elect"}) {
		args = c.Args
		env["LEASEHOLD_WAIT"] = "0s"
	}
	maps.Copy(env, changes)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	code, _, said, err := harness.RunOnce(ctx, list(env), shared.leasehold, args...)
	if err != nil {
		t.Fatal(err)
	}
	return code, said
}

func TestSettings_TheDaemonTakesThem(t *testing.T) {
	for overlay := range overlays {
		app, _, _ := strings.Cut(overlay, "/")
		// No such command; etcd does not answer.
		want, daemon := map[string]int{"wrapper": 127, "sidecar": 69}[app]
		if !daemon {
			continue
		}
		t.Run(overlay, func(t *testing.T) {
			t.Parallel()
			if code, said := judge(t, overlay, nil); code != want {
				t.Errorf("exit code %d, want %d: %s", code, want, said)
			}
		})
	}
}

// What a manifest gets wrong is told at once and by name; what Kubernetes itself
// puts there is no fault.
func TestSettings_EveryFaultIsNamed(t *testing.T) {
	for _, overlay := range []string{"wrapper", "sidecar", "sidecar/plain"} {
		code, said := judge(t, overlay, map[string]string{
			"LEASEHOLD_TLL":                    "5s",
			"LEASEHOLD_TTL":                    "15",
			"LEASEHOLD_STOP_GRACE":             "ten",
			"LEASEHOLD_TLS_CA_FILE":            "/no/such/file",
			"LEASEHOLD_SERVICE_HOST":           "10.0.0.1",
			"LEASEHOLD_PORT_4040_TCP":          "tcp://10.0.0.1:4040",
			"LEASEHOLD_LEADER_SERVICE_PORT":    "4040",
			"LEASEHOLD_PORT_4040_TCP_PROTO":    "tcp",
			"LEASEHOLD_SERVICE_PORT_LEASEHOLD": "4040",
		})
		if code != 78 {
			t.Errorf("k8s/%s: exit code %d, want 78", overlay, code)
		}
		lines := strings.Split(strings.TrimSpace(said), "\n")
		for _, want := range []string{
			"LEASEHOLD_TLL: unknown variable: did you mean LEASEHOLD_TTL?",
			"LEASEHOLD_TTL: ", "LEASEHOLD_STOP_GRACE: ", "LEASEHOLD_TLS_CA_FILE: ",
		} {
			begins := func(line string) bool { return strings.HasPrefix(line, want) }
			if !slices.ContainsFunc(lines, begins) {
				t.Errorf("k8s/%s: no line says %q: %q", overlay, want, lines)
			}
		}
		if len(lines) != 4 {
			t.Errorf("k8s/%s: %d faults, want 4: %q", overlay, len(lines), lines)
		}
	}
}

// The etcd in the manifests is the one that the tests are run with.
func TestEtcd_VersionIsTheOneTested(t *testing.T) {
	etcd, err := harness.FindEtcd(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	version, err := exec.Command(etcd.Server, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	set := find[appsv1.StatefulSet](t, shared.rendered["etcd"], "etcd")
	image := set.Spec.Template.Spec.Containers[0].Image
	_, tag, _ := strings.Cut(image, ":v")
	if !strings.HasPrefix(string(version), "etcd Version: "+tag+"\n") {
		t.Errorf("image %s, but the tests run %s", image, version)
	}
}

// cert-manager makes what `make k8s-certs` makes: Secrets of the same names, for
// the same hosts and uses.
func TestCerts_CertManagerMakesTheSame(t *testing.T) {
	secrets := map[string]*x509.Certificate{}
	for _, o := range shared.rendered["etcd"] {
		if o.kind == "Secret" {
			secret := find[corev1.Secret](t, shared.rendered["etcd"], o.name)
			block, _ := pem.Decode(secret.Data["tls.crt"])
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			secrets[o.name] = cert
		}
	}
	uses := map[string]x509.ExtKeyUsage{
		"server auth": x509.ExtKeyUsageServerAuth, "client auth": x509.ExtKeyUsageClientAuth,
	}
	for _, o := range shared.rendered["etcd/cert-manager"] {
		var c struct {
			Spec struct {
				IsCA        bool     `json:"isCA"`
				CommonName  string   `json:"commonName"`
				SecretName  string   `json:"secretName"`
				DNSNames    []string `json:"dnsNames"`
				IPAddresses []string `json:"ipAddresses"`
				Usages      []string `json:"usages"`
			} `json:"spec"`
		}
		if err := yaml.Unmarshal(o.yaml, &c); err != nil {
			t.Fatal(err)
		}
		if o.kind != "Certificate" || c.Spec.IsCA {
			continue
		}
		cert := secrets[c.Spec.SecretName]
		if cert == nil {
			t.Errorf("%v: there is no Secret %s in k8s/etcd", o, c.Spec.SecretName)
			continue
		}
		delete(secrets, c.Spec.SecretName)
		var usages []x509.ExtKeyUsage
		for _, word := range c.Spec.Usages {
			if use, found := uses[word]; found {
				usages = append(usages, use)
			}
		}
		// Those with the namespace in them are for others who know it.
		names := slices.DeleteFunc(slices.Clone(cert.DNSNames), func(name string) bool {
			return strings.Contains(name, ".default")
		})
		slices.Sort(names)
		slices.Sort(c.Spec.DNSNames)
		if cert.Subject.CommonName != c.Spec.CommonName ||
			!slices.Equal(cert.ExtKeyUsage, usages) || !slices.Equal(names, c.Spec.DNSNames) ||
			len(cert.IPAddresses) != len(c.Spec.IPAddresses) {
			t.Errorf("%v: %+v, but make k8s-certs makes %s, %v, %v, %v", o, c.Spec,
				cert.Subject.CommonName, cert.ExtKeyUsage, names, cert.IPAddresses)
		}
	}
	if len(secrets) > 0 {
		t.Errorf("cert-manager is not asked for %v", slices.Collect(maps.Keys(secrets)))
	}
}

// Run again, make k8s-certs renews the certificates under the same authority; it
// never loses half of one.
func TestCerts_Renewal(t *testing.T) {
	dir := t.TempDir()
	read := func() map[string]string {
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		contents := map[string]string{}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(file)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(file, ".key") && info.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", file, info.Mode())
			}
			contents[filepath.Base(file)] = string(data)
		}
		return contents
	}
	if err := makeCerts(dir, "jobs"); err != nil {
		t.Fatal(err)
	}
	first := read()
	if err := makeCerts(dir, "jobs"); err != nil {
		t.Fatal(err)
	}
	second := read()
	if len(first) != 8 || len(second) != 8 {
		t.Fatalf("%d files, then %d; want 8", len(first), len(second))
	}
	for file := range first {
		if kept, want := first[file] == second[file], strings.HasPrefix(file, "ca."); kept != want {
			t.Errorf("%s is the same: %v, want %v", file, kept, want)
		}
	}
	authority := x509.NewCertPool()
	authority.AppendCertsFromPEM([]byte(first["ca.crt"]))
	block, _ := pem.Decode([]byte(second["server.crt"]))
	server, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"etcd-2.etcd", "etcd-2.etcd.jobs", "etcd-2.etcd.jobs.svc.cluster.local", "etcd.jobs.svc",
	} {
		options := x509.VerifyOptions{DNSName: name, Roots: authority}
		if _, err := server.Verify(options); err != nil {
			t.Errorf("the server's certificate is not for %s: %v", name, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	if err := makeCerts(dir, "jobs"); err == nil ||
		!strings.Contains(err.Error(), "without its other half") {
		t.Errorf("an authority without its key: %v", err)
	}
}
