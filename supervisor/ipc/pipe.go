//go:build linux

package ipc

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// A message is at most PIPE_BUF long, so that the kernel writes it whole or not at all (pipe(7)).
// It begins with its length (2 bytes), its kind (1) and a byte of zero; four numbers follow, and
// then the text. The text of a Record begins with more numbers.
const (
	maxMessage = 4096
	headerLen  = 4 + 4*8

	// MaxText bounds the text of a message, in bytes. A longer one is cut.
	MaxText = maxMessage - headerLen
)

// Both errors mean that the peer is lost, because nobody reads.
var (
	ErrClosed = errors.New("the pipe is closed")
	ErrFull   = errors.New("the pipe takes nothing") // the peer may still run
)

// Outbox writes messages into the pipe FD.
type Outbox struct {
	FD  int
	buf [maxMessage]byte
}

// Send writes one of the message types. It never blocks; the error is ErrClosed or ErrFull.
func (o *Outbox) Send(message any) error {
	n := o.encode(message)
	for {
		switch _, err := unix.Write(o.FD, o.buf[:n]); err {
		case nil:
			return nil
		case unix.EINTR:
		case unix.EPIPE:
			return ErrClosed
		default: // EAGAIN; ENOMEM if the memory limit is reached
			return ErrFull
		}
	}
}

// encode writes the message into the buffer and returns its length. It is a type switch, and not a
// method of each type, so that the compiler sees that the message does not escape and never
// allocates it.
func (o *Outbox) encode(message any) int {
	var kind Kind
	var number [4]int64
	var text string
	var raw []byte
	n := headerLen
	switch m := message.(type) {
	case Ready:
		kind = KindReady
	case Lease:
		kind, number = KindLease, [4]int64{m.ID, int64(m.TTL), flag(m.Releasing)}
	case Entered:
		kind, number, text = KindEntered, [4]int64{m.Created}, m.Key
	case Restarts:
		kind = KindRestarts
		number = [4]int64{int64(m.Count), int64(m.Failures), int64(m.Backoff)}
	case JobReady:
		kind, number = KindJobReady, [4]int64{flag(m.Passed), flag(m.Notified)}
	case Token:
		kind, raw = KindToken, m.Value
	case Start:
		kind, text = KindStart, m.Key
		number = [4]int64{m.LeaseID, m.Token, int64(m.StopAt), int64(m.KillBy)}
	case Extend:
		kind, number = KindExtend, [4]int64{int64(m.StopAt), int64(m.KillBy)}
	case Stop:
		kind, number = KindStop, [4]int64{int64(m.Grace), flag(m.Unhealthy)}
	case Ping:
		kind, number = KindPing, [4]int64{m.Number}
	case Status:
		kind, text = KindStatus, m.Text
	case Exiting:
		kind, number, text = KindExiting, [4]int64{int64(m.Code)}, m.Why
	case Record:
		kind, text = KindRecord, m.Entered.Key
		n += m.encode(o.buf[n:])
	case Started:
		kind, number = KindStarted, [4]int64{int64(m.PID), int64(m.At)}
	case Refused:
		kind, number, text = KindRefused, [4]int64{int64(m.Code)}, m.Why
	case Exited:
		kind, number = KindExited, [4]int64{int64(m.Code), int64(m.Signal)}
	case Gone:
		kind = KindGone
		number = [4]int64{int64(m.Elapsed), int64(m.Reason), flag(m.Ordered)}
	case Pong:
		kind, number = KindPong, [4]int64{m.Number}
	case Signal:
		kind, number = KindSignal, [4]int64{int64(m.Signal)}
	case TimerLatency:
		kind, number = KindTimerLatency, [4]int64{int64(m.By)}
	case Frozen:
		kind, number = KindFrozen, [4]int64{int64(m.StopAt)}
	case Thawed:
		kind = KindThawed
	case Ending:
		kind = KindEnding
	default:
		panic("ipc: this is no message")
	}
	n += copy(o.buf[n:], text)
	n += copy(o.buf[n:], raw)
	binary.LittleEndian.PutUint16(o.buf[0:], uint16(n))
	o.buf[2], o.buf[3] = byte(kind), 0
	for i, v := range number {
		binary.LittleEndian.PutUint64(o.buf[4+8*i:], uint64(v))
	}
	return n
}

func flag(set bool) int64 {
	if set {
		return 1
	}
	return 0
}

// Inbox reads messages from a non-blocking pipe. The zero value is ready for use.
type Inbox struct {
	buf   [4 * maxMessage]byte
	start int
	end   int
}

// Fill reads once from fd. It returns false if there was nothing to read, and ErrClosed at
// end-of-file, or if what has come is no message: nothing that follows can be read.
func (in *Inbox) Fill(fd int) (bool, error) {
	if in.start > 0 {
		in.end = copy(in.buf[:], in.buf[in.start:in.end])
		in.start = 0
	}
	if n, known := in.length(); known && (n < headerLen || n > maxMessage) {
		return false, ErrClosed
	}
	n, err := unix.Read(fd, in.buf[in.end:])
	for err == unix.EINTR {
		n, err = unix.Read(fd, in.buf[in.end:])
	}
	switch {
	case err == unix.EAGAIN:
		return false, nil
	case err != nil || n == 0:
		return false, ErrClosed
	}
	in.end += n
	return true, nil
}

// Empty reports whether all that was read were messages, and all of them were taken.
func (in *Inbox) Empty() bool { return in.start == in.end }

// length is that of the next message, if it is known.
func (in *Inbox) length() (n int, known bool) {
	b := in.buf[in.start:in.end]
	if len(b) < 2 {
		return 0, false
	}
	return int(binary.LittleEndian.Uint16(b)), true
}

// Next returns the next whole message, if there is one.
func (in *Inbox) Next() (Message, bool) {
	b := in.buf[in.start:in.end]
	n, known := in.length()
	if !known || n < headerLen || n > maxMessage || len(b) < n {
		return Message{}, false
	}
	in.start += n
	m := Message{Kind: Kind(b[2]), text: b[headerLen:n]}
	for i := range m.number {
		m.number[i] = int64(binary.LittleEndian.Uint64(b[4+8*i:]))
	}
	return m, true
}
