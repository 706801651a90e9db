package election

import (
	"context"
	"errors"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// memberError says which member answered so.
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
		// Without gRPC's wrappings: rpc error: code = … desc = connection error: desc = "transport: …"
		message := s.Message()
		if i := strings.LastIndex(message, `desc = "`); i >= 0 {
			message = strings.TrimSuffix(message[i+len(`desc = "`):], `"`)
		}
		return e.endpoint + ": " + strings.TrimPrefix(message, "transport: Error while dialing: ")
	}
	return e.endpoint + ": " + e.err.Error()
}

func (e *memberError) Unwrap() error { return e.err }

// authError says why there is no token. It says nothing of the member that one is needed for.
type authError struct{ error }

func (e authError) Unwrap() error { return e.error }

// unavailable reports whether the member can't be reached, or says itself that it can't serve now.
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
