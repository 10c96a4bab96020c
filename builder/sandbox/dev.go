package sandbox

import (
	"errors"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hidden are paths that would tell a process about the machine, or let it
// read the kernel's memory: they show nothing.
var hidden = [...]string{
	"/proc/acpi",
	"/proc/asound",
	"/proc/interrupts",
	"/proc/kcore",
	"/proc/keys",
	"/proc/latency_stats",
	"/proc/timer_list",
	"/proc/timer_stats",
	"/proc/sched_debug",
	"/proc/scsi",
	"/sys/firmware",
	"/sys/devices/virtual/powercap",
}

// hiddenDirs are those of them in /proc that are directories.
var hiddenDirs = [...]string{"/proc/acpi", "/proc/asound", "/proc/scsi"}

// frozen are paths by which a process could change the machine.
var frozen = [...]string{
	"/proc/bus",
	"/proc/fs",
	"/proc/irq",
	"/proc/sys",
	"/proc/sysrq-trigger",
}

// devices are the nodes of /dev.
var devices = [...]device{
	{"null", unix.S_IFCHR, 1, 3},
	{"zero", unix.S_IFCHR, 1, 5},
	{"full", unix.S_IFCHR, 1, 7},
	{"random", unix.S_IFCHR, 1, 8},
	{"urandom", unix.S_IFCHR, 1, 9},
	{"tty", unix.S_IFCHR, 5, 0},
}

// insecureDevices are added for a process that may do everything.
var insecureDevices = [...]device{
	{"kmsg", unix.S_IFCHR, 1, 11},
	{"cuse", unix.S_IFCHR, 10, 203},
	{"fuse", unix.S_IFCHR, 10, 229},
	{"kvm", unix.S_IFCHR, 10, 232},
	{"net/tun", unix.S_IFCHR, 10, 200},
	{"loop-control", unix.S_IFCHR, 10, 237},
}

// devLinks are the symlinks of /dev.
var devLinks = [...]struct{ name, to string }{
	{"fd", "/proc/self/fd"},
	{"stdin", "/proc/self/fd/0"},
	{"stdout", "/proc/self/fd/1"},
	{"stderr", "/proc/self/fd/2"},
	{"ptmx", "pts/ptmx"},
}

const quiet = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NODEV

// standard makes the mounts that every process has, but for /proc.
func (s *stage) standard(h *handover) ([]placement, error) {
	p := h.Process
	sys, err := sysfs(p.Insecure)
	if err != nil {
		return nil, at("mount /sys", err)
	}
	dev, borrowed, err := devfs(p.Insecure, h.NoDevices)
	if err == nil {
		err = s.deaden(dev)
	}
	if err != nil {
		return nil, at("mount /dev", err)
	}
	ps := []placement{
		{mount: sys, target: "/sys", dir: true},
		{mount: dev, target: "/dev", dir: true},
	}
	ps = append(ps, cgroups(p, h.Version1)...)
	ps = append(ps, borrowed...)
	inDev, err := insideDev(p)
	if err != nil {
		return nil, err
	}
	ps = append(ps, inDev...)
	for _, f := range []struct {
		name string
		data []byte
	}{{"/etc/hosts", h.Hosts}, {"/etc/resolv.conf", h.Resolv}} {
		fd, err := s.file(path.Base(f.name), f.data, 0o644, 0, 0, true)
		if err == nil {
			err = restrict(fd, unix.MOUNT_ATTR_NOEXEC)
		}
		if err != nil {
			return nil, at("mount "+f.name, err)
		}
		ps = append(ps, placement{mount: fd, target: f.name})
	}
	return ps, nil
}

// cgroups shows the process the cgroups it is in: programs look there for their limits. What
// cannot be shown is left out.
func cgroups(p Process, version1 []string) (ps []placement) {
	const at = "/sys/fs/cgroup"
	if len(version1) == 0 {
		if fd, err := detached("cgroup2", quiet|writable(p.Insecure), "source=cgroup"); err == nil {
			ps = append(ps, placement{mount: fd, target: at, dir: true, optional: true})
		}
		return ps
	}
	top, err := detached("tmpfs", quiet, "source=tmpfs", "mode=0755", "size=4096")
	if err != nil {
		return nil
	}
	ps = append(ps, placement{mount: top, target: at, dir: true, optional: true})
	for _, controller := range version1 {
		fd, err := detached("cgroup", quiet|writable(p.Insecure), "source=cgroup", controller)
		if err == nil && unix.Mkdirat(top, controller, 0o755) == nil {
			ps = append(ps, placement{mount: fd, target: at + "/" + controller, dir: true, optional: true})
		}
	}
	return ps
}

func writable(yes bool) int {
	if yes {
		return 0
	}
	return unix.MOUNT_ATTR_RDONLY
}

// procMount is what is needed to mount /proc, which must be done in the pid namespace that it shows: by the process.
type procMount struct {
	place  int   // where it goes
	spare  int   // a mount of the /proc that we have
	blanks []int // a mount of an empty directory for each one that is hidden
	null   int   // /dev/null
	bare   bool  // nothing is hidden
	extra  []placement
}

// inProc says whether a path leads to what only the process has.
func inProc(name string) bool {
	name = path.Clean("/" + name)
	return name == "/proc" || strings.HasPrefix(name, "/proc/")
}

// proc prepares it.
func (s *stage) proc(insecure bool) (*procMount, error) {
	p := &procMount{place: -1, null: -1, bare: insecure}
	var err error
	if p.spare, err = clone(unix.AT_FDCWD, "/proc", unix.AT_RECURSIVE); err == nil {
		err = restrict(p.spare, quiet)
	}
	for range hiddenDirs {
		if err != nil || insecure {
			break
		}
		var blank int
		if blank, err = s.blank(); err == nil {
			p.blanks = append(p.blanks, blank)
		}
	}
	return p, err
}

// mount adds the calls. In a container that hides parts of its /proc no new one may be made; then the process sees what the
// container does.
func (p *procMount) mount(q *sequence) {
	const step = "mount /proc"
	fs := q.add(step, unix.SYS_FSOPEN, "proc", unix.FSOPEN_CLOEXEC)
	q.tolerate(4, unix.EPERM)
	q.add(step, unix.SYS_FSCONFIG, fs, unix.FSCONFIG_SET_STRING, "source", "proc", 0)
	q.add(step, unix.SYS_FSCONFIG, fs, unix.FSCONFIG_CMD_CREATE, 0, 0, 0)
	q.tolerate(2, unix.EPERM)
	fresh := q.add(step, unix.SYS_FSMOUNT, fs, unix.FSMOUNT_CLOEXEC, quiet)
	q.tolerate(1, unix.EPERM)
	const onto = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
	q.add(step, unix.SYS_MOVE_MOUNT, fresh, "", p.place, "", onto)
	q.skip(4)
	q.add(step, unix.SYS_MOVE_MOUNT, p.spare, "", p.place, "", onto)
	// In a user namespace there may be a new one only beside another one that hides nothing.
	fresh = q.add(step, unix.SYS_FSMOUNT, fs, unix.FSMOUNT_CLOEXEC, quiet)
	q.tolerate(2, unix.EPERM, unix.EINVAL)
	q.add(step, unix.SYS_UMOUNT2, "/proc", unix.MNT_DETACH)
	q.add(step, unix.SYS_MOVE_MOUNT, fresh, "", p.place, "", onto)
	if !p.bare {
		p.mask(q)
	}
	for _, e := range p.extra {
		step := "mount " + e.target
		place := q.openInside(step, e.target, 0)
		q.add(step, unix.SYS_MOVE_MOUNT, e.mount, "", place, "", onto)
	}
}

// mask adds the calls that hide and freeze parts of /proc.
func (p *procMount) mask(q *sequence) {
	for _, name := range frozen {
		step := "make " + name + " read-only"
		m := q.add(step, unix.SYS_OPEN_TREE, unix.AT_FDCWD, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		q.tolerate(2, unix.ENOENT)
		set := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		q.add(step, unix.SYS_MOUNT_SETATTR, m, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, unsafe.Pointer(set), unsafe.Sizeof(*set))
		q.add(step, unix.SYS_MOVE_MOUNT, m, "", unix.AT_FDCWD, name, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	blanks := p.blanks
	for _, name := range hidden {
		if !strings.HasPrefix(name, "/proc/") {
			continue
		}
		var over any
		if slices.Contains(hiddenDirs[:], name) {
			over, blanks = blanks[0], blanks[1:]
		} else {
			over = q.add("hide "+name, unix.SYS_OPEN_TREE, p.null, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
		}
		q.add("hide "+name, unix.SYS_MOVE_MOUNT, over, "", unix.AT_FDCWD, name, unix.MOVE_MOUNT_F_EMPTY_PATH)
		q.tolerate(0, unix.ENOENT)
	}
}

// sysfs belongs to a network namespace: in a user namespace with the host's
// network there is none to be made.
func sysfs(insecure bool) (int, error) {
	fd, err := detached("sysfs", quiet|writable(insecure), "source=sysfs")
	if !errors.Is(err, unix.EPERM) {
		return fd, err
	}
	fd, err = clone(unix.AT_FDCWD, "/sys", unix.AT_RECURSIVE)
	if err != nil {
		return -1, err
	}
	return fd, restrict(fd, uint64(quiet|writable(insecure)))
}

// devfs makes a /dev, and mounts of the host's devices where devices cannot be
// made, or would be dead.
func devfs(insecure, dead bool) (int, []placement, error) {
	const attrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_STRICTATIME
	dev, err := detached("tmpfs", attrs, "source=tmpfs", "mode=0755", "size=65536k")
	if err != nil {
		return -1, nil, err
	}
	for _, l := range devLinks {
		if err := unix.Symlinkat(l.to, dev, l.name); err != nil {
			return -1, nil, err
		}
	}
	if unix.Access("/proc/kcore", unix.F_OK) == nil {
		if err := unix.Symlinkat("/proc/kcore", dev, "core"); err != nil {
			return -1, nil, err
		}
	}
	for _, name := range []string{"pts", "shm", "mqueue"} {
		if err := unix.Mkdirat(dev, name, 0o755); err != nil {
			return -1, nil, err
		}
	}
	var borrowed []placement
	for _, d := range devices {
		err := error(unix.EPERM)
		if !dead {
			err = d.make(dev)
		}
		if errors.Is(err, unix.EPERM) {
			var p placement
			if p, err = d.borrow(dev); errors.Is(err, unix.ENOENT) {
				continue // the container we are in lacks it as well
			}
			borrowed = append(borrowed, p)
		}
		if err != nil {
			return -1, nil, &os.PathError{Op: "make", Path: d.name, Err: err}
		}
	}
	if insecure && borrowed == nil {
		return dev, nil, moreDevices(dev)
	}
	return dev, borrowed, nil
}

type device struct {
	name         string
	kind         uint32
	major, minor uint32
}

func (d device) make(dev int) error {
	return unix.Mknodat(dev, d.name, d.kind|0o666, int(unix.Mkdev(d.major, d.minor)))
}

func (d device) borrow(dev int) (placement, error) {
	fd, err := clone(unix.AT_FDCWD, "/dev/"+d.name, 0)
	if err != nil {
		return placement{}, err
	}
	return placement{mount: fd, target: "/dev/" + d.name}, create(dev, d.name, false)
}

// moreDevices adds what an insecure process may use.
func moreDevices(dev int) error {
	if err := unix.Mkdirat(dev, "net", 0o755); err != nil {
		return err
	}
	more := append([]device(nil), insecureDevices[:]...)
	for i := range freeLoop() + 8 {
		more = append(more, device{"loop" + strconv.Itoa(i), unix.S_IFBLK, 7, uint32(i)})
	}
	for _, d := range more {
		if err := d.make(dev); err != nil {
			return &os.PathError{Op: "make", Path: d.name, Err: err}
		}
	}
	return nil
}

// freeLoop returns the number of the next loop device, 0 if that is unknown.
func freeLoop() int {
	fd, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	n, err := unix.IoctlRetInt(fd, unix.LOOP_CTL_GET_FREE)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// insideDev makes the filesystems below /dev.
func insideDev(p Process) ([]placement, error) {
	pts, err := detached("devpts", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC,
		"source=devpts", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
	if errors.Is(err, unix.EINVAL) {
		// Group 5 does not exist where only one ID is mapped.
		pts, err = detached("devpts", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC,
			"source=devpts", "newinstance", "ptmxmode=0666", "mode=0620")
	}
	if err != nil {
		return nil, at("mount /dev/pts", err)
	}
	shm, err := detached("tmpfs", quiet, "source=shm", "mode=1777", "size="+strconv.FormatInt(p.ShmSize, 10))
	if err != nil {
		return nil, at("mount /dev/shm", err)
	}
	ps := []placement{
		{mount: pts, target: "/dev/pts", dir: true},
		{mount: shm, target: "/dev/shm", dir: true},
	}
	// A kernel may be built without message queues.
	if mq, err := detached("mqueue", quiet, "source=mqueue"); err == nil {
		ps = append(ps, placement{mount: mq, target: "/dev/mqueue", dir: true})
	}
	return ps, nil
}

// mask hides what a process must not see of /sys.
func (in *inside) mask(empty int) error {
	placed := false
	// When processors get hot, and thereby what others compute.
	var heat []string
	cpus, _ := os.ReadDir("/sys/devices/system/cpu")
	for _, c := range cpus {
		if strings.HasPrefix(c.Name(), "cpu") {
			heat = append(heat, path.Join("/sys/devices/system/cpu", c.Name(), "thermal_throttle"))
		}
	}
	for _, name := range append(hidden[:len(hidden):len(hidden)], heat...) {
		if strings.HasPrefix(name, "/proc/") {
			continue // see procMount
		}
		err := in.cover(name, func(int) (int, error) {
			if placed {
				return clone(empty, "", 0)
			}
			// Only what is attached somewhere can be cloned, so the first
			// directory gets the mount itself.
			placed = true
			return empty, nil
		})
		if err != nil {
			return at("hide "+name, err)
		}
	}
	return nil
}

// cover puts a mount over a path, if there is such a path.
func (in *inside) cover(name string, with func(fd int) (int, error)) error {
	fd, err := openIn(in.fd, name, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	m, err := with(fd)
	if err != nil {
		return err
	}
	return attach(m, fd)
}
