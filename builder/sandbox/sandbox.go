// Package sandbox runs one process isolated in a root filesystem: namespaces,
// an overlay mounted for the process alone, Docker's capabilities, masked
// paths and seccomp profile.
//
// It knows nothing of Dockerfiles, layers or caches, and it never writes into
// the root it shows: whatever it makes there is a mount, so the overlay's
// upper holds only what the process itself changed. The caller guarantees that
// the paths of [MountPoints] exist.
//
// Start at [Runner.Run], filo's half: it starts this program again as a launcher (runner.go), hands the process over
// and waits. The launcher's half is [serve] in launcher.go: it mounts (init.go, mount.go, dev.go, target.go) and
// makes the list of system calls (sequence.go) by which a child of its drops powers (powers.go) and executes (exec.go).
// What the two say to each other is in handover.go and wire.go. [Enter] (enter.go, idmap.go) finds the ground before any of
// this: root as it is, a user namespace in which filo is root, or a container
// where nothing but chroot works (chroot.go, scene.go).
package sandbox

import (
	"context"
	"fmt"
	"io"
	"reflect"
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
	DNS            DNS
	ShmSize        int64 // bytes of /dev/shm, 0 is 64 MiB
	Ulimits        []Ulimit
	Limits         Limits    // see [Limits.Try]
	Insecure       bool      // all capabilities, no seccomp, nothing masked
	Stdout, Stderr io.Writer // nil throws the output away; written to by one goroutine each, or one for both when equal
}

// DNS says how a process finds the addresses of names. What is empty is as on the machine.
type DNS struct{ Servers, Search, Options []string }

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
	Crowded     bool   // it, or a process it started, wanted to start one more than it may
	PIDs        int64  // that limit
}

func (e *ExitError) Error() string {
	s := fmt.Sprintf("process %q did not complete successfully: exit code: %d", strings.Join(e.Args, " "), e.Code)
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	if e.OutOfMemory {
		s += fmt.Sprintf(": killed, out of memory: the limit is %s, %s were used (--memory)", mebibytes(e.Memory), mebibytes(e.Peak))
	}
	if e.Crowded {
		s += fmt.Sprintf(": it started too many processes: the limit is %d (--pids-limit)", e.PIDs)
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
// sandbox is left and nothing more is written. With more, a process like it is
// likely to follow.
func (r *Runner) Run(ctx context.Context, p Process, more bool) error {
	gone, err := r.Execute(ctx, p, more)
	gone()
	return err
}

// Execute is Run, but mounts of the process may be left when it returns: nobody sees them, but it takes the kernel time to
// let go of all that it remembers of many files. The caller calls gone, once at least, which waits until they are gone.
func (r *Runner) Execute(ctx context.Context, p Process, more bool) (gone func(), err error) {
	gone = func() {}
	if err := ctx.Err(); err != nil {
		return gone, err
	}
	if err := check(p); err != nil {
		return gone, err
	}
	switch p.Ground.Name {
	case groundNone:
		return gone, &SetupError{Step: "start", Err: fmt.Errorf("steps cannot run here: %s", p.Ground.Reason)}
	case groundChroot:
		return gone, r.runChroot(ctx, p)
	}
	l, err := r.take(roleOf(p))
	if err != nil {
		return gone, err
	}
	stop, answered := l.watch(ctx), false
	gone = sync.OnceFunc(func() {
		again := answered && l.comesHome()
		stop()
		r.put(l, again && ctx.Err() == nil, more)
	})
	h, err := r.prepare(p)
	if err != nil {
		return gone, err
	}
	h.Version1, h.NoDevices, h.Limited = l.bounds.version1(), !l.nodes, !l.role.lasts()
	out, err := newOutputs(p)
	if err != nil {
		return gone, &SetupError{Step: "start", Err: err}
	}
	defer out.close()
	a, err := l.run(h, out)
	out.finish()
	answered = err == nil
	switch {
	case ctx.Err() != nil:
		return gone, context.Cause(ctx)
	case err != nil:
		return gone, &SetupError{Step: "start", Err: fmt.Errorf("launcher ended early: %w", err)}
	}
	return gone, out.written(l.outcome(p, a))
}

// outcome is the error of a process that ended like this, or of one that could not start.
func (l *running) outcome(p Process, a answer) error {
	if a.Failed {
		return a.Failure.error(p.Args)
	}
	err := l.bounds.explain(p, exitError(p.Args, syscall.WaitStatus(a.Status)))
	if !a.Started {
		return &SetupError{Step: "start", Err: fmt.Errorf("child ended early: %w", err)}
	}
	return err
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
