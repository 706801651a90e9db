package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Config configures a Server. All fields except Version and Name are required.
type Config struct {
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Gatherer   prometheus.Gatherer  // What /metrics shows.
	Snapshot   func() Snapshot      // Called for each request. Must not block.
	Now        func() time.Duration // The clock of the snapshot's deadlines.
	Version    string
	Name       string // The host of the address that it listens on, if that is a name.
}

// Server is the health endpoint.
type Server struct {
	cfg     Config
	handler http.Handler
	events  *events
}

// An Endpoint is a path that the server answers.
type Endpoint struct{ Path, Meaning string }

// Endpoints lists what the server answers, for help and the reference.
func Endpoints() []Endpoint {
	return []Endpoint{
		{"/livez", "200 while the elector's own loops send heartbeats, whatever etcd does"},
		{
			"/readyz",
			"200 while the candidate is in the election, waiting or leading, and fit to lead",
		},
		{
			"/leader",
			"200 only while leading, before stop-at, with the job running (or none asked for)," +
				" ready and healthy",
		},
		{"/standby", "200 only while waiting in the queue"},
		{
			"/status",
			"200 with JSON; 421, like the next three, to a request for a host name that is" +
				" neither localhost nor that of LEASEHOLD_LISTEN",
		},
		{
			"/",
			"the same JSON; its name is the leader's identity. A browser (Accept: text/html)" +
				" gets a page that shows it, and each change",
		},
		{"/metrics", "metrics for Prometheus"},
		{
			"/events",
			"server-sent events: the JSON of /status, now and at each change, and the last" +
				" leaders; 503 if too many streams are open",
		},
	}
}

// New makes a server, and registers the metrics of what it knows.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg}
	s.events = newEvents(s.now, cfg.Version)
	s.register(cfg.Registerer)
	mux := http.NewServeMux()
	// A pattern of GET matches HEAD too. HAProxy's checks are OPTIONS requests that look only at
	// the status, so OPTIONS gets the status of GET. All other methods get 405 from the mux.
	handle := func(path string, h http.HandlerFunc) {
		mux.HandleFunc("GET "+path, h)
		mux.HandleFunc("OPTIONS "+path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", "GET, HEAD, OPTIONS")
			h(&withoutBody{ResponseWriter: w}, r)
		})
	}
	handle("/livez", s.probe(func(s Snapshot, _ time.Duration) error { return s.live() }))
	handle("/readyz", s.probe(func(s Snapshot, _ time.Duration) error { return s.ready() }))
	handle("/leader", s.probe(Snapshot.leader))
	handle("/standby", s.probe(func(s Snapshot, _ time.Duration) error { return s.standby() }))
	handle("/status", s.ours(s.status))
	page := newPage()
	handle("/{$}", s.ours(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Vary", "Accept")
		if wantsPage(r) {
			page.serve(w)
		} else {
			s.status(w, r)
		}
	}))
	metrics := promhttp.HandlerFor(cfg.Gatherer, promhttp.HandlerOpts{
		// A client that breaks a scrape off is an error, too, and anybody can.
		ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug),
		// Each scrape being served holds the whole text in memory.
		MaxRequestsInFlight: 4,
	})
	handle("/metrics", s.ours(metrics.ServeHTTP))
	handle("/events", s.ours(s.events.serve))
	s.handler = mux
	return s
}

// now returns what is true at this moment, and the moment.
func (s *Server) now() (Snapshot, time.Duration) {
	snapshot := s.cfg.Snapshot()
	// The clock is read last, so that an answer is never for an earlier time than its snapshot.
	now := s.cfg.Now()
	return snapshot.update(now, time.Now()), now
}

// probe answers "ok", or 503 with the reason.
func (s *Server) probe(rule func(Snapshot, time.Duration) error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if err := rule(s.now()); err != nil {
			write(w, http.StatusServiceUnavailable,
				"text/plain; charset=utf-8", []byte(err.Error()+"\n"))
			return
		}
		write(w, http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
	}
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) {
	snapshot, now := s.now()
	text := encode(snapshot.status(now, s.cfg.Version), "  ")
	write(w, http.StatusOK, "application/json", []byte(text))
}

// ours answers 421 if the request is for a host name that is not ours. A web page can give its own
// name our address (DNS rebinding), and then read what its visitor's browser gets from us. The
// probes have no such check, because their answers are no secret.
func (s *Server) ours(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		_, err := netip.ParseAddr(strings.Trim(host, "[]"))
		// Browsers always send a host. HTTP/1.0 has none.
		if err == nil || host == "" ||
			strings.EqualFold(host, "localhost") || strings.EqualFold(host, s.cfg.Name) {
			h(w, r)
			return
		}
		write(w, http.StatusMisdirectedRequest, "text/plain; charset=utf-8",
			[]byte("ask by IP address, as localhost, or by the name in LEASEHOLD_LISTEN"+
				" (or send one of them as the header Host)\n"))
	}
}

func write(w http.ResponseWriter, code int, contentType string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(body) // The client may have gone.
}

// withoutBody drops the body of an answer, as for HEAD.
type withoutBody struct {
	http.ResponseWriter
	begun bool
}

func (w *withoutBody) WriteHeader(code int) {
	w.begun = true
	w.Header().Set("Content-Length", "0")
	w.Header().Del("Content-Encoding")
	w.ResponseWriter.WriteHeader(code)
}

func (w *withoutBody) Write(p []byte) (int, error) {
	if !w.begun {
		w.WriteHeader(http.StatusOK)
	}
	return len(p), nil
}

// Changed has the subscribers of /events get the snapshot, if it has changed. It never waits.
func (s *Server) Changed() { s.events.noteChange() }

// Run serves on l until ctx ends, then lets the requests being served end, for a second at most. It
// closes l.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var sending sync.WaitGroup
	defer sending.Wait()
	defer cancel()
	sending.Go(func() { s.events.run(ctx) })
	b := newBoundedListener(l)
	srv := &http.Server{
		Handler:           s.handler,
		ErrorLog:          slog.NewLogLogger(s.cfg.Logger.Handler(), slog.LevelDebug),
		ConnState:         b.noteState,
		ReadHeaderTimeout: 2 * time.Second,
		ReadTimeout:       2 * time.Second, // No request that is answered here has a body.
		WriteTimeout:      5 * time.Second,
		IdleTimeout:       90 * time.Second, // Prometheus scrapes more often by default.
		MaxHeaderBytes:    8 << 10,
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(b) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve health endpoint: %w", err)
	case <-ctx.Done():
	}
	stopping, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer stop()
	if err := srv.Shutdown(stopping); err != nil {
		_ = srv.Close() // Clients that are still connected had a second.
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health endpoint: %w", err)
	}
	return nil
}
