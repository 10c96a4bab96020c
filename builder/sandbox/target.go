package sandbox

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MountPoints returns the paths [Runner.Run] will mount on. They must exist in the
// root, but for those inside an earlier mount: they are made there, and
// they are left out here. The paths are clean and absolute; symlinks in them
// are resolved inside the root.
func MountPoints(p Process) []MountPoint {
	points := []MountPoint{
		{"/proc", true},
		{"/sys", true},
		{"/dev", true},
		{"/etc/resolv.conf", false},
		{"/etc/hosts", false},
	}
	for _, m := range p.Mounts {
		target := path.Clean("/" + m.Target)
		if !covered(points, target) {
			points = append(points, MountPoint{target, m.isDir()})
		}
	}
	return points
}

func covered(points []MountPoint, target string) bool {
	for _, p := range points {
		if target == p.Path || strings.HasPrefix(target, p.Path+"/") {
			return true
		}
	}
	return false
}

// isDir says what a mount's target has to be. A source that is missing or
// cannot be read is found out when it is mounted.
func (m Mount) isDir() bool {
	switch m.Type {
	case Tmpfs:
		return true
	case Data:
		return false
	case Overlay:
		return !m.File
	}
	fd, err := openSource(m.Source, m.Subpath)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	return isDirectory(fd)
}

func isDirectory(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// openSource opens a path below a host path without leaving that.
func openSource(source, subpath string) (int, error) {
	fd, err := unix.Open(source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: source, Err: err}
	}
	if sub := path.Clean("/" + subpath); sub != "/" {
		defer unix.Close(fd)
		return openIn(fd, sub, 0)
	}
	return fd, nil
}

// openIn opens a path as if dir were the root: symlinks are followed, but
// neither they nor ".." lead out, nor does any link of /proc lead to a file
// that this process has open.
func openIn(dir int, name string, flags uint64) (int, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(dir, name, &how)
		// The kernel gives up when something is renamed or mounted meanwhile.
		if err == unix.EAGAIN || err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: name, Err: err}
		}
		return fd, nil
	}
}

// openInside adds the calls of openIn for the root that the child has.
func (q *sequence) openInside(step, name string, flags uint64) result {
	root := q.add(step, unix.SYS_OPENAT, unix.AT_FDCWD, "/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	how := &unix.OpenHow{
		Flags:   flags | unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	return q.add(step, unix.SYS_OPENAT2, root, name, unsafe.Pointer(how), unsafe.Sizeof(*how))
}

// inside is the root seen from inside, after the pivot.
type inside struct {
	fd    int
	mount uint64 // identity of the root's own mount
}

func openInside(root int) (*inside, error) {
	id, err := mountID(root)
	return &inside{root, id}, err
}

func mountID(fd int) (uint64, error) {
	var st unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st)
	return st.Mnt_id, err
}

// placement is a mount and where it goes.
type placement struct {
	mount    int
	target   string
	dir      bool
	optional bool // skipped where there is no such path
}

func (in *inside) place(ps []placement) error {
	for _, p := range ps {
		fd, err := in.target(p.target, p.dir)
		if p.optional && errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			if err = p.fits(fd); err == nil {
				err = attach(p.mount, fd)
			}
			unix.Close(fd)
		}
		if err != nil {
			return at("mount "+p.target, err)
		}
		unix.Close(p.mount)
	}
	return nil
}

// fits says what is wrong with a mount point, of which the kernel would say that something is invalid.
func (p placement) fits(point int) error {
	switch {
	case isDirectory(point) == p.dir:
		return nil
	case p.dir:
		return &cause{text: "it is a file, and what is mounted on it a directory", errno: unix.ENOTDIR}
	}
	return &cause{text: "it is a directory, and what is mounted on it a file", errno: unix.EISDIR}
}

// target opens a mount point, and makes it if it lies inside a mount: what is
// made in the root itself would be part of the step's result.
func (in *inside) target(name string, dir bool) (int, error) {
	name = path.Clean("/" + name)
	fd, err := openIn(in.fd, name, 0)
	if err == nil || !errors.Is(err, unix.ENOENT) || name == "/" {
		return fd, err
	}
	parent, err := in.target(path.Dir(name), true)
	if err != nil {
		return -1, err
	}
	defer unix.Close(parent)
	id, err := mountID(parent)
	if err != nil {
		return -1, err
	}
	if id == in.mount {
		return -1, &cause{text: fmt.Sprintf("no mount point %s", name), errno: unix.ENOENT}
	}
	if err := create(parent, path.Base(name), dir); err != nil {
		return -1, &os.PathError{Op: "make", Path: name, Err: err}
	}
	return openIn(in.fd, name, 0)
}

// create makes a directory or an empty file. O_PATH directories cannot be
// written through a path, so this is by handle.
func create(parent int, name string, dir bool) error {
	if dir {
		return unix.Mkdirat(parent, name, 0o755)
	}
	fd, err := unix.Openat(parent, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// workingDirectory opens the directory the process starts in. As in other
// builders it is made if it is missing, in the root itself, and belongs to the
// process's user. A ".." after a symlink counts from where that leads; what is missing
// before one is made as well, root's, as runc does.
func workingDirectory(name string, uid, gid int) (int, error) {
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if fd, err := openIn(root, name, unix.O_DIRECTORY); err == nil {
		return fd, nil
	}
	dir, err := directory(root, path.Clean("/"+name), uid, gid)
	if err != nil {
		return -1, err
	}
	for i := range name {
		if !strings.HasPrefix(name[i:], "/..") {
			continue
		}
		through, err := directory(root, cmp.Or(name[:i], "/"), 0, 0)
		if err != nil {
			return -1, err
		}
		unix.Close(through)
	}
	return dir, nil
}

func directory(root int, name string, uid, gid int) (int, error) {
	fd, err := openIn(root, name, unix.O_DIRECTORY)
	if err == nil || !errors.Is(err, unix.ENOENT) || name == "/" {
		return fd, err
	}
	parent, err := directory(root, path.Dir(name), uid, gid)
	if err != nil {
		return -1, err
	}
	defer unix.Close(parent)
	if err := unix.Mkdirat(parent, path.Base(name), 0o755); err != nil {
		return -1, &os.PathError{Op: "make", Path: name, Err: err}
	}
	if err := unix.Fchownat(parent, path.Base(name), uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return -1, &os.PathError{Op: "chown", Path: name, Err: err}
	}
	return openIn(root, name, unix.O_DIRECTORY)
}
