//go:build linux

package supervisor

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// kind says what a message between guard and elector is about.
type kind uint8

const (
	// From the elector to the guard.
	msgReady  kind = iota + 1 // the elector is up and its endpoint listens
	msgLease                  // a: lease id, from before the grant on; 0: none any more
	msgStart                  // start the job; a: lease id, b: token, c: stop-at, d: kill-by, text: key
	msgExtend                 // a: stop-at, b: kill-by
	msgStop                   // a: grace in nanoseconds, 0: kill at once, untilKillBy: the deadlines decide
	msgPing                   // a: number
	msgStatus                 // text: what systemd shows
	msgExit                   // a: exit code, text: why; the elector is about to end in good order
	msgToken                  // text: what etcd takes for the elector's password, for who revokes in its stead; "": nothing

	// From the guard to the elector.
	msgStarted  // a: pid of the job's first process
	msgRefused  // the job was not started; a: exit code in its stead, text: why
	msgExited   // the job's first process has ended; a: code, b: signal
	msgDead     // nothing of the job is left; a: nanoseconds since the kill or the stop signal began, b: kill reason, c: 1 if it did not end by itself
	msgPong     // a: number of the ping
	msgSignal   // a: a signal that the guard received
	msgLateness // a: nanoseconds by which a deadline was served late
)

const untilKillBy = -1

// A message is at most PIPE_BUF long, so that the kernel writes it whole or not at all (pipe(7)).
const (
	maxMessage = 4096
	headerLen  = 4 + 4*8
	maxText    = maxMessage - headerLen
)

// message is one message. text points into the buffer that it was read from and holds until the next read.
type message struct {
	kind       kind
	a, b, c, d int64
	text       []byte
}

// errClosed says that the other end is closed, and errFull that nobody reads there: a dead peer too, but one that may still run.
var (
	errClosed = errors.New("the pipe is closed")
	errFull   = errors.New("the pipe is full")
)

// send writes m to the non-blocking pipe fd. It never blocks and uses buf alone.
func send(fd int, buf *[maxMessage]byte, m message) error {
	n := headerLen + copy(buf[headerLen:], m.text)
	binary.LittleEndian.PutUint16(buf[0:], uint16(n))
	buf[2], buf[3] = byte(m.kind), 0
	binary.LittleEndian.PutUint64(buf[4:], uint64(m.a))
	binary.LittleEndian.PutUint64(buf[12:], uint64(m.b))
	binary.LittleEndian.PutUint64(buf[20:], uint64(m.c))
	binary.LittleEndian.PutUint64(buf[28:], uint64(m.d))
	for {
		switch _, err := unix.Write(fd, buf[:n]); err {
		case nil:
			return nil
		case unix.EINTR:
		case unix.EAGAIN:
			return errFull
		default:
			return errClosed
		}
	}
}

// inbox takes messages from a pipe apart.
type inbox struct {
	buf   [4 * maxMessage]byte
	start int
	end   int
}

// fill reads once from fd. It returns false where there was nothing to read, and errClosed at end-of-file.
func (in *inbox) fill(fd int) (bool, error) {
	if in.start > 0 {
		in.end = copy(in.buf[:], in.buf[in.start:in.end])
		in.start = 0
	}
	n, err := unix.Read(fd, in.buf[in.end:])
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return false, nil
	case err != nil || n == 0:
		return false, errClosed
	}
	in.end += n
	return true, nil
}

// next returns the next whole message, if there is one.
func (in *inbox) next() (message, bool) {
	b := in.buf[in.start:in.end]
	if len(b) < headerLen {
		return message{}, false
	}
	n := int(binary.LittleEndian.Uint16(b))
	if n < headerLen || n > maxMessage || len(b) < n {
		return message{}, false
	}
	in.start += n
	return message{
		kind: kind(b[2]),
		a:    int64(binary.LittleEndian.Uint64(b[4:])),
		b:    int64(binary.LittleEndian.Uint64(b[12:])),
		c:    int64(binary.LittleEndian.Uint64(b[20:])),
		d:    int64(binary.LittleEndian.Uint64(b[28:])),
		text: b[headerLen:n],
	}, true
}
