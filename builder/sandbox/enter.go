package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// enteredName and the number of a pipe are the argv[0] of a process that
	// Enter started in a user namespace.
	enteredName = "filo-rootless:"
	// probeName is the argv[0] of a child that tries to mount and ends.
	probeName = "filo-probe"
	// noMounts is the exit status of a process that Enter started in a user namespace where,
	// against expectation, nothing can be mounted.
	noMounts = 213
)

// The names of grounds.
const (
	groundRoot     = "root"
	groundRootless = "rootless"
	groundChroot   = "chroot"
	groundNone     = "none"
)

// Enter finds the best isolation that works here, or the one asked for: "" or
// "auto", "root", "rootless", "chroot". It may start this program again in a
// user namespace; then it returns only there, and the first process passes
// signals on and ends as the second does. Where nothing works, auto gives the
// ground "none": what needs no process can still be built there.
func Enter(isolation string) (Ground, error) {
	if fd, ok := entered(); ok {
		return arrive(fd, isolation)
	}
	switch isolation {
	case "", "auto":
		noRoot := rootWorks()
		if noRoot == nil {
			return Ground{Name: "root", SingleID: singleID(), Reason: "running as root"}, nil
		}
		noUser := descend()
		g := Ground{
			Name:     groundChroot,
			SingleID: singleID() || !has(unix.CAP_CHOWN),
			Reason:   fmt.Sprintf("root: %v; rootless: %v", noRoot, noUser),
		}
		if err := chrootWorks(); err != nil {
			g.Name = groundNone
			g.Reason += fmt.Sprintf("; chroot: %v", err)
		}
		return g, nil
	case "root":
		if err := rootWorks(); err != nil {
			return Ground{}, fmt.Errorf("isolation root: %w", err)
		}
		return Ground{Name: "root", SingleID: singleID(), Reason: "asked for"}, nil
	case "rootless":
		return Ground{}, fmt.Errorf("isolation rootless: %w", descend())
	case "chroot":
		if err := chrootWorks(); err != nil {
			return Ground{}, fmt.Errorf("isolation chroot: %w", err)
		}
		return Ground{Name: groundChroot, SingleID: singleID() || !has(unix.CAP_CHOWN), Reason: "asked for"}, nil
	}
	return Ground{}, fmt.Errorf("isolation %q: not one of auto, root, rootless, chroot", isolation)
}

// rootWorks says what is missing for mounting as we are.
func rootWorks() error {
	if os.Geteuid() != 0 {
		return errors.New("not running as root")
	}
	if !has(unix.CAP_SYS_ADMIN) {
		return errors.New("capability SYS_ADMIN is missing (docker run --cap-add SYS_ADMIN --security-opt apparmor=unconfined)")
	}
	if chrooted() {
		return errors.New(inChroot)
	}
	if err := mountsWork(); err != nil {
		return fmt.Errorf("mounts are refused: %w (docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined)", err)
	}
	if !confined() {
		return nil
	}
	if err := probe(); err != nil {
		return fmt.Errorf("mounts are refused: %w (docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined)", err)
	}
	return nil
}

const inChroot = "filo runs in a chroot: its root has to be a mount of its own (mount --bind DIR DIR, before chroot DIR)"

// chrooted reports whether the root is not that of a mount. Then nothing can be
// made private, nor can the root be changed.
func chrooted() bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, "/", 0, 0, &st)
	return err == nil && st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0
}

func has(c uintptr) bool {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if unix.Capget(&hdr, &data[0]) != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

// mountsWork makes a filesystem that is mounted nowhere.
func mountsWork() error {
	fd, err := detached("tmpfs", 0)
	if err != nil {
		return kernelTooOld(err)
	}
	return unix.Close(fd)
}

// confined reports whether a security module or a filter might still refuse
// what capabilities allow.
func confined() bool {
	label, _ := os.ReadFile("/proc/self/attr/current")
	l := strings.TrimRight(string(label), "\x00\n")
	return l != "" && l != "unconfined" || filtered()
}

func filtered() bool {
	b, _ := os.ReadFile("/proc/self/status")
	return strings.Contains(string(b), "\nSeccomp:\t2")
}

// probe does in a child what every sandbox does first.
func probe() error {
	p, err := os.StartProcess(self, []string{probeName}, &os.ProcAttr{
		Env:   []string{"GOGC=off"},
		Files: []*os.File{nil, nil, nil},
		Sys:   &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS},
	})
	if err != nil {
		return err
	}
	state, err := p.Wait()
	if err != nil {
		return err
	}
	if !state.Success() {
		return syscall.Errno(state.ExitCode())
	}
	return nil
}

// probed is the child's half of probe: its exit code is an errno.
func probed() int {
	private := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &private)
	if err == nil {
		var fd int
		if fd, err = detached("tmpfs", 0); err == nil {
			err = unix.MoveMount(fd, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return int(errno)
	}
	return 0
}

// singleID reports whether only one user ID exists here.
func singleID() bool {
	ranges, err := readMap("/proc/self/uid_map")
	return err == nil && len(ranges) == 1 && ranges[0].count == 1
}

// descend starts this program again in a user namespace and ends with it. It
// returns only to say why that cannot be.
func descend() error {
	// As in Run: the child dies with this thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var why []error
	for _, m := range idMaps() {
		if m.err != nil {
			why = append(why, m.err)
			continue
		}
		c, err := m.enter(joined(why))
		if err == nil {
			err = c.accompany()
		}
		why = append(why, err)
		var fatal *noUserNamespace
		if errors.As(err, &fatal) {
			return fatal
		}
	}
	return joined(why)
}

// joined makes one line of several reasons.
func joined(why []error) error {
	switch len(why) {
	case 0:
		return nil
	case 1:
		return why[0]
	}
	return fmt.Errorf("%w; %w", why[0], joined(why[1:]))
}

// entering is the program started again, as its first process sees it.
type entering struct{ process *os.Process }

// enter starts the program in a user namespace with this map.
func (m idMap) enter(better error) (*entering, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	defer r.Close()
	// The pipe keeps its number, so that every file that filo was started with
	// keeps its own: arguments may name them.
	fd, err := unix.FcntlInt(r.Fd(), unix.F_DUPFD, 3)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	p, err := os.StartProcess(self, append([]string{enteredName + strconv.Itoa(fd)}, os.Args[1:]...), &os.ProcAttr{
		Env:   os.Environ(),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
			// It has no ID until the map is written, and a user without an ID
			// would lose the namespace's capabilities when it executes.
			AmbientCaps: everyCapability(),
			Pdeathsig:   syscall.SIGKILL,
		},
	})
	if err != nil {
		return nil, &noUserNamespace{err}
	}
	c := &entering{p}
	if err := m.write(p.Pid); err != nil {
		p.Kill()
		p.Wait()
		return nil, err
	}
	g := Ground{Name: "rootless", SingleID: m.single(), Reason: m.how}
	if better != nil {
		g.Reason += " (" + better.Error() + ")"
	}
	if _, err := w.Write(encode([]byte{starting}, reflect.ValueOf(g))); err != nil {
		return nil, err
	}
	return c, nil
}

func everyCapability() (caps []uintptr) {
	for c := range uintptr(64) {
		if unix.Prctl(unix.PR_CAPBSET_READ, c, 0, 0, 0) != nil {
			break
		}
		caps = append(caps, c)
	}
	return caps
}

// accompany passes signals on until the process ends, and ends likewise. It returns if the
// process found that it cannot mount.
func (c *entering) accompany() error {
	sent := make(chan os.Signal, 16)
	signal.Notify(sent, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	go func() {
		for s := range sent {
			if (s == unix.SIGINT || s == unix.SIGQUIT) && foreground() {
				continue // the terminal has sent it to both of us
			}
			c.process.Signal(s)
		}
	}()
	state, err := c.process.Wait()
	if err != nil {
		fmt.Fprintln(os.Stderr, "wait for rootless process:", err)
		os.Exit(1)
	}
	if state.ExitCode() == noMounts {
		signal.Reset()
		return &noUserNamespace{errors.New("mounts in it are refused (docker run --security-opt apparmor=unconfined)")}
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		os.Exit(state.ExitCode())
	}
	signal.Reset(status.Signal())
	syscall.Kill(os.Getpid(), status.Signal())
	os.Exit(128 + int(status.Signal()))
	return nil
}

// foreground reports whether keys like ctrl-C reach this process.
func foreground() bool {
	tty, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(tty)
	group, err := unix.IoctlGetInt(tty, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// Entered reports whether this is the process in the user namespace that [Enter] started.
func Entered() bool {
	_, yes := entered()
	return yes
}

// entered returns the pipe of a process that Enter started.
func entered() (int, bool) {
	if len(os.Args) == 0 {
		return 0, false
	}
	s, ok := strings.CutPrefix(os.Args[0], enteredName)
	if !ok {
		return 0, false
	}
	fd, err := strconv.Atoi(s)
	return fd, err == nil && fd > 2
}

// awaitMaps waits, in a process that Enter started, until its IDs exist.
func awaitMaps() {
	fd, ok := entered()
	if !ok {
		return
	}
	unix.CloseOnExec(fd)
	var b [1]byte
	for {
		n, err := unix.Read(fd, b[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != 1 || b[0] != starting {
			os.Exit(1) // the first process tries another map, or gave up
		}
		return
	}
}

// arrive is the end of Enter, inside.
func arrive(fd int, isolation string) (Ground, error) {
	f := os.NewFile(uintptr(fd), "ground")
	defer f.Close()
	var g Ground
	b, err := io.ReadAll(f)
	if err == nil {
		_, err = decode(b, reflect.ValueOf(&g))
	}
	if err != nil {
		return Ground{}, fmt.Errorf("read ground: %w", err)
	}
	err = mountsWork()
	if err == nil {
		return g, nil
	}
	if isolation == groundRootless {
		return Ground{}, fmt.Errorf("isolation rootless: %w", refused(err))
	}
	os.Exit(noMounts) // the first process tries something else
	return Ground{}, nil
}

// noUserNamespace says why there is none, in words that help.
type noUserNamespace struct{ err error }

func (e *noUserNamespace) Unwrap() error { return e.err }

func (e *noUserNamespace) Error() string { return "make user namespace: " + refused(e.err).Error() }

// refused adds to an error of the kernel what it may take to make it go away.
func refused(err error) error {
	why := ""
	switch {
	case !slices.ContainsFunc([]error{unix.EPERM, unix.EACCES, unix.ENOSPC, unix.EINVAL, unix.ENOSYS}, func(e error) bool { return errors.Is(err, e) }):
		return err
	case chrooted():
		why = inChroot
	case errors.Is(err, unix.ENOSPC) || sysctl("user/max_user_namespaces") == "0":
		why = "set sysctl user.max_user_namespaces above 0"
	case sysctl("kernel/unprivileged_userns_clone") == "0":
		why = "set sysctl kernel.unprivileged_userns_clone to 1"
	case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
		why = "set sysctl kernel.apparmor_restrict_unprivileged_userns to 0, or give filo an AppArmor profile with userns"
	case filtered():
		why = "the container's seccomp profile forbids it: docker run --security-opt seccomp=unconfined, or in Kubernetes seccompProfile Unconfined"
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS):
		why = "the kernel has no user namespaces"
	default:
		return err
	}
	return fmt.Errorf("%w: %s", err, why)
}

func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
