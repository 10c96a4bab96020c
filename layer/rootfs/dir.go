package rootfs

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Dir is an open directory. Its methods take the name of something directly inside it
// and follow no link; a name with a slash, "..", or "" is refused. Methods that read or
// change attributes also take "." for the directory itself.
// It is safe for concurrent use, but for Close.
type Dir struct {
	fd   int
	name string // for errors only
}

// Stat is what lstat(2) says of a file.
type Stat struct {
	Mode         uint32 // type (S_IFMT) and permission bits, as the kernel has them
	UID, GID     int
	Size         int64
	Dev, Ino     uint64
	Nlink        uint32
	Major, Minor uint32 // of a device
	Sec, Nsec    int64  // modification time
	CSec, CNsec  int64  // change time
}

// FileMode returns the mode as io/fs writes it.
func (s Stat) FileMode() fs.FileMode { return fileMode(s.Mode) }

// Close closes the directory.
func (d *Dir) Close() error { return unix.Close(d.fd) }

// Fd returns the directory's descriptor, an O_PATH one, valid until Close.
func (d *Dir) Fd() int { return d.fd }

// Dir opens the directory name. The caller closes it.
func (d *Dir) Dir(name string) (*Dir, error) {
	if err := d.check("open", name, true); err != nil {
		return nil, err
	}
	fd, err := openat(d.fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, d.error("open", name, err)
	}
	return &Dir{fd: fd, name: path.Join(d.name, name)}, nil
}

// OpenFile opens or makes the file name with flags as for os.OpenFile; O_NOFOLLOW is added.
// perm is used as it is, but for the umask. Opening a fifo does not wait for its other end.
func (d *Dir) OpenFile(name string, flag int, perm uint32) (*os.File, error) {
	if err := d.check("open", name, false); err != nil {
		return nil, err
	}
	fd, err := openat(d.fd, name, flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, perm)
	if err != nil {
		return nil, d.error("open", name, err)
	}
	return os.NewFile(uintptr(fd), path.Join(d.name, name)), nil
}

// Read opens the file name. Its access time stays as it is where that is allowed. The caller closes the Reader.
func (d *Dir) Read(name string) (*Reader, error) {
	if err := d.check("open", name, false); err != nil {
		return nil, err
	}
	flags := readFlags | unix.O_NOATIME
	for {
		fd, err := unix.Openat(d.fd, name, flags, 0)
		switch {
		case err == nil:
			return &Reader{fd: fd, name: name}, nil
		case err == unix.EPERM && flags != readFlags:
			flags = readFlags
		case err != unix.EINTR:
			return nil, d.error("open", name, err)
		}
	}
}

// Create makes the new file name for writing; it is an error if the name is taken.
func (d *Dir) Create(name string, perm uint32) (*os.File, error) {
	return d.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
}

// Names returns the names in the directory, unsorted.
func (d *Dir) Names() ([]string, error) {
	fd, err := openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, d.error("open", ".", err)
	}
	f := os.NewFile(uintptr(fd), d.name)
	defer f.Close()
	return f.Readdirnames(-1)
}

// Listed is a name in a directory.
type Listed struct {
	Name string
	Type uint32 // of the file, as in [Stat.Mode]: S_IFMT
}

// listBuffers hold the kernel's records while List reads them.
var listBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// List returns what is in the directory, in the order of names.
func (d *Dir) List() ([]Listed, error) {
	fd, err := openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, d.error("open", ".", err)
	}
	defer unix.Close(fd)
	buf := listBuffers.Get().(*[64 << 10]byte)
	defer listBuffers.Put(buf)
	var list []Listed
	for {
		n, err := unix.Getdents(fd, buf[:])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, d.error("readdir", ".", err)
		case n == 0:
			slices.SortFunc(list, func(a, b Listed) int { return strings.Compare(a.Name, b.Name) })
			return list, nil
		}
		const usual = 32 // bytes of a record, to guess how many there are
		list = slices.Grow(list, n/usual)
		for records := string(buf[:n]); records != ""; { // names are parts of it
			var l Listed
			l, records = nextListed(records)
			if list, err = d.appendListed(list, l); err != nil {
				return nil, err
			}
		}
	}
}

// nextListed takes the first record off those of getdents64(2): inode and offset of 8 bytes each, the record's length of
// 2, the type, the name with a NUL at its end.
func nextListed(records string) (Listed, string) {
	const length, kind, name = 16, 18, 19
	n := binary.NativeEndian.Uint16([]byte(records[length:kind]))
	l := Listed{Type: uint32(records[kind]) << 12} // DT_REG and its like are the types of st_mode, shifted
	l.Name, _, _ = strings.Cut(records[name:n], "\x00")
	return l, records[n:]
}

// appendListed appends l, unless it is the directory itself or the one above. Some file systems keep no types in their
// directories.
func (d *Dir) appendListed(list []Listed, l Listed) ([]Listed, error) {
	if l.Name == "." || l.Name == ".." {
		return list, nil
	}
	if l.Type == unix.DT_UNKNOWN {
		st, err := d.Lstat(l.Name)
		if errors.Is(err, unix.ENOENT) {
			return list, nil // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		l.Type = st.Mode & unix.S_IFMT
	}
	return append(list, l), nil
}

// Lstat returns what name is.
func (d *Dir) Lstat(name string) (Stat, error) {
	if err := d.check("lstat", name, true); err != nil {
		return Stat{}, err
	}
	var st unix.Stat_t
	err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	for err == unix.EINTR { // not by retry, whose closure would put st on the heap: this runs for each file of a context
		err = unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return Stat{}, d.error("lstat", name, err)
	}
	return newStat(&st), nil
}

func newStat(st *unix.Stat_t) Stat {
	dev, rdev := uint64(st.Dev), uint64(st.Rdev) // their types differ between architectures
	return Stat{
		Mode: st.Mode, UID: int(st.Uid), GID: int(st.Gid), Size: st.Size,
		Dev: dev, Ino: st.Ino, Nlink: uint32(st.Nlink),
		Major: unix.Major(rdev), Minor: unix.Minor(rdev),
		Sec: int64(st.Mtim.Sec), Nsec: int64(st.Mtim.Nsec),
		CSec: int64(st.Ctim.Sec), CNsec: int64(st.Ctim.Nsec),
	}
}

// Readlink returns the text of the symbolic link name.
func (d *Dir) Readlink(name string) (string, error) {
	if err := d.check("readlink", name, false); err != nil {
		return "", err
	}
	for size := 256; ; size *= 2 {
		b := make([]byte, size)
		n, err := unix.Readlinkat(d.fd, name, b)
		if err != nil {
			return "", d.error("readlink", name, err)
		}
		if n < size {
			return string(b[:n]), nil
		}
	}
}

// Mkdir makes the directory name with mode perm, set-id and sticky bits included,
// less the umask.
func (d *Dir) Mkdir(name string, perm uint32) error {
	return d.do("mkdir", name, func() error { return unix.Mkdirat(d.fd, name, perm&0o7777) })
}

// Symlink makes name a symbolic link with the text target.
func (d *Dir) Symlink(target, name string) error {
	return d.do("symlink", name, func() error { return unix.Symlinkat(target, d.fd, name) })
}

// Link makes name another name of the file old in the directory from.
func (d *Dir) Link(from *Dir, old, name string) error {
	if err := from.check("link", old, false); err != nil {
		return err
	}
	return d.do("link", name, func() error { return unix.Linkat(from.fd, old, d.fd, name, 0) })
}

// Mknod makes name a device, fifo, socket or empty file: mode holds the kernel's type and
// permission bits, less the umask. major and minor are those of a device.
func (d *Dir) Mknod(name string, mode, major, minor uint32) error {
	return d.do("mknod", name, func() error {
		return unix.Mknodat(d.fd, name, mode, int(unix.Mkdev(major, minor)))
	})
}

// Rename moves name to the name to in the directory into, replacing what a rename replaces.
func (d *Dir) Rename(name string, into *Dir, to string) error {
	if err := into.check("rename", to, false); err != nil {
		return err
	}
	return d.do("rename", name, func() error { return unix.Renameat(d.fd, name, into.fd, to) })
}

// Remove removes the file or empty directory name.
func (d *Dir) Remove(name string) error {
	if err := d.check("remove", name, false); err != nil {
		return err
	}
	err := unix.Unlinkat(d.fd, name, 0)
	if err == unix.EISDIR || err == unix.EPERM {
		if dirErr := unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR); dirErr != unix.ENOTDIR {
			err = dirErr
		}
	}
	return d.error("remove", name, err)
}

// RemoveAll removes name and all below it; what cannot be read for want of permission bits
// is made readable first. No such name is no error.
func (d *Dir) RemoveAll(name string) error {
	err := d.Remove(name)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := d.empty(name); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	err = d.Remove(name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (d *Dir) empty(name string) error {
	sub, err := d.Dir(name)
	if err != nil {
		return err
	}
	defer sub.Close()
	err = sub.clear()
	if errors.Is(err, unix.EACCES) && d.Chmod(name, 0o700) == nil {
		err = sub.clear()
	}
	return err
}

func (d *Dir) clear() error {
	names, err := d.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := d.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

func (d *Dir) do(op, name string, call func() error) error {
	if err := d.check(op, name, false); err != nil {
		return err
	}
	return d.error(op, name, retry(call))
}

// check refuses every name that is not directly inside the directory.
func (d *Dir) check(op, name string, self bool) error {
	if name == "" || name == ".." || name == "." && !self || strings.ContainsAny(name, "/\x00") {
		return d.error(op, name, unix.EINVAL)
	}
	return nil
}

func (d *Dir) error(op, name string, err error) error {
	return pathError(op, path.Join(d.name, name), err)
}

func pathError(op, p string, err error) error {
	var inner *fs.PathError
	if err == nil || errors.As(err, &inner) {
		return err
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

func openat(dirfd int, name string, flag int, perm uint32) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Openat(dirfd, name, flag|unix.O_CLOEXEC|unix.O_LARGEFILE, perm&0o7777)
		return err
	})
	return fd, err
}

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
