package kubernetes

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"leasehold/internal/quote"
)

// AccountDir is where a container finds its pod's service account.
const AccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

const (
	forbidden = http.StatusForbidden
	conflict  = http.StatusConflict

	// mostBytes bounds an answer. Kubernetes keeps no object that is larger.
	mostBytes = 3 << 20
)

// errNoAnswer: the API server can't be reached, or breaks off.
var errNoAnswer = errors.New("the API server does not answer")

// statusError is an answer other than success.
type statusError struct {
	code    int
	right   string // what the service account has to be permitted
	message string // the server's; printable
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s: %d %s: %s", e.right, e.code, http.StatusText(e.code), e.message)
}

// denied reports whether the request will not be carried out later either. The answer 504, for one,
// says that etcd did not answer the API server in time.
func (e *statusError) denied() bool { return e.code >= 400 && e.code < 500 }

// api asks the API server as the pod's service account. Its files are read for each use, because
// Kubernetes replaces them.
type api struct {
	server, account string
	client          *http.Client
}

func newAPI(server, account string) *api {
	a := &api{server: server, account: account}
	a.client = &http.Client{
		Transport: &http.Transport{
			DialTLSContext: a.dial, MaxIdleConnsPerHost: 1, IdleConnTimeout: 2 * recheck,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse // whoever is named there must not get the token
		},
	}
	return a
}

func (a *api) close() { a.client.CloseIdleConnections() }

// CheckAccount returns why the service account in that directory can't be used, or nil.
func CheckAccount(dir string) error {
	a := &api{account: dir}
	_, err := a.read("token")
	if err == nil {
		_, err = a.read("namespace")
	}
	if err == nil {
		_, err = a.authority()
	}
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the container has no service account:"+
			" write automountServiceAccountToken: true into the pod: %w", err)
	}
	return err
}

// read reads a file of the service account.
func (a *api) read(name string) (string, error) {
	path := filepath.Join(a.account, name)
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	value := strings.TrimSpace(string(text))
	if value == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return value, nil
}

// authority is who signs the certificate of the API server.
func (a *api) authority() (*x509.CertPool, error) {
	pem, err := a.read("ca.crt")
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(pem)) {
		return nil, fmt.Errorf("%s holds no certificate", filepath.Join(a.account, "ca.crt"))
	}
	return pool, nil
}

func (a *api) dial(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	pool, err := a.authority()
	if err != nil {
		return nil, err
	}
	dialer := tls.Dialer{Config: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	return dialer.DialContext(ctx, network, address)
}

func (a *api) service(ctx context.Context, name string) (s service, err error) {
	err = a.ask(ctx, request{
		method: http.MethodGet, verb: "get", resource: serviceResource, name: name,
		path: "/api/v1", plural: "services",
	}, &s)
	return s, err
}

// slice returns an EndpointSlice, or whether there is none.
func (a *api) slice(ctx context.Context, name string) (s slice, found bool, err error) {
	err = a.ask(ctx, sliceRequest(http.MethodGet, "get", name, nil), &s)
	if refused := (*statusError)(nil); errors.As(err, &refused) &&
		refused.code == http.StatusNotFound {
		return slice{}, false, nil
	}
	return s, err == nil, err
}

// create fails with the code conflict if there is one.
func (a *api) create(ctx context.Context, s slice) error {
	return a.ask(ctx, sliceRequest(http.MethodPost, "create", "", &s), nil)
}

// update fails with the code conflict if the present one is not of the version that s has.
func (a *api) update(ctx context.Context, s slice) error {
	if s.Metadata.ResourceVersion == "" { // without it, the API server would compare nothing
		return errors.New("the EndpointSlice has no resourceVersion")
	}
	return a.ask(ctx, sliceRequest(http.MethodPut, "update", s.Metadata.Name, &s), nil)
}

func sliceRequest(method, verb, name string, body *slice) request {
	r := request{
		method: method, verb: verb, resource: sliceResource, name: name,
		path: "/apis/" + sliceAPIVersion, plural: "endpointslices",
	}
	if body != nil {
		r.body = body
	}
	return r
}

// request is a request about an object, or about all of a kind.
type request struct {
	method         string
	verb, resource string // as roles name them
	path, plural   string
	name           string // "": of all
	body           any    // nil: none
}

func (r request) right() string {
	right := r.verb + " " + r.resource
	if r.name != "" {
		right += " " + quote.Printable(r.name)
	}
	return right
}

// ask sends a request, and decodes the answer into out, unless that is nil.
func (a *api) ask(ctx context.Context, r request, out any) error {
	namespace, err := a.read("namespace")
	if err != nil {
		return err
	}
	token, err := a.read("token")
	if err != nil {
		return err
	}
	var body io.Reader
	if r.body != nil {
		text, err := json.Marshal(r.body)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	target := url.URL{Scheme: "https", Host: a.server}
	elements := []string{r.path, "namespaces", url.PathEscape(namespace), r.plural}
	if r.name != "" {
		elements = append(elements, url.PathEscape(r.name))
	}
	address := target.JoinPath(elements...).String()
	req, err := http.NewRequestWithContext(ctx, r.method, address, body)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "leasehold")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	response, err := a.client.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(response.Body, mostBytes))
	if err != nil {
		return fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	if code := response.StatusCode; code < 200 || code > 299 {
		var status struct {
			Message string `json:"message"`
		}
		_ = json.Unmarshal(text, &status) // a proxy may answer in another form
		return &statusError{code: code, right: r.right(), message: quote.Line(status.Message)}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("%s: the answer is not what Kubernetes answers: %w", r.right(), err)
	}
	return nil
}
