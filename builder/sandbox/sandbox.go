// Package sandbox runs one process isolated in a root filesystem: namespaces,
// an overlay mounted for the process alone, Docker's capabilities, masked
// paths and seccomp profile.
//
// It knows nothing of Dockerfiles, layers or caches, and it never writes into
// the root it shows: whatever it makes there is a mount, so the overlay's
// upper holds only what the process itself changed. The caller guarantees that
// the paths of [MountPoints] exist.
//
// Start at [Runner.Run], the parent's half: it starts this program again, hands
// the process over through a pipe and waits. The child's half is [become] in init.go:
// it mounts (mount.go, dev.go, target.go), pivots, drops powers (powers.go)
// and executes (exec.go). What the two say to each other is in handover.go. [Enter] (enter.go, idmap.go) finds the ground before any of
// this: root as it is, a user namespace in which filo is root, or a container
// where nothing but chroot works (chroot.go, scene.go).
package sandbox

import (
	"context"
	"fmt"
	"io"
	"os"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"syscall"
)

// Root is a stack of unpacked trees shown as one filesystem, or a directory that holds it already.
type Root struct {
	Dir   string   // shown as it is and written to; then there is nothing else
	Lower []string // top first
	Upper string   // takes what is written; "" makes the root read-only
	Work  string   // overlayfs' own directory, on the filesystem of Upper
}

// Network says which network a process sees.
type Network string

// The networks of a process. Without a daemon there is nobody to run a bridge,
// so the default is the host's network.
const (
	NetworkDefault Network = "default"
	NetworkHost    Network = "host"
	NetworkNone    Network = "none"
)

// Ulimit is one resource limit by its Docker name, like "nofile".
type Ulimit struct {
	Name       string
	Soft, Hard int64 // -1 is unlimited
}

// MountType says what a mount shows.
type MountType string

// The kinds of mounts.
const (
	Bind    MountType = "bind"    // a file or directory of the host
	Overlay MountType = "overlay" // a view of stacked trees
	Tmpfs   MountType = "tmpfs"   // a fresh memory filesystem
	Data    MountType = "data"    // one file whose bytes never touch a disk
)

// Mount is one mount the process sees besides the standard ones.
type Mount struct {
	Type     MountType
	Source   string // Bind: a path of the host
	Root     Root   // Overlay: what to stack; with an Upper it is writable
	Subpath  string // Bind, Overlay: what to show of the source; never leaves it
	File     bool   // Overlay: Subpath names a file, so Target is one
	Data     []byte // Data: the file's bytes
	Target   string // absolute; symlinks are resolved inside the process's root
	ReadOnly bool
	NoExec   bool   // nothing on it can be executed
	Size     int64  // Tmpfs: limit in bytes, 0 is the kernel's default
	Mode     uint32 // Tmpfs, Data: permission bits; 0 is 01777 for Tmpfs and 0400 for Data
	UID, GID int    // Tmpfs, Data
}

// Process is a program and all it may see. The zero values mean Docker's
// defaults.
type Process struct {
	Ground         Ground // what [Enter] found
	Root           Root
	Args, Env      []string
	Dir            string // working directory in the root, made if missing; "" is /
	UID, GID       int
	Groups         []int
	Mounts         []Mount  // mounted in order, after the standard ones
	Hostname       string   // "" is "buildkitsandbox"
	Network        Network  // "" is the default network
	ExtraHosts     []string // "name:ip" or "name=ip"
	ShmSize        int64    // bytes of /dev/shm, 0 is 64 MiB
	Ulimits        []Ulimit
	Limits         Limits    // see [Limits.Try]
	Insecure       bool      // all capabilities, no seccomp, nothing masked
	Stdout, Stderr io.Writer // nil throws the output away; written to by one goroutine each, or one for both when equal
}

// ExitError says that the process ran and failed, or that its command could
// not be executed (codes 127 and 126, with Reason set).
type ExitError struct {
	Args   []string
	Code   int            // as a shell shows it: 128+n for signal n
	Signal syscall.Signal // what ended the process, 0 if it exited by itself
	Reason string         // why the command was never executed, "" if it was

	Ground      string // where it ran, see [Ground]
	SingleID    bool   // only one user ID existed where it ran
	OutOfMemory bool   // the kernel killed it, or a process it started, at the limit of memory
	Memory      int64  // that limit, bytes
	Peak        int64  // the most memory that was used, bytes
}

func (e *ExitError) Error() string {
	s := fmt.Sprintf("process %q did not complete successfully: exit code: %d", strings.Join(e.Args, " "), e.Code)
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	if e.OutOfMemory {
		s += fmt.Sprintf(": killed, out of memory: the limit is %s, %s were used (--memory)", mebibytes(e.Memory), mebibytes(e.Peak))
	}
	return s
}

// mebibytes is a size as people read it.
func mebibytes(n int64) string { return fmt.Sprintf("%.4gMiB", float64(n)/(1<<20)) }

// SetupError says that the sandbox could not be made; the process never ran.
type SetupError struct {
	Step string // what was being done, like "mount /proc"
	Err  error
}

func (e *SetupError) Error() string { return "set up sandbox: " + e.Step + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *SetupError) Unwrap() error { return e.Err }

// MountPoint is a path that must exist in a root before [Runner.Run].
type MountPoint struct {
	Path string // absolute in the root, symlinks not resolved
	Dir  bool
}

// Ground is what isolation this process found.
type Ground struct {
	Name     string // "root", "rootless", "chroot", or "none": [Runner.Run] will not work here
	SingleID bool   // only one user ID exists: ownership cannot be put on disk
	Reason   string // why this ground and not a better one
}

// Run runs p and waits for it. It returns nil if the process exited with 0,
// *[ExitError] if it did not, *[SetupError] if it could not be started, and
// the context's error if that ended it. When Run returns, no process of the
// sandbox is left and nothing more is written. With more, the child of the
// next process of this kind is started while this one runs.
func (r *Runner) Run(ctx context.Context, p Process, more bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := check(p); err != nil {
		return err
	}
	switch p.Ground.Name {
	case groundNone:
		return &SetupError{Step: "start", Err: fmt.Errorf("steps cannot run here: %s", p.Ground.Reason)}
	case groundChroot:
		return r.runChroot(ctx, p)
	}
	// The kernel sends the death signal when the thread that made the child
	// ends, so this thread has to stay for as long as the child does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := r.take(roleOf(p))
	if c == nil {
		var err error
		if c, err = spawn(roleOf(p)); err != nil {
			return &SetupError{Step: "start", Err: refused(err)}
		}
		c.bind()
	}
	defer c.close()
	c.attach(p)
	if c.unbound != nil {
		c.kill()
		return c.unbound
	}
	stop := context.AfterFunc(ctx, func() { c.process.Kill() })
	defer stop()
	// While the child starts, there is time to prepare what it will read.
	h, err := r.prepare(p)
	if err != nil {
		c.kill()
		return err
	}
	c.instruct(h)
	if more {
		r.ahead(roleOf(p))
	}
	started, failure := readReport(c.report)
	state, err := c.process.Wait()
	c.finish()
	switch {
	case err != nil:
		return &SetupError{Step: "wait", Err: err}
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case failure != nil:
		return failure.error(p.Args)
	case !started:
		return &SetupError{Step: "start", Err: fmt.Errorf("child ended early: %s", state)}
	}
	return c.written(c.bounds.explain(p, exitError(p.Args, state.Sys().(syscall.WaitStatus))))
}

// running is a started child and this side of its pipes.
type running struct {
	role    role
	process *os.Process
	order   *os.File // the handover goes in here
	report  *os.File // set-up errors come out here, then end of file at exec
	status  *os.File // on the chroot ground, how the process ended
	outputs []*output

	bounds  *bounds // it is in these cgroups
	nodes   bool    // see [Process.bound]
	unbound error   // why it is not
	binding sync.WaitGroup
}

// role is what has to be known of a process when its child starts.
type role struct {
	keeper   bool
	offline  bool
	out, err bool // has an output of its own
	joint    bool // standard error goes where standard output goes
	limits   Limits
	insecure bool
}

func roleOf(p Process) role {
	joint := same(p.Stdout, p.Stderr)
	return role{
		keeper: p.Ground.Name == groundChroot, offline: p.Network == NetworkNone,
		out: p.Stdout != nil, err: p.Stderr != nil && !joint, joint: joint, limits: p.Limits, insecure: p.Insecure,
	}
}

// spawn starts a child. It does nothing before it is instructed.
func spawn(r role) (*running, error) {
	var t theirs
	defer t.close()
	c := &running{role: r}
	null := t.null()
	stdout, stderr := null, null
	if r.out {
		stdout = t.output(c)
	}
	if r.joint {
		stderr = stdout
	}
	if r.err {
		stderr = t.output(c)
	}
	var order, report *os.File
	order, c.order = t.pipe()
	c.report, report = t.pipe()
	t.files = append(t.files, null, order, report)
	files, name, flags := []*os.File{null, stdout, stderr, order, report}, childName, namespaces(r.offline)
	if r.keeper {
		var status *os.File
		c.status, status = t.pipe()
		t.files = append(t.files, status)
		files, name, flags = append(files, status), keeperName, 0
	}
	err := t.err
	if err == nil {
		c.process, err = os.StartProcess(self, []string{name}, &os.ProcAttr{
			// Not the child's environment but its Go runtime's: it lives for
			// milliseconds, collecting garbage would be a waste.
			Env:   []string{"GOGC=off", "GOMAXPROCS=1", "GODEBUG=containermaxprocs=0,asyncpreemptoff=1"},
			Files: files,
			Sys:   attributes(flags),
		})
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// bind puts the child into the cgroups of its role, which takes the kernel longer than all else about a short step.
func (c *running) bind() {
	c.bounds, c.nodes, c.unbound = Process{Limits: c.role.limits, Insecure: c.role.insecure}.bound()
	if c.unbound != nil {
		return
	}
	err := c.bounds.put(c.process.Pid)
	if err != nil && c.role.limits != (Limits{}) {
		c.unbound = &SetupError{Step: "limit", Err: err}
	} else if err != nil {
		c.nodes = false
	}
}

// attach lets what the child prints go where p wants it.
func (c *running) attach(p Process) {
	to := []io.Writer{p.Stdout, p.Stderr}
	if !c.role.out {
		to = to[1:]
	}
	for i, o := range c.outputs {
		o.to = to[i]
		go o.pump()
	}
}

// kill ends a child that is to be no process.
func (c *running) kill() {
	c.process.Kill()
	c.process.Wait()
	c.finish()
}

// theirs are the files that only the child keeps. After an error nothing more
// is opened.
type theirs struct {
	files []*os.File
	err   error
}

func (t *theirs) null() (f *os.File) {
	f, t.err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
	return f
}

func (t *theirs) pipe() (r, w *os.File) {
	if t.err == nil {
		r, w, t.err = os.Pipe()
	}
	return r, w
}

func (t *theirs) output(c *running) *os.File {
	r, w := t.pipe()
	t.files = append(t.files, w)
	c.outputs = append(c.outputs, &output{from: r, done: make(chan struct{})})
	return w
}

func (t *theirs) close() {
	for _, f := range t.files {
		f.Close() // nil files say so, and that is all
	}
}

// instruct sends the child its order.
func (c *running) instruct(h *handover) {
	h.Version1, h.NoDevices = c.bounds.version1(), !c.nodes
	// A child that dies before it has read all says why on its report.
	_ = h.send(c.order)
}

// attributes are those of a child. A keeper outlives filo, to end what it keeps.
func attributes(flags uintptr) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Cloneflags: flags, Setsid: true}
	if flags != 0 {
		a.Pdeathsig = syscall.SIGKILL
	}
	return a
}

func namespaces(offline bool) uintptr {
	flags := uintptr(syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS)
	if offline {
		flags |= syscall.CLONE_NEWNET
	}
	return flags
}

// finish waits until all output is written. With its first process the whole
// pid namespace is gone, so all there will ever be is in the pipes.
func (c *running) finish() {
	for _, o := range c.outputs {
		o.finish()
	}
}

// written turns an end that looked like success into an error if the output
// did not reach its writer.
func (c *running) written(err error) error {
	for _, o := range c.outputs {
		if err == nil && o.err != nil {
			err = fmt.Errorf("write output: %w", o.err)
		}
	}
	return err
}

func (c *running) close() {
	for _, f := range []*os.File{c.order, c.report, c.status} {
		f.Close()
	}
	for _, o := range c.outputs {
		o.from.Close()
	}
	c.bounds.close()
}

// same reports whether two writers are one; writers of types that cannot be
// compared are not.
func same(a, b io.Writer) bool {
	if a == nil || b == nil || !reflect.TypeOf(a).Comparable() {
		return false
	}
	return a == b
}

func exitError(args []string, status syscall.WaitStatus) error {
	switch {
	case status.Signaled():
		return &ExitError{Args: args, Code: 128 + int(status.Signal()), Signal: status.Signal()}
	case status.ExitStatus() != 0:
		return &ExitError{Args: args, Code: status.ExitStatus()}
	}
	return nil
}
