package election

import (
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// prepareMessages makes the protobuf library learn the messages that only a switchover needs. It
// learns each kind when it is first used, and most processes make one release in their lives. That
// took as long as the rest of the request. It takes 2 ms, once.
var prepareMessages = sync.OnceFunc(func() {
	header, kv := &pb.ResponseHeader{}, &mvccpb.KeyValue{}
	deletion := &pb.DeleteRangeRequest{}
	for _, m := range []proto.Message{
		&pb.TxnRequest{
			Compare: []*pb.Compare{{
				TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 1},
			}},
			Success: []*pb.RequestOp{
				{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: deletion}},
				{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{}}},
				{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{}}},
			},
		},
		&pb.TxnResponse{Header: header, Responses: []*pb.ResponseOp{
			{Response: &pb.ResponseOp_ResponseDeleteRange{
				ResponseDeleteRange: &pb.DeleteRangeResponse{Header: header},
			}},
			{Response: &pb.ResponseOp_ResponsePut{
				ResponsePut: &pb.PutResponse{Header: header},
			}},
			{Response: &pb.ResponseOp_ResponseRange{
				ResponseRange: &pb.RangeResponse{Header: header, Kvs: []*mvccpb.KeyValue{kv}},
			}},
		}},
		&pb.WatchResponse{Header: header, Events: []*mvccpb.Event{{Kv: kv}}},
		&pb.LeaseKeepAliveRequest{ID: 1},
		&pb.LeaseKeepAliveResponse{Header: header},
		&pb.LeaseRevokeRequest{ID: 1},
		&pb.LeaseRevokeResponse{Header: header},
	} {
		// Neither can fail: nothing depends on the result.
		if raw, err := proto.Marshal(m); err == nil {
			_ = proto.Unmarshal(raw, m.ProtoReflect().New().Interface())
		}
	}
})
