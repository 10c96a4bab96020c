package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// copyTree makes dir, which does not exist yet, a copy of the tree at from.
func copyTree(ctx context.Context, from, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	source, err := rootfs.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := rootfs.Open(dir)
	if err != nil {
		return err
	}
	defer target.Close()
	c := &copier{ctx: ctx, target: target, links: map[[2]uint64]string{}}
	c.group.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	a, err := source.Dir(".")
	if err != nil {
		return err
	}
	b, err := target.Dir(".")
	if err != nil {
		a.Close()
		return err
	}
	err = c.dir(a, b, ".")
	return errors.Join(err, c.group.Wait())
}

// copier copies a directory with all attributes, hard links included.
type copier struct {
	ctx    context.Context
	target *rootfs.Root
	group  errgroup.Group

	mu    sync.Mutex
	links map[[2]uint64]string // where the first name of a file of several is
}

// dir copies what is in from to to, and the attributes of from last; it closes both.
func (c *copier) dir(from, to *rootfs.Dir, p string) error {
	defer from.Close()
	defer to.Close()
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	names, err := from.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		st, err := from.Lstat(name)
		if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			err = c.file(from, to, name, path.Join(p, name), st)
		} else {
			err = c.sub(from, to, name, path.Join(p, name))
		}
		if err != nil {
			return err
		}
	}
	st, err := from.Lstat(".")
	if err != nil {
		return err
	}
	return copyAttributes(from, to, ".", st)
}

// sub copies a directory. One that another goroutine fills is not touched by this one any more,
// so that its times stay.
func (c *copier) sub(from, to *rootfs.Dir, name, p string) error {
	if err := to.Mkdir(name, 0o700); err != nil {
		return err
	}
	a, err := from.Dir(name)
	if err != nil {
		return err
	}
	b, err := to.Dir(name)
	if err != nil {
		a.Close()
		return err
	}
	if c.group.TryGo(func() error { return c.dir(a, b, p) }) {
		return nil
	}
	return c.dir(a, b, p)
}

func (c *copier) file(from, to *rootfs.Dir, name, p string, st rootfs.Stat) (err error) {
	if st.Nlink > 1 {
		// The lock is held until the first name is there.
		c.mu.Lock()
		defer c.mu.Unlock()
		key := [2]uint64{st.Dev, st.Ino}
		if first, ok := c.links[key]; ok {
			return c.target.Link(first, p)
		}
		c.links[key] = p
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		err = copyFile(from, to, name, name)
	case unix.S_IFLNK:
		var text string
		if text, err = from.Readlink(name); err == nil {
			err = to.Symlink(text, name)
		}
	default:
		err = to.Mknod(name, st.Mode&unix.S_IFMT|0o600, st.Major, st.Minor)
		if errors.Is(err, unix.EPERM) && st.Major == 0 && st.Minor == 0 {
			delete(c.links, [2]uint64{st.Dev, st.Ino})
			return nil // a whiteout, which only an overlay could read
		}
	}
	if err != nil {
		return err
	}
	return copyAttributes(from, to, name, st)
}

func copyAttributes(from, to *rootfs.Dir, name string, st rootfs.Stat) error {
	if st.UID != os.Geteuid() || st.GID != os.Getegid() {
		if err := to.Chown(name, st.UID, st.GID); err != nil {
			return err
		}
	}
	if kind := st.Mode & unix.S_IFMT; kind == unix.S_IFREG || kind == unix.S_IFDIR {
		xattrs, err := from.Xattrs(name, layerXattr)
		if err != nil {
			return err
		}
		for key, value := range xattrs {
			if err := to.SetXattr(name, key, value); err != nil {
				return err
			}
		}
	}
	if err := to.Chmod(name, st.Mode&0o7777); err != nil {
		return err
	}
	return to.Chtimes(name, rootfs.Time{Sec: st.Sec, Nsec: st.Nsec})
}

func copyFile(from, to *rootfs.Dir, name, as string) error {
	in, err := from.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := to.Create(as, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(cloneFile(out, in), out.Close())
}

// cloneFile fills out with what in holds: by sharing its blocks where the file system can,
// else by copying what is not a hole.
func cloneFile(out, in *os.File) error {
	err := unix.IoctlFileClone(int(out.Fd()), int(in.Fd()))
	if err == nil {
		return nil
	}
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if st, ok := statOf(in); ok && st.Blocks*512 < info.Size() {
		return copyData(out, in, info.Size())
	}
	_, err = io.Copy(out, in)
	return err
}

func statOf(f *os.File) (unix.Stat_t, bool) {
	var st unix.Stat_t
	return st, unix.Fstat(int(f.Fd()), &st) == nil
}

func copyData(out, in *os.File, size int64) error {
	for at := int64(0); at < size; {
		start, err := in.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return err
		}
		end, err := in.Seek(start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := out.Seek(start, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.Copy(out, io.NewSectionReader(in, start, end-start)); err != nil {
			return err
		}
		at = end
	}
	return out.Truncate(size)
}

// Part is a directory to show what layers have at p: the caller shows Overlay.Root or a mount of
// the rest, and in it the path p. With overlays it is an [Store.Overlay]; otherwise a
// copy of that one path, whose files are the caller's to change.
func (s *Store) Part(ctx context.Context, layers []Layer, p string) (*Overlay, error) {
	if !s.merges() {
		return s.Overlay(ctx, layers, nil)
	}
	view, err := s.View(ctx, layers)
	if err != nil {
		return nil, err
	}
	dir, err := s.Temp("part-")
	if err != nil {
		return nil, err
	}
	m := &merged{dir: dir}
	if err := os.Mkdir(m.volume(), 0o755); err != nil {
		return nil, errors.Join(err, m.remove())
	}
	o := &Overlay{Root: m.root(), dir: dir, view: view, merged: m}
	if err := s.copyPart(ctx, view, p, m.root()); err != nil {
		return nil, errors.Join(fmt.Errorf("copy %s: %w", p, err), o.Close())
	}
	return o, nil
}

func (s *Store) copyPart(ctx context.Context, view *View, p, dir string) error {
	name, err := view.Resolve(p, true)
	if err != nil {
		return err
	}
	at := path.Join(".", path.Clean("/"+p))
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(at)), 0o755); err != nil {
		return err
	}
	root, err := rootfs.Open(dir)
	if errors.Is(err, fs.ErrNotExist) { // the root itself is asked for
		if err = os.Mkdir(dir, 0o755); err == nil {
			root, err = rootfs.Open(dir)
		}
	}
	if err != nil {
		return err
	}
	defer root.Close()
	c := &partCopier{ctx: ctx, s: s, view: view, root: root, links: map[string]string{}}
	return c.copy(name, at)
}

// partCopier copies from a view to a directory.
type partCopier struct {
	ctx   context.Context
	s     *Store
	view  *View
	root  *rootfs.Root
	links map[string]string // by [View.Inode]
}

func (c *partCopier) copy(name, to string) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	e, i, err := c.view.stat("copy", name)
	if err != nil {
		return err
	}
	if e.Type != Dir {
		return c.file(*e, i, to)
	}
	if to != "." {
		if err := c.root.Mkdir(to, 0o700); err != nil {
			return err
		}
	}
	for _, k := range c.view.children(name) {
		if err := c.copy(k.Path, path.Join(to, path.Base(k.Path))); err != nil {
			return err
		}
	}
	return dress(c.root, to, *e, c.s.single)
}

func (c *partCopier) file(e Entry, layer int, to string) (err error) {
	inode := c.view.Inode(e.Path)
	if first, ok := c.links[inode]; ok {
		return c.root.Link(first, to)
	}
	c.links[inode] = to
	switch e.Type {
	case Regular:
		err = c.regular(e, layer, to)
	case Symlink:
		err = c.root.Symlink(e.Link, to)
	case Fifo:
		err = c.root.Mknod(to, unix.S_IFIFO|0o600, 0, 0)
	default: // a device is of no use to a process
		err = c.root.Mknod(to, unix.S_IFREG|0o600, 0, 0)
	}
	if err != nil {
		return err
	}
	return dress(c.root, to, e, c.s.single)
}

func (c *partCopier) regular(e Entry, layer int, to string) error {
	in := &viewFile{info: fileInfo{&e}, view: c.view, layer: layer}
	if err := in.open(); err != nil {
		return err
	}
	defer in.Close()
	out, err := c.root.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(cloneFile(out, in.file), out.Close())
}
