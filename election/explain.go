package election

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"leasehold/internal/quote"
)

// memberError names the member that gave the error.
type memberError struct {
	endpoint string
	err      error
}

func (e *memberError) Error() string {
	if other := (*memberError)(nil); errors.As(e.err, &other) {
		return other.Error() // of another member, which was asked for a token
	}
	s, ok := status.FromError(e.err)
	switch {
	case errors.Is(e.err, context.DeadlineExceeded), errors.Is(e.err, context.Canceled),
		ok && (s.Code() == codes.DeadlineExceeded || s.Code() == codes.Canceled):
		return e.endpoint + ": no answer"
	case ok:
		// Without what gRPC wraps it in: rpc error: code = … desc = connection error: desc = "…"
		message := s.Message()
		if i := strings.LastIndex(message, `desc = "`); i >= 0 {
			message = strings.TrimSuffix(message[i+len(`desc = "`):], `"`)
		}
		for _, wrapping := range []string{
			"transport: Error while dialing: ", "transport: authentication handshake failed: ",
			"error reading server preface: ",
		} {
			message = strings.TrimPrefix(message, wrapping)
		}
		return e.endpoint + ": " + message
	}
	return e.endpoint + ": " + e.err.Error()
}

func (e *memberError) Unwrap() error { return e.err }

// authError says why there is no token. It says nothing about the member that needs the token.
type authError struct{ error }

func (e authError) Unwrap() error { return e.error }

// unavailable reports whether the member can't be reached, or reports that it can't serve now.
func unavailable(err error) bool {
	if errors.As(err, &authError{}) {
		return false
	}
	var said rpctypes.EtcdError
	if errors.As(err, &said) {
		return said.Code() == codes.Unavailable
	}
	return status.Code(err) == codes.Unavailable
}

// isOverload reports whether the error may mean that etcd has too much to do: it has not answered
// in time, or it refuses more requests.
func isOverload(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errUnanswered) ||
		errors.Is(err, rpctypes.ErrTooManyRequests)
}

// explain returns the error in one line, with a remedy if we know one.
func (cfg *Config) explain(err error) string { return cfg.explainFor("readwrite", err) }

// explainFor does the same for a request that needs this permission.
func (cfg *Config) explainFor(permission string, err error) string {
	return cfg.explainKeys(err, permission, "the prefix "+quote.Value(cfg.prefix()))
}

// explainKeys does the same for a request that needs this permission on these keys.
func (cfg *Config) explainKeys(err error, permission, keys string) string {
	text := oneLine(err)
	switch {
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		user := "the user"
		if cfg.Username != "" {
			user += " " + quote.Value(cfg.Username)
		}
		return fmt.Sprintf("%s: %s needs a role with %s permission on %s",
			text, user, permission, keys)
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return text + ": user name or password is wrong"
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return text + ": etcd demands a user name and a password"
	}
	return text
}

// oneLine joins the lines of an error, and makes them printable: whatever listens at an endpoint
// may have written them. Requests that wait for the same token fail with equal lines, of which it
// keeps one.
func oneLine(err error) string {
	return quote.Line(strings.Join(slices.Compact(strings.Split(err.Error(), "\n")), "; "))
}
