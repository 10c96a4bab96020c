package sandbox

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// stage is a small tmpfs in which the launcher keeps the files that it shows:
// hosts, resolv.conf, secrets, and what masked paths are covered with. It is
// mounted over the host's root in this namespace alone, and goes with it.
type stage struct {
	fd    int
	empty int  // a mount of an empty directory
	old   bool // the kernel takes an overlay's layers only through mount(2)

	noDevices bool // see deaden
}

const (
	stageEmpty   = "empty"   // covers directories
	stageOverlay = "overlay" // where mount(2) puts an overlay for a moment
)

func newStage(anchor int) (*stage, error) {
	const attrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	// Secrets must not be swapped out either; older kernels lack the option.
	fd, err := detached("tmpfs", attrs, "source=tmpfs", "mode=0700", "noswap")
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		fd, err = detached("tmpfs", attrs, "source=tmpfs", "mode=0700")
	}
	if err == nil {
		err = attach(fd, anchor)
	}
	if err != nil {
		return nil, at("mount stage", kernelTooOld(err))
	}
	s := &stage{fd: fd}
	for _, name := range []string{stageEmpty, stageOverlay} {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			return nil, at("make stage", err)
		}
	}
	s.empty, err = s.blank()
	return s, at("make stage", err)
}

// blank makes a mount of an empty directory.
func (s *stage) blank() (int, error) {
	m, err := clone(s.fd, stageEmpty, 0)
	if err != nil {
		return -1, err
	}
	return m, restrict(m, unix.MOUNT_ATTR_RDONLY)
}

// file puts bytes into the stage and returns a mount of them.
func (s *stage) file(name string, data []byte, mode uint32, uid, gid int, readOnly bool) (int, error) {
	fd, err := unix.Openat(s.fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return -1, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return -1, err
	}
	if uid != 0 || gid != 0 {
		if err := f.Chown(uid, gid); err != nil {
			return -1, err
		}
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return -1, err
	}
	m, err := clone(s.fd, name, 0)
	if err != nil || !readOnly {
		return m, err
	}
	return m, restrict(m, unix.MOUNT_ATTR_RDONLY)
}

// detached makes a filesystem and returns a mount of it that hangs nowhere yet.
func detached(fstype string, attrs int, options ...string) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	for _, o := range options {
		if key, value, ok := strings.Cut(o, "="); ok {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, o)
		}
		if err != nil {
			return -1, explain(fs, o, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, explain(fs, fstype, err)
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
}

// explain adds what the kernel logged to an error.
func explain(fs int, what string, err error) error {
	buf := make([]byte, 1024)
	n, rerr := unix.Read(fs, buf)
	if rerr != nil || n < 3 {
		return fmt.Errorf("%s: %w", what, err)
	}
	// The first two bytes are a severity.
	return fmt.Errorf("%s: %w (%s)", what, err, strings.TrimSpace(string(buf[2:n])))
}

// clone makes a mount of what a path shows, with flags AT_RECURSIVE for all
// that is mounted below it.
func clone(dir int, name string, flags uint) (int, error) {
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	return unix.OpenTree(dir, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|flags)
}

func restrict(mount int, attrs uint64) error {
	set := unix.MountAttr{Attr_set: attrs}
	return unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &set)
}

// deaden makes the device nodes of a mount dead, if the process might use others than it should.
func (s *stage) deaden(mount int) error {
	if !s.noDevices {
		return nil
	}
	return restrict(mount, unix.MOUNT_ATTR_NODEV)
}

func attach(mount, target int) error {
	return unix.MoveMount(mount, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// root makes a mount of a stack of trees.
func (s *stage) root(r Root) (int, error) {
	if r.Dir != "" {
		return wholeDir(r.Dir)
	}
	if len(r.Lower) == 1 && r.Upper == "" {
		fd, err := wholeDir(r.Lower[0])
		if err != nil {
			return -1, err
		}
		return fd, restrict(fd, unix.MOUNT_ATTR_RDONLY)
	}
	l, err := openLayers(r)
	if err != nil {
		return -1, err
	}
	defer l.close()
	if !s.old {
		fd, err := detached("overlay", l.attrs(), l.options()...)
		if !errors.Is(err, unix.EINVAL) {
			return fd, hint(r, err)
		}
		if fd, err2 := s.classic(l); err2 == nil {
			s.old = true
			return fd, nil
		}
		return -1, hint(r, err)
	}
	fd, err := s.classic(l)
	return fd, hint(r, err)
}

// wholeDir makes a mount of a directory.
func wholeDir(name string) (int, error) {
	fd, err := clone(unix.AT_FDCWD, name, 0)
	if errors.Is(err, unix.EINVAL) {
		// In a user namespace, what is mounted below must come along.
		fd, err = clone(unix.AT_FDCWD, name, unix.AT_RECURSIVE)
	}
	if err != nil {
		return -1, &os.PathError{Op: "clone", Path: name, Err: err}
	}
	return fd, nil
}

// layers are the directories of an overlay, opened: their paths may hold any
// character, and be long, which the options of an overlay do not take well.
type layers struct {
	lower       []int
	upper, work int
}

func openLayers(r Root) (*layers, error) {
	l := &layers{upper: -1, work: -1}
	open := func(name string) (int, error) {
		fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: name, Err: err}
		}
		return fd, nil
	}
	for _, name := range r.Lower {
		fd, err := open(name)
		if err != nil {
			l.close()
			return nil, err
		}
		l.lower = append(l.lower, fd)
	}
	if r.Upper == "" {
		return l, nil
	}
	var err error
	if l.upper, err = open(r.Upper); err == nil {
		l.work, err = open(r.Work)
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *layers) close() {
	for _, fd := range append(l.lower, l.upper, l.work) {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (l *layers) attrs() int {
	if l.upper < 0 {
		return unix.MOUNT_ATTR_RDONLY
	}
	return 0
}

// common are the options that keep the upper a plain diff: userxattr implies
// that nothing is redirected and no copy is of metadata alone. volatile is for
// speed: without it, the end of each step would wait for the whole disk.
func (l *layers) common() []string {
	options := []string{"userxattr", "index=off", "xino=off"}
	if l.upper >= 0 {
		options = append(options, "volatile")
	}
	return options
}

func (l *layers) options() []string {
	options := append([]string{"source=overlay"}, l.common()...)
	for _, fd := range l.lower {
		options = append(options, "lowerdir+="+fdPath(fd))
	}
	if l.upper >= 0 {
		options = append(options, "upperdir="+fdPath(l.upper), "workdir="+fdPath(l.work))
	}
	return options
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// classic mounts an overlay on kernels before 6.7. All options have to fit on
// a page: as numbers in the directory of open files, hundreds of layers do.
func (s *stage) classic(l *layers) (int, error) {
	if err := unix.Chdir("/proc/self/fd"); err != nil {
		return -1, err
	}
	defer unix.Chdir("/")
	var lower []string
	for _, fd := range l.lower {
		lower = append(lower, strconv.Itoa(fd))
	}
	options := append(l.common(), "lowerdir="+strings.Join(lower, ":"))
	if l.upper >= 0 {
		options = append(options, "upperdir="+strconv.Itoa(l.upper), "workdir="+strconv.Itoa(l.work))
	}
	place, err := unix.Openat(s.fd, stageOverlay, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(place)
	flags := uintptr(0)
	if l.upper < 0 {
		flags = unix.MS_RDONLY
	}
	if err := unix.Mount("overlay", strconv.Itoa(place), "overlay", flags, strings.Join(options, ",")); err != nil {
		return -1, err
	}
	fd, err := clone(s.fd, stageOverlay, 0)
	if err != nil {
		return -1, err
	}
	top, err := unix.Openat(s.fd, stageOverlay, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(top)
	return fd, unix.Unmount(strconv.Itoa(top), unix.MNT_DETACH)
}

// hint adds to an overlay's error what usually is the matter.
func hint(r Root, err error) error {
	if err == nil || r.Upper == "" {
		return err
	}
	var st unix.Statfs_t
	if unix.Statfs(r.Upper, &st) == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return fmt.Errorf("%w: %s is on an overlay, which cannot hold another one's upper directory; put filo's state on a volume or a tmpfs", err, r.Upper)
	}
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%w: the kernel has no overlay filesystem (modprobe overlay)", err)
	}
	return err
}

// mounts makes the mounts a process asks for.
func (s *stage) mounts(ms []Mount) ([]placement, error) {
	var ps []placement
	for i, m := range ms {
		fd, dir, err := s.mount(i, m)
		if err != nil {
			return nil, at("mount "+m.Target, err)
		}
		ps = append(ps, placement{mount: fd, target: m.Target, dir: dir})
	}
	return ps, nil
}

func (s *stage) mount(i int, m Mount) (fd int, dir bool, err error) {
	switch m.Type {
	case Data:
		mode := m.Mode
		if mode == 0 {
			mode = 0o400
		}
		fd, err = s.file("data"+strconv.Itoa(i), m.Data, mode, m.UID, m.GID, m.ReadOnly)
		if err == nil && m.NoExec {
			err = restrict(fd, unix.MOUNT_ATTR_NOEXEC)
		}
		return fd, false, err
	case Tmpfs:
		fd, err = m.tmpfs()
		dir = true
	case Bind:
		fd, dir, err = m.bind()
	case Overlay:
		fd, dir, err = s.overlay(m)
	default:
		return -1, false, fmt.Errorf("type %q not known", m.Type)
	}
	if err == nil && m.ReadOnly {
		err = restrict(fd, unix.MOUNT_ATTR_RDONLY)
	}
	if err == nil {
		err = s.deaden(fd)
	}
	return fd, dir, err
}

func (m Mount) tmpfs() (int, error) {
	mode := m.Mode
	if mode == 0 {
		mode = 0o1777
	}
	options := []string{"source=tmpfs", fmt.Sprintf("mode=%o", mode)}
	if m.UID != 0 || m.GID != 0 {
		options = append(options, "uid="+strconv.Itoa(m.UID), "gid="+strconv.Itoa(m.GID))
	}
	if m.Size > 0 {
		options = append(options, "size="+strconv.FormatInt(m.Size, 10))
	}
	return detached("tmpfs", unix.MOUNT_ATTR_NOSUID, options...)
}

func (m Mount) bind() (int, bool, error) {
	source, err := openSource(m.Source, m.Subpath)
	if err != nil {
		return -1, false, err
	}
	defer unix.Close(source)
	fd, err := clone(source, "", unix.AT_RECURSIVE)
	return fd, isDirectory(source), err
}

// overlay mounts a view of trees. A part of it can only be cloned while the
// whole is attached somewhere.
func (s *stage) overlay(m Mount) (int, bool, error) {
	whole, err := s.root(m.Root)
	if err != nil || strings.Trim(m.Subpath, "/.") == "" {
		return whole, true, err
	}
	defer unix.Close(whole)
	place, err := unix.Openat(s.fd, stageOverlay, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, false, err
	}
	defer unix.Close(place)
	if err := attach(whole, place); err != nil {
		return -1, false, err
	}
	part, err := openIn(whole, m.Subpath, 0)
	if err != nil {
		return -1, false, err
	}
	defer unix.Close(part)
	fd, err := clone(part, "", 0)
	if err != nil {
		return -1, false, err
	}
	return fd, isDirectory(part), unix.Unmount(fdPath(whole), unix.MNT_DETACH)
}

// Overlays reports why overlays with their upper directory on the filesystem of
// dir, which is empty, cannot be mounted on this ground; nil if they can.
func Overlays(dir string) error {
	r := Root{Lower: []string{dir + "/low"}, Upper: dir + "/up", Work: dir + "/work"}
	for _, name := range []string{r.Lower[0], r.Upper, r.Work} {
		if err := os.Mkdir(name, 0o755); err != nil {
			return err
		}
	}
	l, err := openLayers(r)
	if err != nil {
		return err
	}
	defer l.close()
	fd, err := detached("overlay", 0, l.options()...)
	if err == nil {
		return unix.Close(fd)
	}
	if errors.Is(err, unix.EINVAL) && !appendsLayers() {
		return nil // mount(2) does it in the launcher; here it would be seen
	}
	return hint(r, err)
}

// appendsLayers says whether the kernel takes an overlay's layers one by one, as from 6.7 on.
func appendsLayers() bool {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return true
	}
	defer unix.Close(fs)
	return unix.FsconfigSetString(fs, "lowerdir+", "/") == nil
}
