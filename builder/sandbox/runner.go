package sandbox

import (
	"errors"
	"runtime"
	"slices"
	"sync"
	"syscall"
)

// Runner runs processes one after the other or side by side, and starts
// children ahead of the processes that they become: to start one takes longer
// than all else about a short step. Close ends those that nobody needed.
type Runner struct {
	// Filter compiles the seccomp filter of processes with these capabilities, named like CAP_CHOWN, as seccomp(2) takes
	// it; see package seccomp, which has Docker's. shared says that they are in the machine's network. Without it only
	// insecure processes can run.
	Filter func(capabilities []string, shared bool) ([]byte, error)

	mu   sync.Mutex
	idle []*running

	compiling sync.Mutex
	filters   map[bool][]byte
}

// filter returns the filter for a process that shares the machine's network, or not. It is made once.
func (r *Runner) filter(shared bool) ([]byte, error) {
	if r.Filter == nil {
		return nil, errors.New("there is none")
	}
	r.compiling.Lock()
	defer r.compiling.Unlock()
	f, ok := r.filters[shared]
	if ok {
		return f, nil
	}
	f, err := r.Filter(defaultCapabilityNames(), shared)
	if err != nil {
		return nil, err
	}
	if r.filters == nil {
		r.filters = map[bool][]byte{}
	}
	r.filters[shared] = f
	return f, nil
}

// ahead starts a child for a process that is likely to come. That it cannot is
// for the process to find out.
func (r *Runner) ahead(of role) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.idle) >= runtime.GOMAXPROCS(0) {
		return
	}
	if c, err := spawn(of); err == nil {
		c.binding.Go(c.bind)
		r.idle = append(r.idle, c)
	}
}

// take returns a child that waits for a process of a role; nil if there is none.
func (r *Runner) take(of role) *running {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		i := slices.IndexFunc(r.idle, func(c *running) bool { return c.role == of })
		if i < 0 {
			return nil
		}
		c := r.idle[i]
		r.idle = slices.Delete(r.idle, i, i+1)
		c.binding.Wait()
		if c.unbound == nil && c.waits() {
			return c
		}
		c.dismiss()
	}
}

// waits says whether an idle child is alive: a dead one has closed its report.
func (c *running) waits() bool {
	raw, err := c.report.SyscallConn()
	if err != nil {
		return false
	}
	var b [1]byte
	rawErr := raw.Read(func(fd uintptr) bool {
		_, err = syscall.Read(int(fd), b[:])
		return true
	})
	return rawErr == nil && errors.Is(err, syscall.EAGAIN)
}

// dismiss ends a child that no process was attached to.
func (c *running) dismiss() {
	c.binding.Wait()
	c.process.Kill()
	c.process.Wait()
	c.close()
}

// Close ends the children that wait. The Runner can be used again.
func (r *Runner) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.idle {
		c.dismiss()
	}
	r.idle = nil
}
