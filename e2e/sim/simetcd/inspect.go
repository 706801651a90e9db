package simetcd

import (
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// The methods of this file look at what a majority of etcd has carried out, change it as an
// operator's request does that has arrived at etcd's leader, and reset connections.

// Keys returns the keys with the prefix.
func (c *Cluster) Keys(prefix string) (keys []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	end := slices.Clone([]byte(prefix))
	end[len(end)-1]++
	for _, kv := range c.store.between([]byte(prefix), end, c.store.rev) {
		keys = append(keys, string(kv.Key))
	}
	return keys
}

// Created returns the key's create revision; 0: there is no such key.
func (c *Cluster) Created(key string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.store.get(key, c.store.rev).GetCreateRevision()
}

// HasLease reports whether the lease exists.
func (c *Cluster) HasLease(id int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.store.leases[id] != nil
}

// PutKey puts the key, bound to the lease; 0: to none. It reports whether that was done.
func (c *Cluster) PutKey(key string, value []byte, lease int64) bool {
	return c.operate(func(u *update) error {
		if lease != 0 && u.leases[lease] == nil {
			return rpctypes.ErrGRPCLeaseNotFound
		}
		u.put(&pb.PutRequest{Key: []byte(key), Value: value, Lease: lease})
		return nil
	})
}

// DeleteKey deletes the key if there is one. It reports whether that was done.
func (c *Cluster) DeleteKey(key string) bool {
	return c.operate(func(u *update) error {
		if u.get(key, u.now()) == nil {
			return rpctypes.ErrGRPCKeyNotFound
		}
		u.deleteRange(&pb.DeleteRangeRequest{Key: []byte(key)})
		return nil
	})
}

// Leave deletes the key, if there is one, and puts another one, bound to a lease, in one
// transaction. It reports whether that was done.
func (c *Cluster) Leave(key, exited string, lease int64) bool {
	return c.operate(func(u *update) error {
		if u.get(key, u.now()) == nil || u.leases[lease] == nil {
			return rpctypes.ErrGRPCKeyNotFound
		}
		u.deleteRange(&pb.DeleteRangeRequest{Key: []byte(key)})
		u.put(&pb.PutRequest{Key: []byte(exited), Lease: lease})
		return nil
	})
}

// OverwriteKey puts the key, if there is one, without a lease. It reports whether that was done.
func (c *Cluster) OverwriteKey(key string) bool {
	return c.operate(func(u *update) error {
		if u.get(key, u.now()) == nil {
			return rpctypes.ErrGRPCKeyNotFound
		}
		u.put(&pb.PutRequest{Key: []byte(key), Value: []byte("overwritten")})
		return nil
	})
}

// RevokeLease revokes the lease. It reports whether that was done.
func (c *Cluster) RevokeLease(id int64) bool {
	return c.operate(func(u *update) error { return u.revoke(id) })
}

func (c *Cluster) operate(run func(u *update) error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.canLead() {
		return false
	}
	_, err := c.commit(run)
	c.settle()
	return err == nil
}

// Disconnect resets the client's connections to the member.
func (c *Cluster) Disconnect(client string, number int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.members[number-1].conns {
		if conn.client == client {
			conn.reset()
		}
	}
}
