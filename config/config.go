//go:build linux

// Package config reads the daemon's configuration from the environment. It says which variables
// there are and which values they may have, and reports all problems at once. Help, the man page
// and docs/reference.md come from the tags of Config.
package config

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kelseyhightower/envconfig"

	"leasehold/control"
	"leasehold/internal/quote"
)

const (
	// Prefix and an underscore begin the name of each variable.
	Prefix = "LEASEHOLD"

	// maxNameBytes bounds the election and the identity. etcd takes more, but every candidate keeps
	// both in memory, and people read them in log lines.
	maxNameBytes = 1024

	// maxDuration keeps each sum of settings and clock readings far from the end of int64.
	maxDuration = 365 * 24 * time.Hour

	// maxTTL is the longest TTL for which etcd makes no checkpoints (feature LeaseCheckpoint, off
	// by default). A checkpoint of a longer lease may record, after a renewal, how much time was
	// left before that renewal. etcd then keeps the lease only for that time, from the next
	// election of its own leader on, or even from that renewal on. So it keeps the lease for less
	// than it has acknowledged, and two jobs could run at once.
	maxTTL = 5 * time.Minute
)

// Config is the daemon's whole configuration. Only variables that start with LEASEHOLD_ count. A
// variable that is set to nothing counts as unset.
//
// The fields have no `envconfig` tag on purpose. With such a tag the library also reads the
// variables without the prefix: USERNAME, TTL, …. The `desc` tag is the text in help and
// docs/reference.md; `shown` is the default there, where the true one is computed.
type Config struct {
	Endpoints       []string   `split_words:"true" default:"http://127.0.0.1:2379" desc:"etcd endpoints, separated by commas; a bare host:port is http, or https if a LEASEHOLD_TLS_* variable is set; each address of a host name counts as an endpoint"`
	Election        string     `split_words:"true" shown:"required" desc:"election key prefix, used as given: etcdctl elect --listen NAME sees the same election"`
	Identity        string     `split_words:"true" shown:"host name" desc:"this candidate's name: the value of its key, which other programs read"`
	TTL             Duration   `split_words:"true" default:"15s" desc:"lease TTL: whole seconds, from 2s to 5m"`
	StopSignal      Signal     `split_words:"true" default:"TERM" desc:"the signal that asks the job to stop"`
	StopGrace       Duration   `split_words:"true" default:"10s" desc:"planned stop: from the stop signal to SIGKILL; elect: from /leader's 503 until the lease is revoked"`
	LossGrace       Duration   `split_words:"true" shown:"a fifth of the granted TTL" desc:"loss of contact with etcd: from the stop signal to SIGKILL, while the lease still holds; 0s: SIGKILL at once. With LEASEHOLD_CONTACT_LOSS=freeze, the time to freeze the job. elect: from /leader's 503 until another can lead"`
	ContactLoss     string     `split_words:"true" default:"stop" desc:"loss of contact with etcd: stop the job; or freeze it, if it has a cgroup of its own, until etcd has renewed the lease. It is killed if it can't be frozen within LEASEHOLD_LOSS_GRACE, or if the lease or the key is lost"`
	Margin          Duration   `split_words:"true" shown:"a tenth of the granted TTL, at least 200ms" desc:"from SIGKILL to the lease's end: raise it for jobs of many gigabytes, CPU starvation, imprecise clocks"`
	Restart         string     `split_words:"true" default:"on-failure" desc:"whether the job is started again after it has ended by itself: always, on-failure or never. If it is not, the daemon exits with the job's code"`
	RestartLimit    Count      `split_words:"true" default:"5" desc:"quick failures in a row (within 10s of the start) before the candidate resigns and goes to the back of the queue; 0: never"`
	NoNewPrivs      string     `split_words:"true" default:"auto" desc:"auto: if the daemon lacks CAP_KILL, the job runs with no_new_privs. sudo and other set-user-id programs gain no privileges then, because the daemon could not kill them. off: they gain privileges, and one that can't be killed may run beside the next job"`
	Priority        Count      `split_words:"true" default:"50" desc:"from 0 to 100: of the candidates that are ready, the one with the highest priority leads next, and the one that has waited longest of several. 0 never leads, and does not wait in the queue"`
	Failback        Failback   `split_words:"true" default:"never" desc:"never; or how long a candidate with a higher priority must have been ready until the leader hands over to it"`
	Wait            Duration   `split_words:"true" shown:"for ever" desc:"give up if not elected within this time of the start; 0s: try once"`
	PreStart        Command    `split_words:"true" desc:"a hook: a command that runs before each start of the job, under the lease and with the job's environment. If it fails, the job is not started, and that counts as a failure of the job. It is split into words as by a shell, and no shell runs it"`
	PostStop        Command    `split_words:"true" desc:"a hook: a command that runs each time when nothing of the job is left, before another candidate may lead; and once at the start of the daemon. It undoes on this machine what LEASEHOLD_PRE_START and the job have done, if it is done. docs/hooks.md has an example"`
	PostStopTimeout Duration   `split_words:"true" shown:"a tenth of the granted TTL" desc:"time limit for LEASEHOLD_POST_STOP, which is killed then. The deadlines of the job are that much earlier"`
	Listen          string     `split_words:"true" default:"127.0.0.1:4040" desc:"host:port of the health endpoint; off: none"`
	Health          Health     `split_words:"true"`
	Fitness         Fitness    `split_words:"true"`
	Notify          string     `split_words:"true" default:"off" desc:"ready: the job is ready when it has sent READY=1 to NOTIFY_SOCKET, as a service does to systemd (sd_notify). It has LEASEHOLD_HEALTH_START_PERIOD and LEASEHOLD_HEALTH_RETRIES intervals for that"`
	Watchdog        Duration   `split_words:"true" default:"0s" desc:"a ready job that does not send WATCHDOG=1 to NOTIFY_SOCKET in this time is unhealthy; 0s: it need not"`
	StateDir        string     `split_words:"true" desc:"a directory on a local disk for a small file. If all processes of the daemon are killed at once, the next daemon on the machine proves by it that the job has exited, and revokes the lease before it expires; with elect, the next process goes on with the term; docs/recovery.md says where that works"`
	Kubernetes      Kubernetes `split_words:"true"`
	Log             Log        `split_words:"true"`
	TLS             TLS        `split_words:"true"`
	Username        string     `split_words:"true" desc:"etcd user; needs LEASEHOLD_PASSWORD or LEASEHOLD_PASSWORD_FILE"`
	Password        Secret     `split_words:"true" desc:"its password"`
	PasswordFile    string     `split_words:"true" desc:"file with its password (a newline at the end is dropped); read again each time etcd asks for it"`
	DialTimeout     Duration   `split_words:"true" default:"1s" desc:"time limit for connecting to one endpoint"`
}

// Health says how the job's health is checked. The words are Docker's.
type Health struct {
	Cmd         Command  `split_words:"true" desc:"a command that checks the job's health: exit code 0 is healthy. It is split into words as by a shell, and no shell runs it"`
	URL         string   `split_words:"true" desc:"in place of LEASEHOLD_HEALTH_CMD: a URL that is asked by GET, http or https. A status from 200 to 399 is healthy. No redirect is followed, and no certificate is checked"`
	Interval    Duration `split_words:"true" default:"10s" desc:"from the end of a check to the next one; while the job is not ready, a second at most"`
	Timeout     Duration `split_words:"true" default:"3s" desc:"a check that takes longer fails, and is killed with all that it has started"`
	Retries     Count    `split_words:"true" default:"3" desc:"failed checks in a row after which the job is unhealthy: it is stopped, and counts as ended by itself with an error"`
	StartPeriod Duration `split_words:"true" default:"0s" desc:"time that the job needs to start. It is unhealthy if it is not ready within this time and LEASEHOLD_HEALTH_RETRIES intervals"`
}

// Fitness says how it is checked whether this machine may lead.
type Fitness struct {
	Cmd      Command  `split_words:"true" desc:"a command that checks whether this candidate may lead: exit code 0 is fit. An unfit standby leaves the queue until it is fit. A leader that becomes unfit hands over to one that is fit, and stays the leader if there is none. LEASEHOLD_HEALTH_TIMEOUT and LEASEHOLD_HEALTH_RETRIES hold for it, too"`
	Interval Duration `split_words:"true" default:"10s" desc:"from the end of a check of the fitness to the next one"`
}

// Kubernetes says which Service routes to the leader.
type Kubernetes struct {
	Service string `split_words:"true" desc:"the name of a Service without a selector, in the pod's namespace: while this candidate leads, and /leader answers 200, its pod is the one endpoint of that Service. docs/kubernetes-wrapper.md says which rights that needs"`
	PodIP   string `split_words:"true" desc:"the pod's address, for LEASEHOLD_KUBERNETES_SERVICE: by the downward API, fieldPath: status.podIP"`
}

// Log says what is logged, and how. Logs go to standard error.
type Log struct {
	Level  Level  `split_words:"true" default:"info" desc:"debug, info, warn or error"`
	Format string `split_words:"true" default:"text" desc:"text or json, on standard error"`
}

// TLS is how etcd is reached over TLS. The files are read again when they change.
type TLS struct {
	CAFile     string `split_words:"true" shown:"the system's" desc:"CA certificates (PEM) that etcd's certificate is checked against"`
	CertFile   string `split_words:"true" desc:"client certificate (PEM); needs LEASEHOLD_TLS_KEY_FILE. Certificates and keys are read again when they change"`
	KeyFile    string `split_words:"true" desc:"its private key (PEM)"`
	ServerName string `split_words:"true" shown:"the endpoint's host" desc:"the host name that etcd's certificate must have"`
}

// A Use is what the configuration is read for. It decides which problems count: ForCheck looks at
// LISTEN alone, ForStatus only at what it needs to ask etcd about an election, and ForList about
// all. So they work wherever somebody calls them.
type Use string

// The uses of a configuration.
const (
	ForRun    Use = "run"
	ForElect  Use = "elect"
	ForStatus Use = "status"
	ForList   Use = "list"
	ForCheck  Use = "check"
)

// An Error is a configuration with problems. It holds no secret.
type Error struct{ Problems []error }

// Error has a line for each problem. It can be shown in a terminal: paths and names may hold
// anything.
func (e *Error) Error() string {
	var lines []string
	for _, problem := range e.Problems {
		lines = append(lines, quote.Line(problem.Error()))
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns the problems.
func (e *Error) Unwrap() []error { return e.Problems }

// Load reads the configuration from the environment of the process and checks it. The error is an
// *Error with every problem that matters to the use. Each begins with the name of its variable.
func Load(use Use) (Config, error) {
	var cfg Config
	if err := envconfig.Process(Prefix, &cfg); err != nil {
		return Config{}, err // Not the user's mistake: every field below can take any text.
	}
	set := map[string]bool{}
	for _, entry := range os.Environ() {
		name, value, _ := strings.Cut(entry, "=")
		if setting, ours := strings.CutPrefix(name, Prefix+"_"); ours && value != "" {
			set[setting] = true
		}
	}
	for _, v := range cfg.Variables() {
		if !set[v.Name] {
			v.reset()
		}
	}

	p := problems{use: use}
	cfg.validate(&p, set)
	p.unknown(set, cfg.Variables())
	if len(p.found) > 0 {
		return cfg, &Error{Problems: p.found}
	}
	return cfg, nil
}

// validate checks every setting, and completes the ones that depend on others.
func (c *Config) validate(p *problems, set map[string]bool) {
	for _, v := range c.Variables() {
		if kept, ok := v.Field.Addr().Interface().(interface{ problem() error }); ok {
			p.add(v.Name, "%w", kept.problem())
		}
	}

	c.validateEndpoints(p)
	if c.Election == "" {
		p.add("ELECTION", "missing: write the name of the election, the same on every machine,"+
			" for example jobs/backup")
	}
	p.add("ELECTION", "%w", electionProblem(c.Election))
	if c.Identity == "" {
		name, err := os.Hostname()
		if err != nil || name == "" {
			p.add("IDENTITY", "not set, and this machine has no host name (%v): set it", err)
		}
		c.Identity = name
	}
	p.add("IDENTITY", "%w", nameProblem(c.Identity))
	c.validateTiming(p)
	policies := []string{"always", "on-failure", "never"}
	if c.Restart = strings.ToLower(c.Restart); !slices.Contains(policies, c.Restart) {
		p.add("RESTART", "%s is unknown: write always, on-failure or never", quote.Value(c.Restart))
	}
	c.NoNewPrivs = strings.ToLower(c.NoNewPrivs)
	if c.NoNewPrivs != "auto" && c.NoNewPrivs != "off" {
		p.add("NO_NEW_PRIVS", "%s is unknown: write auto or off", quote.Value(c.NoNewPrivs))
	}
	c.validateContactLoss(p)
	if c.Freezes() && c.PostStop.Argv != nil {
		p.add("POST_STOP", "it can't run for a job that is frozen, whose lease may pass to "+
			"another candidate: unset it, or write %s_CONTACT_LOSS=stop", Prefix)
	}
	if c.PostStopTimeout.given {
		if c.PostStop.Argv == nil && !p.has("POST_STOP") && p.use != ForElect {
			p.add("POST_STOP_TIMEOUT", "there is no hook: set %s_POST_STOP too, or unset it",
				Prefix)
		}
		p.tooShort("POST_STOP_TIMEOUT", c.PostStopTimeout, 100*time.Millisecond)
	}
	c.Health.validate(p)
	p.tooShort("FITNESS_INTERVAL", c.Fitness.Interval, 100*time.Millisecond)
	c.Notify = strings.ToLower(c.Notify)
	if c.Notify != "off" && c.Notify != "ready" {
		p.add("NOTIFY", "%s is unknown: write off or ready", quote.Value(c.Notify))
	}
	if c.Watchdog.Duration != 0 {
		p.tooShort("WATCHDOG", c.Watchdog, 100*time.Millisecond)
	}
	if c.StateDir != "" && !filepath.IsAbs(c.StateDir) {
		p.add("STATE_DIR", "%s is not absolute: write a path that begins with a slash",
			quote.Value(c.StateDir))
	}
	if n := c.Priority.N; !p.has("PRIORITY") && (n < 0 || n > 100) {
		p.add("PRIORITY", "%d is not a priority: write a number from 0 to 100", n)
	}
	p.add("LISTEN", "%w", listenProblem(c.Listen))
	c.Kubernetes.validate(p)
	c.Log.Format = strings.ToLower(c.Log.Format)
	if c.Log.Format != "text" && c.Log.Format != "json" {
		p.add("LOG_FORMAT", "%s is unknown: write text or json", quote.Value(c.Log.Format))
	}
	c.TLS.validate(p)
	c.validateAuth(p)

	if p.use == ForElect {
		for _, name := range []string{
			"CONTACT_LOSS", "NO_NEW_PRIVS", "STOP_SIGNAL", "RESTART", "RESTART_LIMIT",
			"HEALTH_CMD", "HEALTH_URL", "HEALTH_INTERVAL", "HEALTH_START_PERIOD",
			"NOTIFY", "WATCHDOG", "PRE_START", "POST_STOP", "POST_STOP_TIMEOUT",
		} {
			if set[name] {
				p.add(name, "it is about a job, and elect runs none:"+
					" unset it, or write leasehold -- COMMAND")
			}
		}
	}
}

// What LEASEHOLD_CONTACT_LOSS may be.
const (
	stopOnLoss   = "stop"
	freezeOnLoss = "freeze"
)

// Freezes reports whether the job is frozen on loss of contact with etcd.
func (c *Config) Freezes() bool { return c.ContactLoss == freezeOnLoss }

// validateContactLoss checks what becomes of the job on loss of contact.
func (c *Config) validateContactLoss(p *problems) {
	switch c.ContactLoss = strings.ToLower(c.ContactLoss); {
	case c.ContactLoss != stopOnLoss && c.ContactLoss != freezeOnLoss:
		p.add("CONTACT_LOSS", "%s is unknown: write stop or freeze", quote.Value(c.ContactLoss))
	case c.Freezes() && c.LossGrace.given && c.LossGrace.err == nil && c.LossGrace.Duration == 0:
		p.add("LOSS_GRACE", "0s leaves no time to freeze the job:"+
			" write for example 1s, unset it, or write %s_CONTACT_LOSS=stop", Prefix)
	}
}

// validate checks that a check can pass, and that checks do not follow each other without end.
func (h *Health) validate(p *problems) {
	if h.URL != "" {
		p.add("HEALTH_URL", "%w", urlProblem(h.URL))
		if h.Cmd.Argv != nil {
			p.add("HEALTH_URL", "LEASEHOLD_HEALTH_CMD is set too: unset one of them")
		}
	}
	if h.Retries.err == nil && h.Retries.N == 0 {
		p.add("HEALTH_RETRIES", "0 is too few: write 1 or more")
	}
	if h.Retries.err == nil && h.Retries.N > 100 {
		p.add("HEALTH_RETRIES", "%d is too many: write 100 or less", h.Retries.N)
	}
	p.tooShort("HEALTH_INTERVAL", h.Interval, 100*time.Millisecond)
	p.tooShort("HEALTH_TIMEOUT", h.Timeout, 10*time.Millisecond)
}

// urlProblem returns what is wrong with the URL of a check, or nil. It does not show the URL if a
// password may be in it.
func urlProblem(text string) error {
	u, err := url.Parse(text)
	switch {
	case err != nil && strings.Contains(text, "@"), err == nil && u.User != nil:
		return errors.New("it has a user name in it, which the log could show: write it without")
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		return fmt.Errorf("%s is no URL: write for example http://127.0.0.1:8080/healthz",
			quote.Value(text))
	}
	return nil
}

// tooShort notes a duration that is shorter than the shortest one.
func (p *problems) tooShort(name string, d Duration, shortest time.Duration) {
	if d.err == nil && d.Duration < shortest {
		p.add(name, "%s is too short: write %s or more", d, shortest)
	}
}

// validateTiming checks the durations one by one, and that they fit into the lease's life together.
func (c *Config) validateTiming(p *problems) {
	ttl := c.TTL.Duration
	switch {
	case c.TTL.err != nil:
	case ttl < 2*time.Second:
		p.add("TTL", "%s is too short: write 2s or more", ttl)
	case ttl > maxTTL:
		p.add("TTL", "%s is too long: write 5m (300s) or less;"+
			" etcd can shorten a longer lease after it was renewed", ttl)
	case ttl%time.Second != 0:
		p.add("TTL", "%s is not in whole seconds, and etcd knows no others: write %s",
			ttl, ttl.Truncate(time.Second))
	}
	if c.Margin.given && c.Margin.err == nil && c.Margin.Duration == 0 {
		p.add("MARGIN", "0s is too short: write for example 200ms, or unset it")
	}
	if c.DialTimeout.err == nil && c.DialTimeout.Duration == 0 {
		p.add("DIAL_TIMEOUT", "0s is too short: write for example 1s")
	}
	if p.has("TTL") || p.has("LOSS_GRACE") || p.has("MARGIN") || p.has("POST_STOP_TIMEOUT") {
		return
	}
	if err := c.Timing().Validate(); err != nil {
		lower := "LOSS_GRACE or %[2]s_MARGIN"
		if c.PostStop.Argv != nil {
			lower = "POST_STOP_TIMEOUT, %[2]s_LOSS_GRACE or %[2]s_MARGIN"
		}
		p.add("TTL", "%w: raise it, or lower %[2]s_"+lower, err, Prefix)
	}
}

func listenProblem(listen string) error {
	if listen == "off" {
		return nil
	}
	if _, _, err := parseAddress(listen, 0); err != nil {
		return fmt.Errorf("%w: write host:port, for example 127.0.0.1:4040 or :4040, or off", err)
	}
	return nil
}

// nameProblem returns what is wrong with an election or an identity, or nil. Both go into etcd as
// given, and nothing is trimmed. A newline at the end, as a file may have it, would make another
// election that looks the same.
func nameProblem(name string) error {
	switch {
	case len(name) > maxNameBytes:
		return fmt.Errorf("%d bytes long: write %d at most", len(name), maxNameBytes)
	case !utf8.ValidString(name):
		return errors.New("not UTF-8: write plain text")
	case strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("%s has a control character (a newline from a file?): write it without",
			quote.Value(name))
	}
	return nil
}

// electionProblem returns what is wrong with an election, or nil. A candidate's key is the name, a
// slash and the lease, and slashes separate an election from those within it. A name that ends with
// a slash, or has two in a row, makes an election that looks like another.
func electionProblem(name string) error {
	if err := nameProblem(name); err != nil {
		return err
	}
	switch {
	case strings.ContainsFunc(name, unicode.IsSpace):
		return fmt.Errorf("%s has white space: write it without", quote.Value(name))
	case strings.HasSuffix(name, "/"):
		return fmt.Errorf("%s ends with a slash: write it without", quote.Value(name))
	case strings.Contains(name, "//"):
		return fmt.Errorf("%s has two slashes in a row: write one", quote.Value(name))
	case control.Reserved(name):
		return fmt.Errorf("%s has keys of leasehold's own under its prefix: write another name",
			quote.Value(name))
	}
	return nil
}
