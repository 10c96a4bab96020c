package sandbox

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// init is where a child of [Runner.Run] or [Enter] leaves the road of the program that
// it is started from. It does so here rather than in main because Go
// initializes packages that are ready in the order of their paths: most of the
// program's others come later, and take longer than all that a child has to do.
// That holds as long as this package imports few that are slow or late, such as
// encoding/gob, os/exec, os/user, net and regexp. TestFirst sees to it.
func init() { begun() }

// begun ends a child started by [Runner.Run] as the process of its sandbox, and makes
// one started by [Enter] wait until its user namespace is ready. In other
// processes it does nothing.
func begun() {
	switch {
	case len(os.Args) == 0:
	case os.Args[0] == childName:
		// Namespaces are the process's, but capabilities, users and seccomp
		// belong to the thread: it must be the one that executes.
		runtime.LockOSThread()
		tell(become())
		os.Exit(1)
	case os.Args[0] == keeperName:
		runtime.LockOSThread()
		if err := keep(); err != nil {
			tell(err)
			os.Exit(1)
		}
		os.Exit(0)
	case os.Args[0] == actorName:
		runtime.LockOSThread()
		tell(act())
		os.Exit(1)
	case os.Args[0] == probeName:
		os.Exit(probed())
	default:
		awaitMaps()
	}
}

// begin reads the order in a child that is to become the process.
func begin() (*handover, error) {
	order := os.NewFile(orderFD, "order")
	unix.CloseOnExec(reportFD)
	h, err := receive(order)
	order.Close()
	if err != nil {
		return nil, at("read the order", err)
	}
	// Whatever filo was started with, and what is opened from here on, is not
	// the process's.
	if err := unix.CloseRange(orderFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return nil, at("close inherited files", err)
	} else if err != nil {
		closeOnExec() // a filter that is older than the call
	}
	unix.Umask(0)
	return h, nil
}

// closeOnExec is the close_range of old kernels.
func closeOnExec() {
	names, _ := os.ReadDir("/proc/self/fd")
	for _, n := range names {
		if fd, err := strconv.Atoi(n.Name()); err == nil && fd >= orderFD {
			unix.CloseOnExec(fd)
		}
	}
}

// become turns this process into the one it was made for. It returns only if
// that cannot be done.
func become() error {
	h, err := begin()
	if err != nil {
		return err
	}
	if err := enterRoot(h); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(h.Process.Hostname)); err != nil {
		return at("set hostname", err)
	}
	if h.Process.Network == NetworkNone {
		if err := loopbackUp(); err != nil {
			return at("bring up lo", err)
		}
	}
	return h.become()
}

// become executes the process in the root that this one has.
func (h *handover) become() error {
	dir, err := workingDirectory(h.Process.Dir, h.Process.UID, h.Process.GID)
	if err != nil {
		return at("open working directory "+h.Process.Dir, err)
	}
	// With root's rights, as in other builders: the user may not be allowed to.
	if err := unix.Fchdir(dir); err != nil {
		return at("change to working directory "+h.Process.Dir, err)
	}
	unix.Umask(0o022)
	heedSignals()
	giveOutput(h.Process.UID)
	if err := dropPowers(h.Process, h.Filter); err != nil {
		return err
	}
	return execute(h.Process)
}

// enterRoot makes every mount while the host is still in sight, then leaves
// the host behind and puts them in place inside the root, where no path leads
// out.
func enterRoot(h *handover) error {
	// Only now: the root of the namespace is the cgroup of this moment, that of the process.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return at("make cgroup namespace", err)
	}
	// Nothing mounted here may appear on the host.
	private := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &private); err != nil {
		return at("make mounts private", kernelTooOld(err))
	}
	// What is mounted over / covers nothing: paths start below it.
	anchor, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return at("open /", err)
	}
	s, err := newStage(anchor)
	if err != nil {
		return err
	}
	s.noDevices = h.NoDevices
	root, err := s.root(h.Process.Root)
	if err == nil {
		err = s.deaden(root)
	}
	if err != nil {
		return at("mount root", err)
	}
	std, err := s.standard(h)
	if err != nil {
		return err
	}
	extra, err := s.mounts(h.Process.Mounts)
	if err != nil {
		return err
	}
	if err := attach(root, anchor); err != nil {
		return at("attach root", err)
	}
	if err := pivot(root); err != nil {
		return at("change root", err)
	}
	in, err := openInside(root)
	if err != nil {
		return at("open root", err)
	}
	if err := in.place(std); err != nil {
		return err
	}
	if !h.Process.Insecure {
		if err := in.mask(s.empty); err != nil {
			return err
		}
	}
	return in.place(extra)
}

// pivot makes root the root and unmounts the old one, which for a moment lies
// on top of the new one, and on it whatever was mounted over the host's root:
// the stage, and in odd containers more. From the root, ".." leads to the
// topmost of them, so only when it leads nowhere is the host out of reach.
func pivot(root int) error {
	if err := unix.Fchdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		switch {
		case errors.Is(err, unix.EPERM):
			return cover()
		case errors.Is(err, unix.EINVAL):
			return fmt.Errorf("%w: an initramfs as root cannot be left behind", err)
		}
		return err
	}
	for range 32 {
		if over, err := overmounted(root); err != nil || !over {
			return err
		}
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return err
		}
	}
	return errors.New("old root cannot be unmounted")
}

// cover is pivot where a filter knows mounts and no pivot_root, as Docker's does with
// SYS_ADMIN added. The current directory lies on top of the root of all mounts: from there
// no path leads below, and whoever may not unmount it cannot get there.
func cover() error {
	if err := unix.Chroot("."); err != nil {
		return err
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	if over, err := overmounted(root); err != nil || over {
		return cmp.Or(err, errors.New("the old root can be reached"))
	}
	return nil
}

func overmounted(root int) (bool, error) {
	top, err := unix.Open("/..", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(top)
	a, err := mountID(top)
	if err != nil {
		return false, err
	}
	b, err := mountID(root)
	return a != b, err
}

// heedSignals undoes that filo was started deaf to these, by nohup or in the
// background of a script. What Go catches is back at its default once the
// process executes, what is ignored is not.
func heedSignals() {
	var byDefault [4]uint64 // struct sigaction of the kernel: SIG_DFL, no flags, no mask
	for _, s := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT} {
		unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
	}
}

// giveOutput lets the user open /dev/stdout and /dev/stderr, which are pipes of
// root's. Without it only these two fail, so an error is no reason to stop.
func giveOutput(uid int) {
	for fd := 1; fd <= 2; fd++ {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
			unix.Fchown(fd, uid, -1)
		}
	}
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// failed is a step of the set-up that did not work.
type failed struct {
	step string
	err  error
}

func (f *failed) Error() string { return f.step + ": " + f.err.Error() }

func (f *failed) Unwrap() error { return f.err }

// at names the step an error came from; without an error there is none.
func at(step string, err error) error {
	if err == nil {
		return nil
	}
	return &failed{step, err}
}

func kernelTooOld(err error) error {
	if errors.Is(err, unix.ENOSYS) {
		return &cause{text: "Linux 5.12 or newer is needed", errno: unix.ENOSYS}
	}
	return err
}

// tell sends an error to the parent.
func tell(err error) {
	r := report{Step: "start", Text: err.Error()}
	var f *failed
	if errors.As(err, &f) {
		r.Step, r.Text = f.step, f.err.Error()
	}
	var x *notExecutable
	if errors.As(err, &x) {
		r.Code = x.code
	}
	errors.As(err, &r.Errno)
	syscall.Write(reportFD, encode(nil, reflect.ValueOf(r)))
}
