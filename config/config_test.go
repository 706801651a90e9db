//go:build linux

package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/election"

	"leasehold/internal/quote"
)

// load sets NAME=value pairs (without the prefix) in an environment that has no other settings, and
// reads it.
func load(t *testing.T, use Use, settings ...string) (Config, error) {
	t.Helper()
	for _, entry := range os.Environ() {
		if name, _, _ := strings.Cut(entry, "="); strings.HasPrefix(name, Prefix+"_") {
			t.Setenv(name, "") // Restored at the end of the test.
			if err := os.Unsetenv(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, "=")
		t.Setenv(Prefix+"_"+name, value)
	}
	return Load(use)
}

func TestConfig_Defaults(t *testing.T) {
	// A variable that is set to nothing counts as unset.
	cfg, err := load(t, ForRun, "ELECTION=jobs/a", "TTL=", "ENDPOINTS=", "LISTEN=", "RESTART=",
		"WAIT=", "MARGIN=", "PASSWORD=", "LOG_LEVEL=", "NO_SUCH=")
	if err != nil {
		t.Fatal(err)
	}
	host, _ := os.Hostname()
	for _, c := range []struct {
		name      string
		got, want any
	}{
		{"ENDPOINTS", strings.Join(cfg.Endpoints, " "), "http://127.0.0.1:2379"},
		{"ELECTION", cfg.Election, "jobs/a"},
		{"IDENTITY", cfg.Identity, host},
		{"TTL", cfg.TTL.Duration, 15 * time.Second},
		{"STOP_SIGNAL", cfg.StopSignal.Signal, unix.SIGTERM},
		{"STOP_GRACE", cfg.StopGrace.Duration, 10 * time.Second},
		{"LOSS_GRACE", cfg.LossGrace.Or(-1), time.Duration(-1)},
		{"MARGIN", cfg.Margin.Or(-1), time.Duration(-1)},
		{"RESTART", cfg.Restart, "on-failure"},
		{"RESTART_LIMIT", cfg.RestartLimit.N, 5},
		{"CONTACT_LOSS", cfg.ContactLoss, "stop"},
		{"NO_NEW_PRIVS", cfg.NoNewPrivs, "auto"},
		{"WAIT", cfg.Wait.Or(-1), time.Duration(-1)},
		{"LISTEN", cfg.Listen, "127.0.0.1:4040"},
		{"HEALTH_CMD", strings.Join(cfg.Health.Cmd.Argv, " "), ""},
		{"HEALTH_INTERVAL", cfg.Health.Interval.Duration, 10 * time.Second},
		{"HEALTH_TIMEOUT", cfg.Health.Timeout.Duration, 3 * time.Second},
		{"HEALTH_RETRIES", cfg.Health.Retries.N, 3},
		{"NOTIFY", cfg.Notify, "off"},
		{"WATCHDOG", cfg.Watchdog.Duration, time.Duration(0)},
		{"HEALTH_START_PERIOD", cfg.Health.StartPeriod.Duration, time.Duration(0)},
		{"LOG_LEVEL", cfg.Log.Level.Level, slog.LevelInfo},
		{"LOG_FORMAT", cfg.Log.Format, "text"},
		{"TLS", cfg.TLS, TLS{}},
		{"PRE_START", cfg.PreStart.Argv == nil, true},
		{"POST_STOP", cfg.PostStop.Argv == nil, true},
		{"KILL_BY", cfg.Timing().From(0).KillBy, 13500 * time.Millisecond},
		{"USERNAME", cfg.Username, ""},
		{"DIAL_TIMEOUT", cfg.DialTimeout.Duration, time.Second},
	} {
		if c.got != c.want {
			t.Errorf("%s = %v, want %v", c.name, c.got, c.want)
		}
	}
}

// By default a hook after the job fits into every TTL, and no hook costs nothing.
func TestConfig_PostStop(t *testing.T) {
	for _, ttl := range []time.Duration{2 * time.Second, 15 * time.Second, 5 * time.Minute} {
		cfg, err := load(t, ForRun, "ELECTION=e", "POST_STOP=true", "TTL="+ttl.String())
		if err != nil {
			t.Fatalf("TTL %v: %v", ttl, err)
		}
		got, without := cfg.Timing(), election.NewTiming(ttl, -1, -1, 0)
		if got.PostStop != ttl/10 ||
			got.From(0).KillBy != without.From(0).KillBy-ttl/10 ||
			got.From(0).StopAt != without.From(0).StopAt-ttl/10 {
			t.Errorf("TTL %v: %+v, without a hook %+v", ttl, got.From(0), without.From(0))
		}
		if ec := cfg.ElectionConfig(nil); ec.Timing(ttl) != got {
			t.Errorf("the election has %+v, want %+v", ec.Timing(ttl), got)
		}
	}
}

func TestConfig_AllValuesAreRead(t *testing.T) {
	dir := t.TempDir()
	ca, key := testPair(t, dir, "pair")[0], filepath.Join(dir, "pair.key")
	password := filepath.Join(dir, "password")
	writeFile(t, password, "hunter2\r\n")
	cfg, err := load(t, ForRun,
		"ENDPOINTS=https://a:2379,b:2379/,[::1]:2379", "ELECTION=/jobs/a", "IDENTITY=b", "TTL=30s",
		"STOP_SIGNAL=sigusr1", "STOP_GRACE=0s", "LOSS_GRACE=0s", "MARGIN=500ms",
		"RESTART=Always", "RESTART_LIMIT=0", "WAIT=0", "LISTEN=off", "LOG_LEVEL=WARN",
		"LOG_FORMAT=json", "TLS_CA_FILE="+ca, "TLS_CERT_FILE="+ca, "TLS_KEY_FILE="+key,
		"TLS_SERVER_NAME=etcd", "USERNAME=u", "PASSWORD_FILE="+password, "DIAL_TIMEOUT=250ms",
		`HEALTH_CMD=sh -c 'a "b" | $c' "d e" f\ g`, "HEALTH_INTERVAL=1s", "HEALTH_TIMEOUT=2s",
		"HEALTH_RETRIES=1", "HEALTH_START_PERIOD=1m", "NOTIFY=Ready", "WATCHDOG=30s")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name      string
		got, want any
	}{
		{
			"ENDPOINTS", strings.Join(cfg.Endpoints, " "),
			"https://a:2379 https://b:2379 https://[::1]:2379",
		},
		{"ELECTION", cfg.Election, "/jobs/a"},
		{"IDENTITY", cfg.Identity, "b"},
		{"TTL", cfg.TTL.Duration, 30 * time.Second},
		{"STOP_SIGNAL", cfg.StopSignal.Signal, unix.SIGUSR1},
		{"STOP_GRACE", cfg.StopGrace.Duration, time.Duration(0)},
		{"LOSS_GRACE", cfg.LossGrace.Or(-1), time.Duration(0)},
		{"MARGIN", cfg.Margin.Or(-1), 500 * time.Millisecond},
		{"RESTART", cfg.Restart, "always"},
		{"RESTART_LIMIT", cfg.RestartLimit.N, 0},
		{"WAIT", cfg.Wait.Or(-1), time.Duration(0)},
		{"LISTEN", cfg.Listen, "off"},
		{"HEALTH_CMD", strings.Join(cfg.Health.Cmd.Argv, ";"), `sh;-c;a "b" | $c;d e;f g`},
		{"HEALTH_INTERVAL", cfg.Health.Interval.Duration, time.Second},
		{"HEALTH_TIMEOUT", cfg.Health.Timeout.Duration, 2 * time.Second},
		{"HEALTH_RETRIES", cfg.Health.Retries.N, 1},
		{"NOTIFY", cfg.Notify, "ready"},
		{"WATCHDOG", cfg.Watchdog.Duration, 30 * time.Second},
		{"HEALTH_START_PERIOD", cfg.Health.StartPeriod.Duration, time.Minute},
		{"LOG_LEVEL", cfg.Log.Level.Level, slog.LevelWarn},
		{"LOG_FORMAT", cfg.Log.Format, "json"},
		{"TLS", cfg.TLS, TLS{CAFile: ca, CertFile: ca, KeyFile: key, ServerName: "etcd"}},
		{"USERNAME", cfg.Username, "u"},
		{"DIAL_TIMEOUT", cfg.DialTimeout.Duration, 250 * time.Millisecond},
	} {
		if c.got != c.want {
			t.Errorf("%s = %v, want %v", c.name, c.got, c.want)
		}
	}
	if p, err := cfg.ReadPassword(); p != "hunter2" || err != nil {
		t.Errorf("ReadPassword() = %q, %v", p, err)
	}
	writeFile(t, password, "changed")
	if p, err := cfg.ReadPassword(); p != "changed" || err != nil {
		t.Errorf("ReadPassword() after a change = %q, %v", p, err)
	}
}

func TestConfig_BareNamesAreIgnored(t *testing.T) {
	want, err := load(t, ForRun, "ELECTION=e", "IDENTITY=i")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range new(Config).Variables() {
		t.Setenv(v.Name, "nonsense")
		last := v.Name[strings.LastIndex(v.Name, "_")+1:] // CERT_FILE's FILE, LOG_LEVEL's LEVEL.
		t.Setenv(last, "nonsense")
	}
	got, err := load(t, ForRun, "ELECTION=e", "IDENTITY=i")
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprintf("%#v", got) != fmt.Sprintf("%#v", want) {
		t.Errorf("bare names changed the configuration:\n%#v\n%#v", got, want)
	}
}

// TestConfig_NamesAreThoseOfTheLibrary: help, the reference and the search for unknown variables
// name the variables themselves.
func TestConfig_NamesAreThoseOfTheLibrary(t *testing.T) {
	values := map[string]string{
		"ENDPOINTS": "x", "TTL": "77s", "STOP_SIGNAL": "HUP", "RESTART_LIMIT": "77",
		"LOG_LEVEL": "error",
	}
	for _, v := range new(Config).Variables() {
		value := values[v.Name]
		if value == "" {
			value = "77s"
		}
		before, _ := load(t, ForRun)
		after, _ := load(t, ForRun, v.Name+"="+value)
		for i, field := range after.Variables() {
			was := before.Variables()[i].Field.Interface()
			changed := fmt.Sprint(field.Field.Interface()) != fmt.Sprint(was)
			if changed != (field.Name == v.Name) {
				t.Errorf("%s=%s: field of %s changed: %v", v.Name, value, field.Name, changed)
			}
		}
	}
}

func TestConfig_Refusals(t *testing.T) {
	dir := t.TempDir()
	pair, other := testPair(t, dir, "pair"), testPair(t, dir, "other")
	empty, missing := filepath.Join(dir, "empty"), filepath.Join(dir, "missing")
	writeFile(t, empty, "\n")

	for _, c := range []struct {
		name     string
		settings string // Separated by blanks; "·" stands for a blank.
		want     string // Of each line a part.
	}{
		{"election missing", "ELECTION=", "ELECTION: missing: write the name"},
		{
			"election too long", "ELECTION=" + strings.Repeat("x", 1025),
			"ELECTION: 1025 bytes long: write 1024 at most",
		},
		{"election with newline", "ELECTION=a\n", `ELECTION: "a\n" has a control character`},
		{"election with space", "ELECTION=a·b", `ELECTION: "a b" has white space`},
		{
			"election with a strange space", "ELECTION=a\u00a0b",
			"ELECTION: \"a\\u00a0b\" has white space",
		},
		{"election begins with space", "ELECTION=·a", `ELECTION: " a" has white space`},
		{"election ends with a slash", "ELECTION=jobs/", `ELECTION: "jobs/" ends with a slash`},
		{"election is a slash", "ELECTION=/", `ELECTION: "/" ends with a slash`},
		{
			"election around our own keys", "ELECTION=leasehold",
			`ELECTION: "leasehold" has keys of leasehold's own under its prefix`,
		},
		{"election with two slashes", "ELECTION=jobs//a", `ELECTION: "jobs//a" has two slashes`},
		{"election not UTF-8", "ELECTION=a\xff", "ELECTION: not UTF-8"},
		{"identity too long", "IDENTITY=" + strings.Repeat("x", 1025), "IDENTITY: 1025 bytes long"},
		{"identity with escape", "IDENTITY=\x1b[2J", `IDENTITY: "\x1b[2J" has a control character`},

		{"no unit", "TTL=15", `TTL: "15" has no unit: write 15s`},
		{"no duration", "TTL=1d", `TTL: "1d" is not a duration: write for example 15s`},
		{"TTL too short", "TTL=1s", "TTL: 1s is too short: write 2s or more"},
		{"TTL zero", "TTL=0s", "TTL: 0s is too short"},
		{"TTL negative", "TTL=-5s", `TTL: "-5s" is negative`},
		{
			"TTL not in seconds", "TTL=2500ms",
			"TTL: 2.5s is not in whole seconds, and etcd knows no others: write 2s",
		},
		{"TTL far too long", "TTL=9000000000s", `TTL: "9000000000s" is too long: write 8760h`},
		{"TTL too long", "TTL=301s", "TTL: 5m1s is too long: write 5m (300s) or less"},
		{
			"TTL beyond all bounds", "TTL=99999999999999999999s",
			`TTL: "99999999999999999999s" is not a duration`,
		},
		{
			"arithmetic", "TTL=5s LOSS_GRACE=2s",
			"TTL: loss grace 2s + margin 500ms + 3 × renewal interval 1s = 5.5s" +
				" is more than the TTL 5s: raise it, or lower LEASEHOLD_LOSS_GRACE",
		},
		{
			"arithmetic of the margin", "TTL=10s MARGIN=3s",
			"TTL: loss grace 2s + margin 3s + 3 × renewal interval 2s = 11s is more than",
		},
		{"stop grace", "STOP_GRACE=-1s", `STOP_GRACE: "-1s" is negative`},
		{
			"contact loss", "CONTACT_LOSS=pause",
			`CONTACT_LOSS: "pause" is unknown: write stop or freeze`,
		},
		{
			"no time to freeze", "CONTACT_LOSS=Freeze LOSS_GRACE=0s",
			"LOSS_GRACE: 0s leaves no time to freeze the job",
		},
		{
			"arithmetic of the hook", "POST_STOP=true POST_STOP_TIMEOUT=5s",
			"TTL: loss grace 3s + post-stop timeout 5s + margin 1.5s + 3 × renewal interval 3s = " +
				"18.5s is more than the TTL 15s: raise it, or lower LEASEHOLD_POST_STOP_TIMEOUT",
		},
		{"hook", "PRE_START=a|b", `PRE_START: "a|b" is for a shell: write sh -c '...'`},
		{"hook without an end", "POST_STOP='a", `POST_STOP: "'a" is no command line`},
		{
			"hook for a frozen job", "POST_STOP=true CONTACT_LOSS=freeze",
			"POST_STOP: it can't run for a job that is frozen",
		},
		{
			"time for no hook", "POST_STOP_TIMEOUT=1s",
			"POST_STOP_TIMEOUT: there is no hook: set LEASEHOLD_POST_STOP too, or unset it",
		},
		{
			"no time for a hook", "POST_STOP=true POST_STOP_TIMEOUT=0s",
			"POST_STOP_TIMEOUT: 0s is too short: write 100ms or more",
		},
		{"loss grace", "LOSS_GRACE=-1s", `LOSS_GRACE: "-1s" is negative`},
		{"margin", "MARGIN=0s", "MARGIN: 0s is too short"},
		{"wait", "WAIT=soon", `WAIT: "soon" is not a duration`},
		{"dial timeout", "DIAL_TIMEOUT=0", "DIAL_TIMEOUT: 0s is too short"},
		{"fraction without unit", "STOP_GRACE=0.5", `STOP_GRACE: "0.5" has no unit: write 0.5s`},

		{"signal number", "STOP_SIGNAL=15", `STOP_SIGNAL: "15" is a number: write TERM`},
		{"signal unknown", "STOP_SIGNAL=STOPP", `STOP_SIGNAL: "STOPP" is not the name of a signal`},
		{"signal SIGSIGTERM", "STOP_SIGNAL=SIGSIGTERM", "STOP_SIGNAL: "},
		{
			"signal KILL", "STOP_SIGNAL=SIGKILL",
			`STOP_SIGNAL: "SIGKILL" leaves the job no time to stop:` +
				" for that write LEASEHOLD_STOP_GRACE=0s",
		},
		{"signal STOP", "STOP_SIGNAL=STOP", `STOP_SIGNAL: "STOP" freezes a job`},

		{
			"restart", "RESTART=OnFailure",
			`RESTART: "onfailure" is unknown: write always, on-failure or never`,
		},
		{"restart limit", "RESTART_LIMIT=-1", `RESTART_LIMIT: "-1" is not a whole number`},
		{"restart limit huge", "RESTART_LIMIT=99999999999", "RESTART_LIMIT: "},
		{
			"log level", "LOG_LEVEL=verbose",
			`LOG_LEVEL: "verbose" is unknown: write debug, info, warn or error`,
		},
		{
			"health command for a shell", "HEALTH_CMD=curl·-f·localhost·|·grep·ok",
			`HEALTH_CMD: "curl -f localhost | grep ok" is for a shell: write sh -c`,
		},
		{"health command in backticks", "HEALTH_CMD=`true", "HEALTH_CMD: "},
		{"health command unclosed", "HEALTH_CMD=sh·-c·'true", "is no command line: a quote"},
		{"health command blank", "HEALTH_CMD=·", `HEALTH_CMD: " " has no command`},
		{"health command empty word", "HEALTH_CMD=''", `HEALTH_CMD: "''" has no command`},
		{"health URL and command", "HEALTH_URL=http://a HEALTH_CMD=true", "unset one of them"},
		{"health URL without scheme", "HEALTH_URL=localhost:80", "localhost:80\" is no URL"},
		{"health URL without host", "HEALTH_URL=http:///x", "is no URL: write for example http://"},
		{"health URL unix", "HEALTH_URL=unix:///x", "is no URL"},
		{"health URL with a user", "HEALTH_URL=http://u:hunter2@a", "has a user name in it"},
		{"health URL odd", "HEALTH_URL=http://u:hunter2@a:b", "has a user name in it"},
		{"notify", "NOTIFY=main", `NOTIFY: "main" is unknown: write off or ready`},
		{"watchdog", "WATCHDOG=1ms", "WATCHDOG: 1ms is too short: write 100ms or more"},
		{"fitness command", "FITNESS_CMD=a·|·b", `FITNESS_CMD: "a | b" is for a shell`},
		{"fitness interval", "FITNESS_INTERVAL=1ms", "FITNESS_INTERVAL: 1ms is too short"},
		{"health retries", "HEALTH_RETRIES=0", "HEALTH_RETRIES: 0 is too few"},
		{"health retries many", "HEALTH_RETRIES=101", "HEALTH_RETRIES: 101 is too many"},
		{"health interval", "HEALTH_INTERVAL=1ms", "HEALTH_INTERVAL: 1ms is too short"},
		{"health timeout", "HEALTH_TIMEOUT=0s", "HEALTH_TIMEOUT: 0s is too short"},

		{"log format", "LOG_FORMAT=xml", `LOG_FORMAT: "xml" is unknown: write text or json`},

		{"listen port alone", "LISTEN=4040", `LISTEN: "4040" is not host:port: write host:port`},
		{
			"listen URL", "LISTEN=http://127.0.0.1:4040",
			`LISTEN: "http://127.0.0.1:4040" is not host:port`,
		},
		{
			"listen bare IPv6", "LISTEN=::1:4040",
			`LISTEN: "::1:4040" is not host:port (an IPv6 address needs brackets`,
		},
		{"listen port name", "LISTEN=:http", `LISTEN: ":http" has no port number from 0 to 65535`},
		{"listen port high", "LISTEN=:65536", `LISTEN: ":65536" has no port number`},
		{"listen Off", "LISTEN=OFF", `LISTEN: "OFF" is not host:port`},

		{"endpoint blank", "ENDPOINTS=·", "ENDPOINTS: blank"},
		{"endpoint empty", "ENDPOINTS=a:1,,b:1", "ENDPOINTS: entry 2 is empty"},
		{"endpoint space", "ENDPOINTS=a:1,·b:1", "ENDPOINTS: entry 2 has a space"},
		{"endpoint without port", "ENDPOINTS=etcd", `ENDPOINTS: entry 1 "etcd" is not host:port`},
		{
			"endpoint URL without port", "ENDPOINTS=http://etcd",
			`ENDPOINTS: entry 1 "etcd" is not host:port`,
		},
		{"endpoint without host", "ENDPOINTS=:2379", `ENDPOINTS: entry 1 ":2379" has no host`},
		{"endpoint port 0", "ENDPOINTS=a:0", `ENDPOINTS: entry 1 "a:0" has no port number from 1`},
		{
			"endpoint path", "ENDPOINTS=http://a:1/v3",
			`ENDPOINTS: entry 1 "http://a:1/v3" has more than host and port`,
		},
		{"endpoint query", "ENDPOINTS=http://a:1?x", `has more than host and port`},
		{
			"endpoint scheme", "ENDPOINTS=unix://a:1",
			`ENDPOINTS: entry 1 "unix://a:1" has an unknown scheme`,
		},
		{
			"endpoint bare IPv6", "ENDPOINTS=::1",
			`ENDPOINTS: entry 1 "::1" is not host:port (an IPv6`,
		},
		{"endpoint escape", "ENDPOINTS=a%zz:1", `ENDPOINTS: entry 1 "a%zz:1" is no address`},
		{
			"endpoint user", "ENDPOINTS=http://root:hunter2@a:1",
			"ENDPOINTS: entry 1 has a user name in it: set LEASEHOLD_USERNAME",
		},
		{"endpoint twice", "ENDPOINTS=a:1,http://a:1", "ENDPOINTS: entry 2 names a:1 again"},
		{
			"endpoints mixed", "ENDPOINTS=http://a:1,https://b:1",
			"ENDPOINTS: http and https are mixed",
		},
		{
			"endpoints mixed by bare ones", "ENDPOINTS=a:1,https://b:1",
			"ENDPOINTS: http and https are mixed",
		},
		{
			"http with TLS", "ENDPOINTS=http://a:1 TLS_SERVER_NAME=x",
			"ENDPOINTS: http goes without TLS, but LEASEHOLD_TLS_* is set",
		},
		{"default with TLS", "TLS_SERVER_NAME=x", "ENDPOINTS: http goes without TLS"},

		{"CA missing", "ENDPOINTS=a:1 TLS_CA_FILE=" + missing, "TLS_CA_FILE: open " + missing},
		{
			"CA empty", "ENDPOINTS=a:1 TLS_CA_FILE=" + empty,
			"TLS_CA_FILE: " + empty + " holds no certificate",
		},
		{
			"certificate alone", "ENDPOINTS=a:1 TLS_CERT_FILE=" + pair[0],
			"TLS_KEY_FILE: missing beside LEASEHOLD_TLS_CERT_FILE",
		},
		{
			"key alone", "ENDPOINTS=a:1 TLS_KEY_FILE=" + pair[1],
			"TLS_CERT_FILE: missing beside LEASEHOLD_TLS_KEY_FILE",
		},
		{
			"key missing", "ENDPOINTS=a:1 TLS_CERT_FILE=" + pair[0] + " TLS_KEY_FILE=" + missing,
			"TLS_KEY_FILE: open " + missing,
		},
		{
			"key of another",
			"ENDPOINTS=a:1 TLS_CERT_FILE=" + pair[0] + " TLS_KEY_FILE=" + other[1],
			"TLS_CERT_FILE: tls: private key does not match",
		},

		{"user alone", "USERNAME=u", "USERNAME: set without a password"},
		{"password alone", "PASSWORD=hunter2", "USERNAME: missing beside the password"},
		{
			"two passwords", "USERNAME=u PASSWORD=hunter2 PASSWORD_FILE=" + pair[0],
			"PASSWORD_FILE: set together with LEASEHOLD_PASSWORD",
		},
		{
			"password file missing", "USERNAME=u PASSWORD_FILE=" + missing,
			"PASSWORD_FILE: open " + missing,
		},
		{
			"password file empty", "USERNAME=u PASSWORD_FILE=" + empty,
			"PASSWORD_FILE: " + empty + " holds no password",
		},

		{"unknown", "ELECTIO=a", "ELECTIO: unknown variable: did you mean LEASEHOLD_ELECTION?"},
		{
			"unknown, part of a name", "CA_FILE=a",
			"CA_FILE: unknown variable: did you mean LEASEHOLD_TLS_CA_FILE?",
		},
		{"unknown, like none", "QWERTYUIOP=hunter2", "QWERTYUIOP: unknown variable: unset it"},
		{
			"unknown, with escape", "Q\x1b[2J=1",
			"Q�[2J: unknown variable: unset it",
		},
		{"unknown, near a service link", "PORTS=1", "PORTS: unknown variable"},
		{"unknown, near a port link", "WEB_PORT_80=1", "WEB_PORT_80: unknown variable"},

		{"all at once", "ELECTION= TTL=15 ENDPOINTS=a STOP_SIGNAL=9 RESTART=x RESTART_LIMIT=x" +
			" NO_NEW_PRIVS=x WAIT=x LISTEN=x LOG_LEVEL=x LOG_FORMAT=x TLS_CA_FILE=/x" +
			" TLS_KEY_FILE=/x USERNAME=u DIAL_TIMEOUT=x MARGIN=x LOSS_GRACE=x STOP_GRACE=x" +
			" IDENTITY=\x01 XYZXYZXYZ=1", strings.Join([]string{
			"TTL: ", "STOP_SIGNAL: ", "STOP_GRACE: ", "LOSS_GRACE: ", "MARGIN: ",
			"RESTART_LIMIT: ", "WAIT: ", "LOG_LEVEL: ", "DIAL_TIMEOUT: ", "ENDPOINTS: ",
			"ELECTION: ", "IDENTITY: ", "RESTART: ", "NO_NEW_PRIVS: ", "LISTEN: ",
			"LOG_FORMAT: ", "TLS_CA_FILE: ", "TLS_CERT_FILE: ", "USERNAME: ", "XYZXYZXYZ: ",
		}, "\n")},
	} {
		t.Run(c.name, func(t *testing.T) {
			settings := strings.Split(c.settings, " ")
			election := func(s string) bool { return strings.HasPrefix(s, "ELECTION=") }
			if !slices.ContainsFunc(settings, election) {
				settings = append(settings, "ELECTION=e")
			}
			for i := range settings {
				settings[i] = strings.ReplaceAll(settings[i], "·", " ")
			}
			_, err := load(t, ForRun, settings...)
			if err == nil {
				t.Fatal("accepted")
			}
			lines, wanted := strings.Split(err.Error(), "\n"), strings.Split(c.want, "\n")
			if len(lines) != len(wanted) {
				t.Fatalf("%d problems, want %d:\n%v", len(lines), len(wanted), err)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a secret is told: %v", err)
			}
			for _, want := range wanted {
				found := slices.ContainsFunc(lines, func(line string) bool {
					return strings.HasPrefix(line, Prefix+"_") && strings.Contains(line, want)
				})
				if !found {
					t.Errorf("no line with %q in:\n%v", want, err)
				}
			}
		})
	}
}

func TestConfig_ServiceLinksAndJobVariablesAreNoProblems(t *testing.T) {
	settings := []string{"ELECTION=e", "KEY=e/1", "FENCING_TOKEN=7", "LEASE_ID=1f", "REASON=stop"}
	for _, service := range []string{"", "WEB_", "MY_WEB_"} {
		for _, link := range []string{
			"SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_4040_TCP",
			"PORT_53_UDP_PROTO", "PORT_9_SCTP_ADDR",
		} {
			settings = append(settings, service+link+"=tcp://10.0.0.1:4040")
		}
	}
	if _, err := load(t, ForRun, settings...); err != nil {
		t.Error(err)
	}
}

func TestConfig_OnlyWhatTheUseNeedsIsChecked(t *testing.T) {
	for _, c := range []struct {
		use      Use
		settings string
		want     string // "" for no problem
	}{
		{"elect", "ELECTION=e", ""},
		{"elect", "ELECTION=e STOP_GRACE=1s RESTART=", ""},
		{"elect", "ELECTION=e RESTART=never", "RESTART: it is about a job, and elect runs none"},
		{"elect", "ELECTION=e RESTART_LIMIT=5", "RESTART_LIMIT: it is about a job"},
		{"elect", "ELECTION=e NO_NEW_PRIVS=off", "NO_NEW_PRIVS: it is about a job"},
		{"elect", "ELECTION=e CONTACT_LOSS=freeze", "CONTACT_LOSS: it is about a job"},
		{"elect", "ELECTION=e POST_STOP=true", "POST_STOP: it is about a job"},
		{"elect", "ELECTION=e STOP_SIGNAL=TERM", "STOP_SIGNAL: it is about a job"},
		{"check", "TTL=x NO_SUCH_VARIABLE=1 TLS_CA_FILE=/missing", ""},
		{"check", "LISTEN=x", "LISTEN: "},
		{"status", "ELECTION=e RESTART=x LISTEN=x TTL=x", ""},
		{"status", "", "ELECTION: missing"},
		{
			"status", "ELECTION=e ENDPOINT=a:1",
			"ENDPOINT: unknown variable: did you mean LEASEHOLD_ENDPOINTS?",
		},
		{"status", "ELECTION=e TLS_CA_FILE=/missing ENDPOINTS=a:1", "TLS_CA_FILE: "},
	} {
		_, err := load(t, c.use, strings.Fields(c.settings)...)
		if c.want == "" && err != nil ||
			c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s with %s: %v, want %q", c.use, c.settings, err, c.want)
		}
	}
}

func TestConfig_SecretIsNeverPrinted(t *testing.T) {
	cfg, err := load(t, ForRun, "ELECTION=e", "USERNAME=u", "PASSWORD=hunter2")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb, cfg)
		fmt.Fprintf(&out, verb, &cfg)
		fmt.Fprintf(&out, verb, cfg.Password)
	}
	for _, handler := range []slog.Handler{
		slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil),
	} {
		slog.New(handler).Info("x", "config", cfg, "pointer", &cfg, "password", cfg.Password)
	}
	if err := json.NewEncoder(&out).Encode(cfg.Password); err != nil {
		t.Error(err)
	}
	for _, shown := range []string{"hunter2", fmt.Sprintf("%x", "hunter2")} {
		if strings.Contains(out.String(), shown) {
			t.Errorf("the password is shown in %s", out.String())
		}
	}
	if p, err := cfg.ReadPassword(); p != "hunter2" || err != nil {
		t.Errorf("ReadPassword() = %q, %v", p, err)
	}
}

// TestConfig_ProblemsArePrintable: what a value does to a terminal, its report does not, and it has
// one line whatever the value.
func TestConfig_ProblemsArePrintable(t *testing.T) {
	_, err := load(t, ForRun, "ELECTION=e", "TLS_CA_FILE=/\x1b[2J\nx",
		"PASSWORD_FILE=/"+strings.Repeat("x", 4000), "TTL="+strings.Repeat("0", 4000),
		"\u009b"+strings.Repeat("N", 4000)+"=1")
	if err == nil {
		t.Fatal("no problems")
	}
	lines := strings.Split(err.Error(), "\n")
	for _, line := range lines {
		if len(line) > 2200 || line != quote.Printable(line) {
			t.Errorf("%d bytes: %.99q", len(line), line)
		}
	}
	if len(lines) != 6 {
		t.Errorf("%d lines: %q", len(lines), lines)
	}
}

// TestLog_IsPrintable: the names of candidates, and what etcd's endpoints answer, reach the log.
func TestLog_IsPrintable(t *testing.T) {
	for format, want := range map[string]string{
		"text": `leader="a\u009b2J\u202e" err=` + "\ufffd\n",
		"json": `"leader":"a\u009b2J\u202e","err":"\u007f"}` + "\n",
	} {
		var out bytes.Buffer
		slog.New(Log{Format: format}.Handler(&out, slog.LevelInfo)).
			Info("x", "leader", "a\u009b2J\u202e", "err", "\x7f")
		if !strings.HasSuffix(out.String(), want) {
			t.Errorf("%s: %q, want %s", format, out.String(), want)
		}
	}
}

func TestLog_DurationsAreReadable(t *testing.T) {
	for format, want := range map[string]string{"text": "ttl=1m30s", "json": `"ttl":"1m30s"`} {
		var out bytes.Buffer
		slog.New(Log{Format: format}.Handler(&out, slog.LevelInfo)).Info("x", "ttl", 90*time.Second)
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s: %s, want %s", format, out.String(), want)
		}
	}
}

// testPair writes a self-signed certificate and its key, and returns their paths.
func testPair(t *testing.T, dir, name string) [2]string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyBytes, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	paths := [2]string{filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")}
	writeFile(t, paths[0], string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})))
	block := &pem.Block{Type: "PRIVATE KEY", Bytes: keyBytes}
	writeFile(t, paths[1], string(pem.EncodeToMemory(block)))
	return paths
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A command line means to us what it means to sh, or is refused.
func TestSplitCommand_AsSh(t *testing.T) {
	for _, text := range []string{
		`true`, `  a  b `, `a 'b c' "d e"`, `a"b"'c'd`, `'' ""`, `"a\"b\\c\$d\e\n"`, `a\ b\'c\"`,
		`'a\'b`,
		"a\tb\nc", `sh -c 'echo "$HOME" | grep x; exit 1'`, `grep -q "a\.b" x=y a#b a~b {a,b} !x`,
		`ä '€'`, `"'" '"'`,
	} {
		words, err := splitCommand(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		script := strings.ReplaceAll(text, "\n", " ")
		want, err := exec.Command("sh", "-c", `printf '%s\0' `+script).Output()
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if got := strings.Join(words, "\x00") + "\x00"; got != string(want) {
			t.Errorf("%s: %q, but sh has %q", text, got, want)
		}
	}
	for _, text := range []string{
		"a $HOME", `"$HOME"`, "`a`", "\"`a`\"", "a | b", "a > b", "a; b", "a & b", "(a)",
		"*", "a?b", "[ab]",
		"~/x", "# x", "a # x", "'", `"`, `"a\"`, `a\`,
	} {
		if words, err := splitCommand(text); err == nil {
			t.Errorf("%s: accepted as %q", text, words)
		}
	}
}
