// Package rootfs opens and makes paths inside a root directory and never leaves it.
//
// The tree below a root is foreign: it may hold symbolic links to anywhere, absolute ones
// included, and somebody may swap its files while we work. A path given to a [Root] is
// resolved by the kernel as if the root were "/" (openat2 with in-root resolution, no magic
// links), so "/etc" in the image is never "/etc" of the machine. A [Dir] is an open
// directory; its methods take one name, follow nothing, and cannot be led elsewhere by a
// rename or a planted link. Resolve once, then work with the Dir.
//
// It never follows a link in the last component unless the method says so, never changes
// what a link points to, and knows nothing of layers or images. It needs Linux 5.6.
//
// Start at [Open]. rootfs.go has the paths, dir.go the directory handles, attr.go owner,
// mode, times and extended attributes.
package rootfs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Root is an open directory in which paths are resolved as if it were "/".
// It is safe for concurrent use.
type Root struct {
	dir *Dir
}

// Open opens the directory dir as a root. Links in dir itself are followed as usual:
// dir is the caller's, what is below it need not be. The caller closes the Root.
func Open(dir string) (*Root, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC}
	fd, err := openat2(unix.AT_FDCWD, dir, &how)
	if errors.Is(err, unix.ENOSYS) {
		return nil, fmt.Errorf("open root %s: this kernel has no openat2, Linux 5.6 or newer is needed", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open root %s: %w", dir, err)
	}
	return &Root{dir: &Dir{fd: fd, name: dir}}, nil
}

// Close closes the root. Directories opened from it stay open.
func (r *Root) Close() error { return r.dir.Close() }

// Name returns the path the root was opened with.
func (r *Root) Name() string { return r.dir.name }

// Dir opens the directory at p, links followed inside the root. The caller closes it.
func (r *Root) Dir(p string) (*Dir, error) {
	fd, err := r.open(p, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, pathError("open", p, err)
	}
	return &Dir{fd: fd, name: p}, nil
}

// OpenFile opens the file at p, links followed inside the root, the last one as well unless
// flag has O_NOFOLLOW. Flags are those of os.OpenFile, perm is used as it is if the file is made.
func (r *Root) OpenFile(p string, flag int, perm uint32) (*os.File, error) {
	fd, err := r.open(p, flag, perm)
	if err != nil {
		return nil, pathError("open", p, err)
	}
	return os.NewFile(uintptr(fd), p), nil
}

// Reader is an open file of which there is no more to know than its bytes: an os.File takes several system calls more,
// and there are tens of thousands of small ones to read. It is used by one goroutine.
type Reader struct {
	fd   int
	name string
}

// Read opens the file at p, links followed inside the root but in its last name. Its access time stays as it is where that
// is allowed. The caller closes the Reader.
func (r *Root) Read(p string) (*Reader, error) {
	fd, err := r.open(p, readFlags|unix.O_NOATIME, 0)
	if err == unix.EPERM {
		fd, err = r.open(p, readFlags, 0)
	}
	if err != nil {
		return nil, pathError("open", p, err)
	}
	return &Reader{fd: fd, name: p}, nil
}

// readFlags open a file for a [Reader]; a fifo's other end is not waited for. O_NOATIME is refused (EPERM) to those who
// neither own the file nor are root.
const readFlags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_LARGEFILE

// Read is that of an io.Reader.
func (r *Reader) Read(b []byte) (int, error) {
	for len(b) > 0 {
		n, err := unix.Read(r.fd, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, pathError("read", r.name, err)
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
	return 0, nil
}

// Stat returns what the file is.
func (r *Reader) Stat() (Stat, error) {
	var st unix.Stat_t
	err := unix.Fstat(r.fd, &st)
	if err != nil {
		return Stat{}, pathError("stat", r.name, err)
	}
	return newStat(&st), nil
}

// Fd returns the file's descriptor, valid until Close.
func (r *Reader) Fd() int { return r.fd }

// Close closes the file; nothing else may be called any more.
func (r *Reader) Close() error { return unix.Close(r.fd) }

// MkdirAll makes the directory p and its missing parents with mode perm and opens it.
// Links on the way are followed inside the root; the target of a dangling one is made.
// Existing directories keep their mode. The caller closes the Dir.
func (r *Root) MkdirAll(p string, perm uint32) (*Dir, error) {
	d, err := r.Dir(p)
	if !errors.Is(err, unix.ENOENT) {
		return d, err
	}
	w := walk{root: r, todo: split(p), perm: perm}
	defer w.close()
	for len(w.todo) > 0 {
		if err := w.step(); err != nil {
			return nil, pathError("mkdir", p, err)
		}
	}
	return r.Dir(w.done)
}

// Parent opens the directory that holds p, links followed inside the root, and returns it
// with the last name of p, which is not followed and need not exist. The name of the root
// is ".". The caller closes the Dir.
func (r *Root) Parent(p string) (*Dir, string, error) {
	p = clean(p)
	d, err := r.Dir(path.Dir(p))
	return d, path.Base(p), err
}

// Lstat returns what p is; a link in its last name is not followed.
func (r *Root) Lstat(p string) (Stat, error) {
	return in(r, p, func(d *Dir, name string) (Stat, error) { return d.Lstat(name) })
}

// Readlink returns the text of the symbolic link p.
func (r *Root) Readlink(p string) (string, error) {
	return in(r, p, func(d *Dir, name string) (string, error) { return d.Readlink(name) })
}

// Mkdir makes the directory p with mode perm.
func (r *Root) Mkdir(p string, perm uint32) error {
	return r.at(p, func(d *Dir, name string) error { return d.Mkdir(name, perm) })
}

// Symlink makes p a symbolic link with the text target, which may point anywhere.
func (r *Root) Symlink(target, p string) error {
	return r.at(p, func(d *Dir, name string) error { return d.Symlink(target, name) })
}

// Link makes p another name of the file old; neither is followed in its last name.
func (r *Root) Link(old, p string) error {
	return r.at(old, func(from *Dir, oldName string) error {
		return r.at(p, func(d *Dir, name string) error { return d.Link(from, oldName, name) })
	})
}

// Mknod makes the device, fifo or empty file p; see [Dir.Mknod].
func (r *Root) Mknod(p string, mode, major, minor uint32) error {
	return r.at(p, func(d *Dir, name string) error { return d.Mknod(name, mode, major, minor) })
}

// Remove removes the file or empty directory p.
func (r *Root) Remove(p string) error {
	return r.at(p, func(d *Dir, name string) error { return d.Remove(name) })
}

// RemoveAll removes p and all below it. No p is no error.
func (r *Root) RemoveAll(p string) error {
	err := r.at(p, func(d *Dir, name string) error { return d.RemoveAll(name) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// Set puts the attributes a on p itself, not on what a link p points to.
func (r *Root) Set(p string, a Attr) error {
	return r.at(p, func(d *Dir, name string) error { return d.Set(name, a) })
}

func (r *Root) at(p string, do func(*Dir, string) error) error {
	_, err := in(r, p, func(d *Dir, name string) (struct{}, error) { return struct{}{}, do(d, name) })
	return err
}

func in[T any](r *Root, p string, do func(*Dir, string) (T, error)) (T, error) {
	d, name, err := r.Parent(p)
	if err != nil {
		var none T
		return none, err
	}
	defer d.Close()
	return do(d, name)
}

func (r *Root) open(p string, flag int, perm uint32) (int, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return -1, unix.EINVAL
	}
	how := unix.OpenHow{
		Flags:   uint64(flag) | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	if flag&(unix.O_CREAT|unix.O_TMPFILE) != 0 {
		how.Mode = uint64(perm & 0o7777)
	}
	if p == "" {
		p = "."
	}
	return openat2(r.dir.fd, p, &how)
}

// walk is MkdirAll on its way: done exists and holds no link, todo is still to be resolved.
type walk struct {
	root  *Root
	dir   *Dir // open at done; nil when it has to be opened again
	done  string
	todo  []string
	links int
	perm  uint32
}

// maxLinks is the kernel's limit of links in one path (path_resolution(7)).
const maxLinks = 40

func (w *walk) step() (err error) {
	if w.dir == nil {
		if w.dir, err = w.root.Dir(w.done); err != nil {
			return err
		}
	}
	name := w.todo[0]
	if name == ".." {
		w.move(path.Dir(clean(w.done)), w.todo[1:])
		return nil
	}
	st, err := w.dir.Lstat(name)
	if errors.Is(err, unix.ENOENT) {
		err = w.dir.Mkdir(name, w.perm)
		if errors.Is(err, unix.EEXIST) {
			return nil // somebody was faster: look again
		}
		st.Mode = unix.S_IFDIR
	}
	if err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		w.move(path.Join(w.done, name), w.todo[1:])
		return nil
	case unix.S_IFLNK:
		return w.follow(name)
	}
	return unix.ENOTDIR
}

func (w *walk) follow(name string) error {
	if w.links++; w.links > maxLinks {
		return unix.ELOOP
	}
	target, err := w.dir.Readlink(name)
	if err != nil {
		return err
	}
	done := w.done
	if path.IsAbs(target) {
		done = ""
	}
	w.move(done, append(split(target), w.todo[1:]...))
	return nil
}

func (w *walk) move(done string, todo []string) {
	w.done, w.todo = done, todo
	w.close()
}

func (w *walk) close() {
	if w.dir != nil {
		w.dir.Close()
		w.dir = nil
	}
}

// split leaves ".." alone: what it means depends on the links before it.
func split(p string) []string {
	var names []string
	for name := range strings.SplitSeq(p, "/") {
		if name != "" && name != "." {
			names = append(names, name)
		}
	}
	return names
}

// clean keeps ".." inside when a link stands before it: only the last name is cut off
// by callers, so it must be a real one.
func clean(p string) string {
	names := split(p)
	if len(names) == 0 {
		return "."
	}
	if names[len(names)-1] == ".." {
		names = append(names, ".") // path.Base is "." then, path.Dir all the rest
	}
	return strings.Join(names, "/")
}

func openat2(dirfd int, p string, how *unix.OpenHow) (int, error) {
	if how.Flags&unix.O_PATH == 0 {
		how.Flags |= unix.O_LARGEFILE
	}
	// The kernel answers EAGAIN when a rename elsewhere makes it unsure that ".." stayed
	// inside; the number of tries only bounds how long an attacker can keep us here.
	for range 1000 {
		fd, err := unix.Openat2(dirfd, p, how)
		if err != unix.EAGAIN && err != unix.EINTR {
			return fd, err
		}
	}
	return -1, unix.EAGAIN
}
