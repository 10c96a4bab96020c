// Package sandbox runs one process isolated in a root filesystem: namespaces,
// an overlay mounted for the process alone, Docker's capabilities, masked
// paths and seccomp profile.
//
// It knows nothing of Dockerfiles, layers or caches, and it never writes into
// the root it shows: whatever it makes there is a mount, so the overlay's
// upper holds only what the process itself changed. The caller guarantees that
// the paths of [MountPoints] exist.
//
// Start at [Run], the parent's half: it starts this program again, hands the
// process over through a pipe and waits. [Init] is the child's half: it mounts
// (mount.go, dev.go, target.go), pivots, drops powers (caps.go, seccomp.go)
// and executes (exec.go). [Enter] (enter.go, idmap.go) finds the ground before
// any of this: root as it is, or a user namespace in which filo is root.
package sandbox

import (
	"context"
	"fmt"
	"io"
	"strings"
	"syscall"
)

// Root is a stack of unpacked trees shown as one filesystem.
type Root struct {
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
	Data     []byte // Data: the file's bytes
	Target   string // absolute; symlinks are resolved inside the process's root
	ReadOnly bool
	Size     int64  // Tmpfs: limit in bytes, 0 is the kernel's default
	Mode     uint32 // Tmpfs, Data: permission bits; 0 is 01777 for Tmpfs and 0400 for Data
	UID, GID int    // Tmpfs, Data
}

// Process is a program and all it may see. The zero values mean Docker's
// defaults.
type Process struct {
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
	Insecure       bool // all capabilities, no seccomp, nothing masked
	Stdout, Stderr io.Writer
}

// ExitError says that the process ran and failed, or that its command could
// not be executed (codes 127 and 126, with Reason set).
type ExitError struct {
	Args   []string
	Code   int            // as a shell shows it: 128+n for signal n
	Signal syscall.Signal // what ended the process, 0 if it exited by itself
	Reason string         // why the command was never executed, "" if it was
}

func (e *ExitError) Error() string {
	s := fmt.Sprintf("process %q did not complete successfully: exit code: %d", strings.Join(e.Args, " "), e.Code)
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	return s
}

// SetupError says that the sandbox could not be made; the process never ran.
type SetupError struct {
	Step string // what was being done, like "mount /proc"
	Err  error
}

func (e *SetupError) Error() string { return "set up sandbox: " + e.Step + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *SetupError) Unwrap() error { return e.Err }

// MountPoint is a path that must exist in a root before [Run].
type MountPoint struct {
	Path string // absolute in the root, symlinks not resolved
	Dir  bool
}

// Ground is what isolation this process found.
type Ground struct {
	Name     string // "root" or "rootless"
	SingleID bool   // only one user ID exists: ownership cannot be put on disk
	Reason   string // why this ground and not a better one
}

// MountPoints returns the paths [Run] will mount on: they must exist in the
// root, except those below an earlier mount of the process, which are left out.
func MountPoints(p Process) []MountPoint { return nil }

// Init must be the first call in main. In a child started by [Run] or [Enter]
// it does that child's work and does not return; otherwise it does nothing.
func Init() {}

// Enter finds the best isolation that works here, or the one asked for: "" or
// "auto", "root", "rootless", "chroot". It may start this program again in a
// user namespace; then it returns only there, and the first process ends with
// the exit status of the second.
func Enter(isolation string) (Ground, error) { return Ground{}, nil }

// Run runs p and waits for it. It returns nil if the process exited with 0,
// *[ExitError] if it did not, *[SetupError] if it could not be started, and
// the context's error if that ended it. When Run returns, no process of the
// sandbox is left.
func Run(ctx context.Context, p Process) error { return nil }
