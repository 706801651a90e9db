//go:build linux

package app

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kelseyhightower/envconfig"
	"golang.org/x/sys/unix"

	"leasehold/election"
	"leasehold/internal/quote"
)

const (
	envPrefix = "LEASEHOLD"

	// maxNameBytes bounds the election and the identity: etcd takes more, but every candidate keeps both in memory, and people
	// read them in log lines.
	maxNameBytes = 1024

	// maxDuration keeps each sum of settings and clock readings far from the end of int64.
	maxDuration = 365 * 24 * time.Hour

	// maxTTL is the longest TTL of which etcd makes no checkpoints (feature LeaseCheckpoint, off by default). Of a longer one it may
	// record, after a renewal, how much was left before that, and from the next election of its own leader on, or even from that
	// renewal on, keep the lease only for so long. It has then acknowledged more than it keeps, and two jobs could run at once.
	maxTTL = 5 * time.Minute
)

// Config is the daemon's whole configuration. It is read from the environment, from variables that start with LEASEHOLD_; no
// other variable counts. A variable that is set to nothing counts as unset.
//
// The fields have no `envconfig` tag on purpose: with one the library falls back to the bare USERNAME, TTL, … of the
// environment. The `desc` tag is what `leasehold help` and docs/reference.md say; `shown` is the default they show where the
// true one is worked out.
//
//nolint:lll // One variable a line.
type Config struct {
	Endpoints    []string `split_words:"true" default:"http://127.0.0.1:2379" desc:"etcd endpoints, with commas between them; a bare host:port is http, or https where LEASEHOLD_TLS_* is set; each address of a host name counts as an endpoint"`
	Election     string   `split_words:"true" shown:"required" desc:"election key prefix, used as given: etcdctl elect --listen NAME sees the same election"`
	Identity     string   `split_words:"true" shown:"host name" desc:"this candidate's name: the value of its key, which other programs read"`
	TTL          duration `split_words:"true" default:"15s" desc:"lease TTL: whole seconds, from 2s to 5m"`
	StopSignal   signal   `split_words:"true" default:"TERM" desc:"the signal that asks the job to stop"`
	StopGrace    duration `split_words:"true" default:"10s" desc:"planned stop: from the stop signal to SIGKILL; elect: from /leader's 503 until the lease is given back"`
	LossGrace    duration `split_words:"true" shown:"a fifth of the granted TTL" desc:"loss of contact with etcd: from the stop signal to SIGKILL, inside the lease's life; 0s: SIGKILL at once. elect: from /leader's 503 until another can lead"`
	Margin       duration `split_words:"true" shown:"a tenth of the granted TTL, at least 200ms" desc:"from SIGKILL to the lease's end: raise it for jobs of many gigabytes, starved machines, poor clocks"`
	Restart      string   `split_words:"true" default:"on-failure" desc:"what follows when the job ends by itself: always, on-failure or never. Where it is not restarted, the daemon exits with the job's code"`
	RestartLimit count    `split_words:"true" default:"5" desc:"quick failures in a row (within 10s of the start) before the candidate resigns and goes to the back of the queue; 0: never"`
	NoNewPrivs   string   `split_words:"true" default:"auto" desc:"auto: where the daemon lacks CAP_KILL the job runs with no_new_privs, so that sudo and other set-user-id programs gain nothing: they could not be killed; off: they may gain, and one that can't be killed may run beside the next job"`
	Wait         duration `split_words:"true" shown:"for ever" desc:"give up when not elected in this time from the start; 0s: try once"`
	Listen       string   `split_words:"true" default:"127.0.0.1:4040" desc:"host:port of the health endpoint; off: none"`
	Log          Log      `split_words:"true"`
	TLS          TLS      `split_words:"true"`
	Username     string   `split_words:"true" desc:"etcd user; needs LEASEHOLD_PASSWORD or LEASEHOLD_PASSWORD_FILE"`
	Password     secret   `split_words:"true" desc:"its password"`
	PasswordFile string   `split_words:"true" desc:"file with its password (a newline at the end is dropped); read again each time etcd asks for it"`
	DialTimeout  duration `split_words:"true" default:"1s" desc:"to connect to one endpoint"`
}

// Log says what is logged, and how. Logs go to standard error.
type Log struct {
	Level  level  `split_words:"true" default:"info" desc:"debug, info, warn or error"`
	Format string `split_words:"true" default:"text" desc:"text or json, on standard error"`
}

// TLS is how etcd is reached over TLS. The files are read again when they change.
type TLS struct {
	CAFile     string `split_words:"true" shown:"the system's" desc:"certificates (PEM) that etcd's own is checked against"`
	CertFile   string `split_words:"true" desc:"client certificate (PEM); needs LEASEHOLD_TLS_KEY_FILE. Certificates and keys are read again when they change"`
	KeyFile    string `split_words:"true" desc:"its private key (PEM)"`
	ServerName string `split_words:"true" shown:"the endpoint's host" desc:"the name that etcd's certificate must bear"`
}

// loadConfig reads the configuration for a subcommand (run, elect, status, check) and checks it. The error joins every fault
// that matters to that subcommand, one a line, each led by its variable's name; it never holds a secret. `check` looks at
// LISTEN alone, and `status` only at what reaching etcd takes, so that both work wherever they are called from.
//
// environ tells which variables are set; envconfig reads their values from the process's own environment.
func loadConfig(subcommand string, environ []string) (Config, error) {
	var cfg Config
	if err := envconfig.Process(envPrefix, &cfg); err != nil {
		return Config{}, err // Not a user's fault: every field below can take any text.
	}
	set := map[string]bool{}
	for _, entry := range environ {
		name, value, _ := strings.Cut(entry, "=")
		if setting, ours := strings.CutPrefix(name, envPrefix+"_"); ours && value != "" {
			set[setting] = true
		}
	}
	for _, v := range cfg.variables() {
		if !set[v.name] {
			v.reset()
		}
	}

	f := faults{subcommand: subcommand}
	cfg.validate(&f, set)
	f.unknown(set, cfg.variables())
	return cfg, errors.Join(f.found...)
}

// validate checks every setting, and completes the ones that depend on others.
func (c *Config) validate(f *faults, set map[string]bool) {
	for _, v := range c.variables() {
		if kept, ok := v.field.Addr().Interface().(interface{ fault() error }); ok && kept.fault() != nil {
			f.add(v.name, "%w", kept.fault())
		}
	}

	c.validateEndpoints(f)
	if c.Election == "" {
		f.add("ELECTION", "missing: write the name of the election, the same on every machine, for example jobs/backup")
	}
	f.add("ELECTION", "%w", nameFault(c.Election))
	if c.Identity == "" {
		name, err := os.Hostname()
		if err != nil || name == "" {
			f.add("IDENTITY", "not set, and this machine has no host name (%v): set it", err)
		}
		c.Identity = name
	}
	f.add("IDENTITY", "%w", nameFault(c.Identity))
	c.validateTiming(f)
	if c.Restart = strings.ToLower(c.Restart); !slices.Contains([]string{"always", "on-failure", "never"}, c.Restart) {
		f.add("RESTART", "%s is unknown: write always, on-failure or never", quote.Value(c.Restart))
	}
	if c.NoNewPrivs = strings.ToLower(c.NoNewPrivs); c.NoNewPrivs != "auto" && c.NoNewPrivs != "off" {
		f.add("NO_NEW_PRIVS", "%s is unknown: write auto or off", quote.Value(c.NoNewPrivs))
	}
	f.add("LISTEN", "%w", listenFault(c.Listen))
	if c.Log.Format = strings.ToLower(c.Log.Format); c.Log.Format != "text" && c.Log.Format != "json" {
		f.add("LOG_FORMAT", "%s is unknown: write text or json", quote.Value(c.Log.Format))
	}
	c.TLS.validate(f)
	c.validateAuth(f)

	if f.subcommand == "elect" {
		for _, name := range []string{"NO_NEW_PRIVS", "STOP_SIGNAL", "RESTART", "RESTART_LIMIT"} {
			if set[name] {
				f.add(name, "it is about a job, and elect runs none: unset it, or write leasehold -- COMMAND")
			}
		}
	}
}

// validateTiming checks the durations one by one, and that they fit into the lease's life together.
func (c *Config) validateTiming(f *faults) {
	ttl := c.TTL.Duration
	switch {
	case c.TTL.err != nil:
	case ttl < 2*time.Second:
		f.add("TTL", "%s is too short: write 2s or more", ttl)
	case ttl > maxTTL:
		f.add("TTL", "%s is too long: write 5m (300s) or less; etcd can shorten a longer lease after it was renewed", ttl)
	case ttl%time.Second != 0:
		f.add("TTL", "%s is not in whole seconds, and etcd knows no others: write %s", ttl, ttl.Truncate(time.Second))
	}
	if c.Margin.given && c.Margin.err == nil && c.Margin.Duration == 0 {
		f.add("MARGIN", "0s is too short: write for example 200ms, or unset it")
	}
	if c.DialTimeout.err == nil && c.DialTimeout.Duration == 0 {
		f.add("DIAL_TIMEOUT", "0s is too short: write for example 1s")
	}
	if f.has("TTL") || f.has("LOSS_GRACE") || f.has("MARGIN") {
		return
	}
	if err := election.NewTiming(ttl, c.LossGrace.Or(-1), c.Margin.Or(-1)).Validate(); err != nil {
		f.add("TTL", "%w: raise it, or lower %[2]s_LOSS_GRACE or %[2]s_MARGIN", err, envPrefix)
	}
}

// validateEndpoints checks the endpoints and makes full URLs of them.
func (c *Config) validateEndpoints(f *faults) {
	withTLS := c.TLS != TLS{}
	var urls, schemes []string
	sound := true
	for i, entry := range c.Endpoints {
		scheme, address, err := parseEndpoint(entry, withTLS)
		if err != nil {
			// The entry may hold a password, so that its place is told and not its text, unless the error found it harmless.
			f.add("ENDPOINTS", "entry %d %w", i+1, err)
			sound = false
			continue
		}
		if slices.Contains(urls, scheme+"://"+address) {
			f.add("ENDPOINTS", "entry %d names %s again: name each endpoint once", i+1, address)
		}
		urls = append(urls, scheme+"://"+address)
		schemes = append(schemes, scheme)
	}
	slices.Sort(schemes)
	switch schemes = slices.Compact(schemes); {
	case len(c.Endpoints) == 0:
		f.add("ENDPOINTS", "blank: write for example http://127.0.0.1:2379")
	case len(schemes) == 2:
		f.add("ENDPOINTS", "http and https are mixed: write one of them for all")
	case sound && withTLS && schemes[0] == "http":
		f.add("ENDPOINTS", "http goes without TLS, but LEASEHOLD_TLS_* is set: write https, or unset LEASEHOLD_TLS_*")
	}
	c.Endpoints = urls
}

// parseEndpoint takes an endpoint apart. The error never holds a password.
func parseEndpoint(entry string, withTLS bool) (scheme, address string, err error) {
	const example = "write host:port, http://host:port or https://host:port"
	switch {
	case entry == "":
		return "", "", errors.New("is empty: write endpoints with one comma between two")
	case strings.ContainsFunc(entry, unicode.IsSpace):
		return "", "", errors.New("has a space: write endpoints with commas alone between them")
	case strings.Contains(entry, "@"):
		return "", "", errors.New("has a user name in it: set LEASEHOLD_USERNAME and LEASEHOLD_PASSWORD instead")
	}
	scheme, address, full := strings.Cut(strings.TrimSuffix(entry, "/"), "://")
	if !full {
		address = scheme
		if scheme = "http"; withTLS {
			scheme = "https"
		}
	}
	if scheme = strings.ToLower(scheme); scheme != "http" && scheme != "https" {
		return "", "", fmt.Errorf("%s has an unknown scheme: %s", quote.Value(entry), example)
	}
	if strings.ContainsAny(address, "/?#") {
		return "", "", fmt.Errorf("%s has more than host and port: %s", quote.Value(entry), example)
	}
	host, port, err := parseAddress(address, 1)
	if err == nil && host == "" {
		err = fmt.Errorf("%s has no host", quote.Value(entry))
	}
	if err != nil {
		return "", "", fmt.Errorf("%w: %s", err, example)
	}
	return scheme, net.JoinHostPort(host, port), nil
}

// parseAddress takes a host:port apart. The host may be empty.
func parseAddress(address string, lowestPort uint64) (host, port string, err error) {
	host, port, err = net.SplitHostPort(address)
	if err != nil {
		if strings.Count(address, ":") > 1 && !strings.Contains(address, "/") {
			return "", "", fmt.Errorf("%s is not host:port (an IPv6 address needs brackets and a port, as in [::1]:4040)", quote.Value(address))
		}
		return "", "", fmt.Errorf("%s is not host:port", quote.Value(address))
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n < lowestPort {
		return "", "", fmt.Errorf("%s has no port number from %d to 65535", quote.Value(address), lowestPort)
	}
	notInNames := func(r rune) bool {
		letter := 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9'
		return !letter && r != '.' && r != '-' && r != '_'
	}
	if net.ParseIP(host) == nil && strings.ContainsFunc(host, notInNames) {
		return "", "", fmt.Errorf("%s is no address: the host must be a name or an IP address", quote.Value(address))
	}
	return host, port, nil
}

func listenFault(listen string) error {
	if listen == "off" {
		return nil
	}
	if _, _, err := parseAddress(listen, 0); err != nil {
		return fmt.Errorf("%w: write host:port, for example 127.0.0.1:4040 or :4040, or off", err)
	}
	return nil
}

// nameFault says what is wrong with an election or an identity, or nil. Both go into etcd as given, so that nothing is trimmed;
// a newline at the end, as files bring it, would make another election of it that looks the same.
func nameFault(name string) error {
	switch {
	case len(name) > maxNameBytes:
		return fmt.Errorf("%d bytes long: write %d at most", len(name), maxNameBytes)
	case !utf8.ValidString(name):
		return errors.New("not UTF-8: write plain text")
	case strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("%s has a control character (a newline from a file?): write it without", quote.Value(name))
	}
	return nil
}

func (t TLS) validate(f *faults) {
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
			err = fmt.Errorf("%s holds no certificate: it must be PEM", t.CAFile)
		}
		f.add("TLS_CA_FILE", "%w", err)
	}
	switch {
	case t.CertFile != "" && t.KeyFile == "":
		f.add("TLS_KEY_FILE", "missing beside LEASEHOLD_TLS_CERT_FILE: set both or neither")
	case t.CertFile == "" && t.KeyFile != "":
		f.add("TLS_CERT_FILE", "missing beside LEASEHOLD_TLS_KEY_FILE: set both or neither")
	case t.CertFile != "":
		_, certErr := os.ReadFile(t.CertFile)
		f.add("TLS_CERT_FILE", "%w", certErr)
		_, keyErr := os.ReadFile(t.KeyFile)
		f.add("TLS_KEY_FILE", "%w", keyErr)
		if certErr == nil && keyErr == nil {
			_, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
			f.add("TLS_CERT_FILE", "%w", err)
		}
	}
}

func (c *Config) validateAuth(f *faults) {
	given := c.Password != "" || c.PasswordFile != ""
	switch {
	case c.Username != "" && !given:
		f.add("USERNAME", "set without a password: set LEASEHOLD_PASSWORD or LEASEHOLD_PASSWORD_FILE too")
	case c.Username == "" && given:
		f.add("USERNAME", "missing beside the password: set both or neither")
	}
	if c.Password != "" && c.PasswordFile != "" {
		f.add("PASSWORD_FILE", "set together with LEASEHOLD_PASSWORD: unset one of them")
	}
	if c.PasswordFile != "" {
		_, err := c.readPassword()
		f.add("PASSWORD_FILE", "%w", err)
	}
}

// readPassword returns the password of Username. It reads a password file anew, since files of secrets are changed in place.
func (c *Config) readPassword() (string, error) {
	if c.PasswordFile == "" {
		return string(c.Password), nil
	}
	text, err := os.ReadFile(c.PasswordFile)
	if err != nil {
		return "", err
	}
	password := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	if password == "" {
		return "", fmt.Errorf("%s holds no password", c.PasswordFile)
	}
	return password, nil
}

// faults gathers what is wrong with the configuration, as far as it matters to the subcommand.
type faults struct {
	subcommand string
	names      []string // of the variables at fault, without the prefix
	found      []error
}

// add notes a fault of a variable. As a convenience to callers it does nothing where the last argument is a nil error.
func (f *faults) add(name, format string, args ...any) {
	if format == "%w" && args[0] == nil {
		return
	}
	f.names = append(f.names, name)
	if f.matters(name) {
		f.found = append(f.found, fmt.Errorf("%s_%s: %w", envPrefix, name, fmt.Errorf(format, args...)))
	}
}

func (f *faults) has(name string) bool { return slices.Contains(f.names, name) }

// matters reports if the subcommand makes use of the variable.
func (f *faults) matters(name string) bool {
	switch f.subcommand {
	case "check":
		return name == "LISTEN"
	case "status":
		return slices.Contains([]string{"ENDPOINTS", "ELECTION", "USERNAME", "PASSWORD", "PASSWORD_FILE", "DIAL_TIMEOUT"}, name) ||
			strings.HasPrefix(name, "TLS_")
	default:
		return true
	}
}

// unknown notes the variables that no setting has, for a misspelt one would silently leave the default in force.
func (f *faults) unknown(set map[string]bool, known []variable) {
	if f.subcommand == "check" {
		return
	}
	// What Kubernetes puts into each container for a Service whose name starts with "leasehold", and the job's variables, which
	// a daemon started by a job finds.
	others := regexp.MustCompile(`^((.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_.+)?)|KEY|FENCING_TOKEN|LEASE_ID)$`)
	var names []string
	for _, v := range known {
		names = append(names, v.name)
		delete(set, v.name)
	}
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range set {
			if !others.MatchString(name) && !yield(name) {
				return
			}
		}
	}) {
		advice := "unset it (leasehold help names all variables)"
		if near := nearest(name, names); near != "" {
			advice = "did you mean " + envPrefix + "_" + near + "?"
		}
		f.found = append(f.found, fmt.Errorf("%s_%s: unknown variable: %s", envPrefix, name, advice))
	}
}

// nearest returns the candidate that a misspelt word most likely stands for, or "".
func nearest(word string, candidates []string) string {
	best, least := "", 2*max(2, len(word)/3)+2
	for _, candidate := range candidates {
		// Of two at the same distance, the one that holds the word; and that one even from afar, as for GRACE or CA_FILE.
		rank := 2*distance(word, candidate) + 1
		if len(word) >= 4 && (strings.Contains(candidate, word) || strings.Contains(word, candidate)) {
			rank = min(rank-1, 2*max(2, len(word)/3)+1)
		}
		if rank < least {
			best, least = candidate, rank
		}
	}
	return best
}

// distance is the number of letters to insert, delete, replace or swap with their neighbour to make a out of b.
func distance(a, b string) int {
	var before []int
	last := make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			row[j] = min(last[j], row[j-1]) + 1
			if a[i-1] == b[j-1] {
				row[j] = min(row[j], last[j-1])
			} else {
				row[j] = min(row[j], last[j-1]+1)
			}
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}

// A variable is one field of Config.
type variable struct {
	name  string // without the prefix
	def   string // the default, as it would be written; "" for none
	shown string // the default, as help shows it
	desc  string
	field reflect.Value
}

// variables lists the fields of c with the names that envconfig knows them by.
func (c *Config) variables() []variable {
	return appendVariables(nil, "", reflect.ValueOf(c).Elem())
}

func appendVariables(list []variable, prefix string, group reflect.Value) []variable {
	// The rule of envconfig's split_words: CAFile is CA_FILE, DialTimeout is DIAL_TIMEOUT.
	words := regexp.MustCompile(`([a-z])([A-Z])|([A-Z])([A-Z][a-z])`)
	for i := range group.NumField() {
		field, tags := group.Type().Field(i), group.Type().Field(i).Tag
		name := prefix + strings.ToUpper(words.ReplaceAllString(field.Name, "$1${3}_$2$4"))
		if tags.Get("desc") == "" {
			list = appendVariables(list, name+"_", group.Field(i))
			continue
		}
		list = append(list, variable{
			name:  name,
			def:   tags.Get("default"),
			shown: cmp.Or(tags.Get("default"), tags.Get("shown")),
			desc:  tags.Get("desc"),
			field: group.Field(i),
		})
	}
	return list
}

// reset gives the variable its default, which envconfig gives only to variables that are not set at all: manifests and unit
// files set variables to nothing to unset them.
func (v variable) reset() {
	v.field.SetZero()
	if v.def == "" {
		return
	}
	switch into := v.field.Addr().Interface().(type) {
	case envconfig.Decoder:
		_ = into.Decode(v.def) // It keeps its own error.
	case *[]string:
		*into = []string{v.def}
	default:
		v.field.SetString(v.def)
	}
}

// The types below take any text and keep what is wrong with it, since envconfig stops at the first error of a decoder.

// duration is a length of time with a unit, such as 15s.
type duration struct {
	time.Duration
	given bool
	err   error
}

// Or returns the duration, or the other one where none is given.
func (d duration) Or(unset time.Duration) time.Duration {
	if !d.given {
		return unset
	}
	return d.Duration
}

// Decode implements envconfig.Decoder.
func (d *duration) Decode(text string) error {
	parsed, err := time.ParseDuration(text)
	switch {
	case err != nil && isNumber(text):
		err = fmt.Errorf("%s has no unit: write %ss", quote.Value(text), text)
	case err != nil:
		err = fmt.Errorf("%s is not a duration: write for example 15s, 500ms or 1m30s", quote.Value(text))
	case parsed < 0:
		err = fmt.Errorf("%s is negative: write a duration from 0s up", quote.Value(text))
	case parsed > maxDuration:
		err = fmt.Errorf("%s is too long: write %s (a year) or less", quote.Value(text), "8760h")
	}
	*d = duration{Duration: parsed, given: true, err: err}
	return nil
}

func (d *duration) fault() error { return d.err }

// isNumber reports if text is a plain decimal number, such as 15 or 0.5.
func isNumber(text string) bool {
	_, err := strconv.ParseFloat(text, 64)
	return err == nil && strings.Trim(text, "0123456789.") == ""
}

// count is a whole number from 0 up.
type count struct {
	N   int
	err error
}

// Decode implements envconfig.Decoder.
func (c *count) Decode(text string) error {
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		err = fmt.Errorf("%s is not a whole number from 0 to 2147483647: write for example 5", quote.Value(text))
	}
	*c = count{N: int(n), err: err}
	return nil
}

func (c *count) fault() error { return c.err }

// signal is a signal by its name, with or without SIG.
type signal struct {
	unix.Signal
	err error
}

// Decode implements envconfig.Decoder.
func (s *signal) Decode(text string) error {
	*s = signal{}
	name := "SIG" + strings.TrimPrefix(strings.ToUpper(text), "SIG")
	number, err := strconv.Atoi(text)
	switch s.Signal = unix.SignalNum(name); {
	case err == nil && unix.SignalName(unix.Signal(number)) != "":
		s.err = fmt.Errorf("%s is a number: write %s", quote.Value(text), strings.TrimPrefix(unix.SignalName(unix.Signal(number)), "SIG"))
	case s.Signal == 0:
		s.err = fmt.Errorf("%s is not the name of a signal: write for example TERM, INT, QUIT or USR1", quote.Value(text))
	case s.Signal == unix.SIGKILL:
		s.err = fmt.Errorf("%s leaves the job no time to stop: for that write LEASEHOLD_STOP_GRACE=0s, and here for example TERM", quote.Value(text))
	case slices.Contains([]unix.Signal{unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU}, s.Signal):
		s.err = fmt.Errorf("%s freezes a job instead of stopping it: write for example TERM", quote.Value(text))
	}
	return nil
}

func (s *signal) fault() error { return s.err }

// level is the least severe kind of line that is logged.
type level struct {
	slog.Level
	err error
}

// Decode implements envconfig.Decoder.
func (l *level) Decode(text string) error {
	*l = level{}
	switch strings.ToLower(text) {
	case "debug":
		l.Level = slog.LevelDebug
	case "info":
		l.Level = slog.LevelInfo
	case "warn":
		l.Level = slog.LevelWarn
	case "error":
		l.Level = slog.LevelError
	default:
		l.err = fmt.Errorf("%s is unknown: write debug, info, warn or error", quote.Value(text))
	}
	return nil
}

func (l *level) fault() error { return l.err }

// secret is a text that prints as something else, whichever verb or logger prints it.
type secret string

// Format implements fmt.Formatter.
func (s secret) Format(out fmt.State, _ rune) { _, _ = out.Write([]byte(s.hidden())) }

// LogValue implements slog.LogValuer.
func (s secret) LogValue() slog.Value { return slog.StringValue(s.hidden()) }

// MarshalText keeps it out of JSON.
func (s secret) MarshalText() ([]byte, error) { return []byte(s.hidden()), nil }

func (s secret) hidden() string {
	if s == "" {
		return ""
	}
	return "[hidden]"
}
