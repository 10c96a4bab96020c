package sandbox

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Runner runs processes one after the other or side by side. It keeps the launchers that it starts for that. Close ends
// them.
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

// running is a started launcher and this side of what leads to it.
type running struct {
	role    role
	process *os.Process
	socket  *os.File
	over    chan struct{} // closed when it may end; see spawn
	ended   sync.WaitGroup

	bounds  *bounds // it is in these cgroups
	nodes   bool    // see [Process.bound]
	unbound error   // why it is not
	binding sync.WaitGroup
}

// role is what has to be known of a process when its launcher starts.
type role struct {
	limits   Limits
	insecure bool
}

func roleOf(p Process) role { return role{p.Limits, p.Insecure} }

// lasts says whether a launcher can start one process after the other: what a limited one used at most, and whether
// memory ran out for it, is known only of a cgroup of its own.
func (r role) lasts() bool { return r.limits == Limits{} }

// take returns a launcher that waits for a process of a role, a new one if there is none.
func (r *Runner) take(of role) (*running, error) {
	for {
		l := r.waiting(of)
		fresh := l == nil
		if fresh {
			var err error
			if l, err = spawn(of); err != nil {
				return nil, &SetupError{Step: "start", Err: refused(err)}
			}
		}
		l.binding.Wait()
		if l.unbound != nil {
			l.end()
			return nil, l.unbound
		}
		if fresh || l.waits() {
			return l, nil
		}
		l.end() // it died while it waited
	}
}

// Expect says that a process with these limits is about to be run: its launcher can start meanwhile.
func (r *Runner) Expect(g Ground, l Limits, insecure bool) {
	if g.Name != groundRoot && g.Name != groundRootless {
		return
	}
	of := role{l, insecure}
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.ContainsFunc(r.idle, func(l *running) bool { return l.role == of }) {
		return
	}
	if l, err := spawn(of); err == nil { // that it cannot is for Run to find out
		r.idle = append(r.idle, l)
	}
}

func (r *Runner) waiting(of role) *running {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.idle, func(l *running) bool { return l.role == of })
	if i < 0 {
		return nil
	}
	l := r.idle[i]
	r.idle = slices.Delete(r.idle, i, i+1)
	return l
}

// put takes a launcher back that can be used again, or starts another one where more processes are to come and that is not
// so.
func (r *Runner) put(l *running, again, more bool) {
	if again && l.role.lasts() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.idle = append(r.idle, l)
		return
	}
	l.end()
	if !again || !more {
		return
	}
	if next, err := spawn(l.role); err == nil { // that it cannot is for the next process to find out
		r.mu.Lock()
		defer r.mu.Unlock()
		r.idle = append(r.idle, next)
	}
}

// Close ends the launchers that wait. The Runner can be used again.
func (r *Runner) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.idle {
		l.end()
	}
	r.idle = nil
}

// spawn starts a launcher. It does nothing before it is told.
func spawn(of role) (*running, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	if err := unix.SetNonblock(pair[0], true); err != nil {
		unix.Close(pair[0])
		return nil, err
	}
	l := &running{role: of, socket: os.NewFile(uintptr(pair[0]), "socket"), over: make(chan struct{})}
	started := make(chan error)
	l.ended.Go(func() {
		// The kernel sends the death signal when the thread that made the launcher ends, so this thread has to stay for as
		// long as that does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var err error
		l.process, err = os.StartProcess(self, []string{launcherName}, &os.ProcAttr{
			// Not the processes' environment but that of the launcher's Go runtime. The second processor is never used;
			// without it the scheduler would give the first one away whenever a call takes 20 microseconds. For GOGC see tidy.
			Env:   []string{"GOGC=off", "GOMAXPROCS=2", "GODEBUG=containermaxprocs=0,asyncpreemptoff=1"},
			Files: []*os.File{nil, nil, nil, theirs},
			Sys:   &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
		})
		started <- err
		if err == nil {
			<-l.over
			l.process.Kill()
			l.process.Wait()
		}
	})
	if err := <-started; err != nil {
		l.socket.Close()
		l.ended.Wait()
		return nil, err
	}
	l.binding.Go(l.bind)
	return l, nil
}

// bind puts the launcher into the cgroups of its role.
func (l *running) bind() {
	l.bounds, l.nodes, l.unbound = Process{Limits: l.role.limits, Insecure: l.role.insecure}.bound()
	if l.unbound != nil {
		return
	}
	err := l.bounds.put(l.process.Pid)
	if err == nil {
		err = l.bounds.allow(l.role.limits.PIDs + threads)
	}
	if err != nil && l.role.limits != (Limits{}) {
		l.unbound = &SetupError{Step: "limit", Err: err}
	} else if err != nil {
		l.nodes = false
	}
}

// waits says whether a launcher is alive: a dead one has closed its end.
func (l *running) waits() bool {
	raw, err := l.socket.SyscallConn()
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

// patience is how long a launcher may take to end its process before it is ended itself.
const patience = time.Second

// watch ends what the launcher runs, and in the end the launcher, when the context ends before stop is called.
func (l *running) watch(ctx context.Context) (stop func()) {
	over := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		l.hangUp()
		select {
		case <-over:
		case <-time.After(patience):
			l.process.Kill()
		}
	})
	return func() {
		close(over)
		cancel()
	}
}

// hangUp tells the launcher that there is no more to say.
func (l *running) hangUp() {
	if raw, err := l.socket.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_WR) })
	}
}

// run lets the launcher run one process and waits for that to end.
func (l *running) run(h *handover, out *outputs) (a answer, err error) {
	raw, err := l.socket.SyscallConn()
	if err != nil {
		return a, err
	}
	rights := unix.UnixRights(int(out.stdout.Fd()), int(out.stderr.Fd()))
	werr := raw.Write(func(fd uintptr) bool {
		err = unix.Sendmsg(int(fd), []byte{starting}, rights, nil, unix.MSG_NOSIGNAL)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	out.leave()
	if err = errors.Join(err, werr); err != nil {
		return a, err
	}
	if err := send(l.socket, h); err != nil {
		return a, err
	}
	if h.Limited {
		if _, err := io.ReadFull(l.socket, make([]byte, 1)); err != nil {
			return a, err
		}
		l.bounds.dismiss(l.process.Pid, l.role.limits.PIDs)
	}
	err = receive(l.socket, &a)
	return a, err
}

// comesHome waits until the mounts of the process are gone, and says whether the launcher can start another one.
func (l *running) comesHome() bool {
	said := make([]byte, 1)
	_, err := io.ReadFull(l.socket, said)
	return err == nil && said[0] == isHome
}

// end ends the launcher and what it runs.
func (l *running) end() {
	l.binding.Wait()
	close(l.over)
	l.ended.Wait()
	l.socket.Close()
	l.bounds.close()
}
