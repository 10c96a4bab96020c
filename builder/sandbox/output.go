package sandbox

import (
	"errors"
	"fmt"
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

// outputs are the pipes of what a process prints.
type outputs struct {
	stdout, stderr *os.File // its ends, until leave
	null           *os.File
	pipes          []*output
}

// newOutputs makes them and begins to read. Standard error goes where standard output goes if the writers are the same.
func newOutputs(p Process) (o *outputs, err error) {
	o = &outputs{}
	if o.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	o.stdout, o.stderr = o.null, o.null
	add := func(to io.Writer) *os.File {
		if to == nil || err != nil {
			return o.null
		}
		var r, w *os.File
		if r, w, err = os.Pipe(); err != nil {
			return o.null
		}
		o.pipes = append(o.pipes, &output{from: r, to: to, done: make(chan struct{})})
		return w
	}
	o.stdout = add(p.Stdout)
	if same(p.Stdout, p.Stderr) {
		o.stderr = o.stdout
	} else {
		o.stderr = add(p.Stderr)
	}
	if err != nil {
		o.leave()
		o.close()
		return nil, err
	}
	for _, p := range o.pipes {
		go p.pump()
	}
	return o, nil
}

// leave closes the ends of the process, once it has them or never will.
func (o *outputs) leave() {
	for _, f := range []*os.File{o.stdout, o.stderr, o.null} {
		f.Close() // those closed before say so, and that is all
	}
}

// finish waits until all output is written. With its first process the whole
// pid namespace is gone, so all there will ever be is in the pipes.
func (o *outputs) finish() {
	for _, p := range o.pipes {
		p.finish()
	}
}

// written turns an end that looked like success into an error if the output
// did not reach its writer.
func (o *outputs) written(err error) error {
	for _, p := range o.pipes {
		if err == nil && p.err != nil {
			err = fmt.Errorf("write output: %w", p.err)
		}
	}
	return err
}

func (o *outputs) close() {
	for _, p := range o.pipes {
		p.from.Close()
	}
}
