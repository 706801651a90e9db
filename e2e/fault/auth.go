//go:build linux

package fault

import (
	"context"
	"errors"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"

	"leasehold/e2e/harness"
)

// TokensExpire lets a TTL pass in which the candidates' auth tokens expire, one
// after the other. Etcd prolongs a simple token whenever it is used; it must run
// with --auth-token-ttl shorter than a renewal interval.
func TokensExpire() Fault {
	var (
		before float64
		token  string
	)
	return Fault{
		Name: "token-expiry",
		Inject: func(ctx context.Context, on *Target) (err error) {
			if before, err = on.Etcd.Authentications(ctx); err != nil {
				return err
			}
			own, err := on.Client.Authenticate(ctx, harness.CandidateUser,
				harness.CandidatePassword)
			if err != nil {
				return err
			}
			token = own.Token
			return harness.Wait(ctx, on.TTL)
		},
		Verify: func(ctx context.Context, on *Target) error {
			after, err := on.Etcd.Authentications(ctx)
			if err != nil {
				return err
			}
			if n := after - before - 1; on.Machine.Implementation.Ours() && n < 2 {
				return fmt.Errorf("the candidates have authenticated %.0f times, which is too rare",
					n)
			}
			client, err := on.Etcd.NewAnonymousClient() // others would use a token of their own
			if err != nil {
				return err
			}
			defer func() { _ = client.Close() }()
			ctx = metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, token)
			kv := pb.NewKVClient(client.ActiveConnection())
			_, err = kv.Range(ctx, &pb.RangeRequest{Key: []byte(Stray)})
			if err = rpctypes.Error(err); !errors.Is(err, rpctypes.ErrInvalidAuthToken) {
				return fmt.Errorf("a token of a TTL ago gets %w, and it should have expired", err)
			}
			return nil
		},
	}
}
