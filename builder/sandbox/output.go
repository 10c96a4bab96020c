package sandbox

import (
	"errors"
	"io"
	"os"
	"syscall"
	"time"
)

// output carries what a process prints from its pipe to a writer.
type output struct {
	from *os.File
	to   io.Writer
	err  error // of the writer
	done chan struct{}
}

// pump copies until the pipe ends or finish says that nobody is left to write.
// A writer's error does not stop the reading: a process must not die of a
// broken pipe because its log could not be kept.
func (o *output) pump() {
	defer close(o.done)
	buf := make([]byte, 32<<10)
	for {
		n, err := o.from.Read(buf)
		o.write(buf[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.drain(buf)
			return
		}
		if err != nil {
			return
		}
	}
}

// finish makes pump take what is left in the pipe and waits for it. Usually
// the pipe has ended already; but its other end may have been handed to a
// process outside the sandbox, which must not keep the step waiting.
func (o *output) finish() {
	o.from.SetReadDeadline(time.Unix(1, 0))
	<-o.done
}

// drain reads without ever waiting.
func (o *output) drain(buf []byte) {
	o.from.SetReadDeadline(time.Time{})
	raw, err := o.from.SyscallConn()
	if err != nil {
		return
	}
	for {
		n := 0
		raw.Read(func(fd uintptr) bool {
			n, err = syscall.Read(int(fd), buf)
			return true
		})
		if n <= 0 && !errors.Is(err, syscall.EINTR) {
			return
		}
		o.write(buf[:max(n, 0)])
	}
}

func (o *output) write(b []byte) {
	if len(b) == 0 || o.err != nil {
		return
	}
	_, o.err = o.to.Write(b)
}
