package sandbox

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
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

// begun is all of the life of children started by [Runner.Run], and makes one started by [Enter] wait until its user
// namespace is ready. In other processes it does nothing.
func begun() {
	switch {
	case len(os.Args) == 0:
	case os.Args[0] == launcherName:
		// Namespaces belong to the thread, and the death of the thread that
		// made a process is that of the process.
		runtime.LockOSThread()
		if serve() != nil {
			os.Exit(1) // filo will find out
		}
		os.Exit(0)
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

// begin reads the order in a child that is to become the process itself, which is so on the chroot ground.
func begin() (*handover, error) {
	order := os.NewFile(orderFD, "order")
	unix.CloseOnExec(reportFD)
	h := &handover{}
	err := receive(order, h)
	order.Close()
	if err != nil {
		return nil, at("read the order", err)
	}
	closeOnExec(orderFD)
	unix.Umask(0)
	return h, nil
}

// become adds the calls by which a child becomes the process, in the root and the working directory that it has.
func (h *handover) become(q *sequence, sameGroups bool) error {
	q.add("set umask", unix.SYS_UMASK, 0o22)
	q.heedSignals()
	if err := q.dropPowers(h.Process, h.Filter, sameGroups); err != nil {
		return err
	}
	return q.execute(h.Process)
}

// enterDirectory makes the working directory of the process that of this one, or adds the calls by which a child does it.
func (h *handover) enterDirectory(q *sequence) error {
	p := h.Process
	if inProc(p.Dir) {
		// Not chdir: links in there lead to the files that the launcher has open, the host's root among them.
		dir := q.openInside("open working directory "+p.Dir, p.Dir, unix.O_DIRECTORY)
		q.add("change to working directory "+p.Dir, unix.SYS_FCHDIR, dir)
		return nil
	}
	fd, err := workingDirectory(p.Dir, p.UID, p.GID)
	if err != nil {
		return at("open working directory "+p.Dir, err)
	}
	// With root's rights, as in other builders: the user may not be allowed to.
	if err := unix.Fchdir(fd); err != nil {
		return at("change to working directory "+p.Dir, err)
	}
	return nil
}

// enterRoot makes every mount while the host is still in sight, then leaves
// the host behind and puts them in place inside the root, where no path leads
// out. /proc, and what goes there, is left to the process.
func enterRoot(h *handover) (*procMount, error) {
	// Nothing mounted here may appear on the host.
	private := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &private); err != nil {
		return nil, at("make mounts private", kernelTooOld(err))
	}
	// What is mounted over / covers nothing: paths start below it.
	anchor, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, at("open /", err)
	}
	s, err := newStage(anchor)
	if err != nil {
		return nil, err
	}
	s.noDevices = h.NoDevices
	root, err := s.root(h.Process.Root)
	if err == nil {
		err = s.deaden(root)
	}
	if err != nil {
		return nil, at("mount root", err)
	}
	std, err := s.standard(h)
	if err != nil {
		return nil, err
	}
	proc, err := s.proc(h.Process.Insecure)
	if err != nil {
		return nil, at("mount /proc", err)
	}
	extra, err := s.mounts(h.Process.Mounts)
	if err != nil {
		return nil, err
	}
	if err := attach(root, anchor); err != nil {
		return nil, at("attach root", err)
	}
	if err := pivot(root); err != nil {
		return nil, at("change root", err)
	}
	in, err := openInside(root)
	if err != nil {
		return nil, at("open root", err)
	}
	if proc.place, err = in.target("/proc", true); err != nil {
		return nil, at("mount /proc", err)
	}
	if err := in.place(std); err != nil {
		return nil, err
	}
	if !h.Process.Insecure {
		if err := in.mask(s.empty); err != nil {
			return nil, err
		}
		if proc.null, err = openIn(in.fd, "/dev/null", 0); err != nil { // before a mount of the process's own hides it
			return nil, at("hide files", err)
		}
	}
	extra = slices.DeleteFunc(extra, func(p placement) bool {
		late := inProc(p.target)
		if late {
			proc.extra = append(proc.extra, p)
		}
		return late
	})
	return proc, in.place(extra)
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

// heedSignals adds the calls by which all signals do what they do by default, even if filo was started deaf to some, by
// nohup or in the background of a script, and none is blocked.
func (q *sequence) heedSignals() {
	byDefault, none := new([4]uint64), new(uint64) // struct sigaction of the kernel: SIG_DFL, no flags, no mask
	for s := range 64 {
		q.add("heed signals", unix.SYS_RT_SIGACTION, s+1, unsafe.Pointer(byDefault), 0, 8)
		q.tolerate(0, unix.EINVAL) // two of them cannot be caught
	}
	q.add("heed signals", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, unsafe.Pointer(none), 0, 8)
}

// giveOutput lets the user open /dev/stdout and /dev/stderr, which are pipes of
// root's. Without it only these two fail, so an error is no reason to stop.
func giveOutput(fds []int, uid int) {
	for _, fd := range fds {
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
