package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// extend adds layers on top of m.
func (s *Store) extend(ctx context.Context, m *merged, more []Layer) error {
	if len(more) == 0 && m.files != nil {
		return nil
	}
	all := slices.Concat(m.layers, more)
	view, err := s.View(ctx, all)
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	dirs := make([]string, len(more))
	for i, l := range more {
		dirs[i] = filepath.Join(m.volume(), "layer-"+strconv.Itoa(i))
		g.Go(func() error { return s.extract(gctx, l, dirs[i]) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	root, err := rootfs.Open(m.root())
	if err != nil {
		return err
	}
	defer root.Close()
	a := &application{ctx: ctx, root: root, view: view, single: s.single, touched: map[string]bool{".": true}}
	for i, l := range more {
		x, err := s.index(ctx, l)
		if err != nil {
			return err
		}
		if err := a.layer(x, dirs[i]); err != nil {
			return fmt.Errorf("add layer %s: %w", l.DiffID, err)
		}
		if err := removeAll(dirs[i]); err != nil {
			return err
		}
	}
	if err := a.dress(); err != nil {
		return err
	}
	m.layers = all
	return m.learn(ctx, root, a.paths)
}

// learn brings m.files up to date after paths changed.
func (m *merged) learn(ctx context.Context, root *rootfs.Root, paths []string) error {
	if m.files != nil && len(paths) < 10000 {
		return m.files.refresh(root, paths)
	}
	var err error
	m.files, err = survey(ctx, root)
	return err
}

// extract unpacks l into the new directory dir, for one use: from its tree if there is one,
// else from a blob, without making a tree of the store.
func (s *Store) extract(ctx context.Context, l Layer, dir string) error {
	if !s.hasTree(l) {
		err := s.obtain(ctx, l, need{tree: true, into: dir})
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	tree, err := s.Tree(ctx, l)
	if err != nil {
		return err
	}
	return copyTree(ctx, tree, dir)
}

// application puts layers into a directory, lowest first, moving their files.
type application struct {
	ctx     context.Context
	root    *rootfs.Root
	view    *View // all layers, those that come later included
	single  bool
	touched map[string]bool // directories whose attributes are set in the end
	paths   []string        // all that was put there or removed
}

// layer moves what x lists from the unpacked layer at dir to the root.
func (a *application) layer(x *index, dir string) error {
	from, err := rootfs.Open(dir)
	if err != nil {
		return err
	}
	defer from.Close()
	source, err := newDirStack(from)
	if err != nil {
		return err
	}
	defer source.close()
	target, err := newDirStack(a.root)
	if err != nil {
		return err
	}
	defer target.close()
	plain := !x.deletes()
	skip := "" // a directory moved whole
	for e := range x.all() {
		if a.ctx.Err() != nil {
			return context.Cause(a.ctx)
		}
		a.paths = append(a.paths, e.Path)
		if skip != "" && beneath(e.Path, skip) || e.Path == "." {
			continue
		}
		whole, err := a.entry(e, source, target, plain)
		if err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		if whole {
			skip = e.Path
		}
	}
	return nil
}

// deletes says whether x has whiteouts or opaque directories.
func (x *index) deletes() bool {
	for i := range x.len() {
		if _, t := x.head(i); t == Whiteout || t == Opaque {
			return true
		}
	}
	return false
}

// entry puts one entry into the root. A directory that is new there is moved with all that is
// in it, if the layer deletes nothing; then whole is true.
func (a *application) entry(e Entry, source, target *dirStack, plain bool) (whole bool, err error) {
	if e.Path == "." {
		return false, nil
	}
	parent := path.Dir(e.Path)
	to, err := a.open(target, parent)
	if err != nil {
		return false, err
	}
	name := path.Base(e.Path)
	if e.Type == Opaque {
		return false, a.empty(target, e.Path)
	}
	st, err := to.Lstat(name)
	isDir := err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return false, err
	}
	if e.Type == Dir && isDir {
		a.touched[e.Path] = true
		return false, nil
	}
	a.touched[parent] = true
	if !missing && (isDir || e.Type == Dir || e.Type == Whiteout) {
		target.forget(e.Path)
		if err := to.RemoveAll(name); err != nil {
			return false, err
		}
	}
	switch {
	case e.Type == Whiteout:
		return false, nil
	case e.Type == Dir && !plain:
		a.touched[e.Path] = true
		return false, to.Mkdir(name, 0o700)
	}
	from, err := source.open(parent, false)
	if err != nil {
		return false, err
	}
	return e.Type == Dir, from.Rename(name, to, name)
}

// open opens a directory of the root; what the layers only imply is made.
func (a *application) open(target *dirStack, dir string) (*rootfs.Dir, error) {
	d, err := target.open(dir, false)
	if err == nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
		return d, err
	}
	parent, err := a.open(target, path.Dir(dir))
	if err != nil {
		return nil, err
	}
	if err := parent.RemoveAll(path.Base(dir)); err != nil { // a file that the layer implies to be a directory
		return nil, err
	}
	if err := parent.Mkdir(path.Base(dir), 0o700); err != nil {
		return nil, err
	}
	a.touched[dir], a.touched[path.Dir(dir)] = true, true
	return target.open(dir, false)
}

// empty removes what lower layers put into dir.
func (a *application) empty(target *dirStack, dir string) error {
	d, err := a.open(target, dir)
	if err != nil {
		return err
	}
	names, err := d.Names()
	if err != nil {
		return err
	}
	a.touched[dir] = true
	for _, name := range names {
		if err := d.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

// dress gives every directory that was touched the attributes it has in the view.
func (a *application) dress() error {
	names := make([]string, 0, len(a.touched))
	for dir := range a.touched {
		names = append(names, dir)
	}
	slices.SortFunc(names, comparePaths)
	for _, dir := range slices.Backward(names) {
		e, _, ok := a.view.lookup(dir)
		if !ok || e.Type != Dir {
			continue // a later layer took it away
		}
		if err := a.strip(dir, e.Xattrs); err != nil {
			return err
		}
		if err := dress(a.root, dir, e, a.single); err != nil {
			return err
		}
	}
	return nil
}

// strip removes the extended attributes that a lower layer gave to dir and that it has no more.
func (a *application) strip(dir string, kept map[string]string) error {
	d, err := a.root.Dir(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	xattrs, err := d.Xattrs(".", layerXattr)
	if err != nil {
		return err
	}
	for key := range xattrs {
		if _, ok := kept[key]; ok {
			continue
		}
		if err := d.RemoveXattr(".", key); err != nil {
			return err
		}
	}
	return nil
}

// putStubs makes the mount points that the layers lack, so that nobody sees when.
func (o *Overlay) putStubs() error {
	if len(o.stubs) == 0 {
		return nil
	}
	root, err := rootfs.Open(o.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, p := range o.stubPaths() {
		e := o.stubs[p]
		err := keepTime(root, path.Dir(p), func(d *rootfs.Dir) error {
			if e.Type == Dir {
				return errors.Join(d.Mkdir(path.Base(p), e.Mode), d.Chmod(path.Base(p), e.Mode))
			}
			return d.Mknod(path.Base(p), unix.S_IFREG|e.Mode, 0, 0)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (o *Overlay) stubPaths() []string {
	names := make([]string, 0, len(o.stubs))
	for p := range o.stubs {
		names = append(names, p)
	}
	slices.SortFunc(names, comparePaths)
	return names
}

// dropStubs removes the mount points that nobody used for anything else.
func (o *Overlay) dropStubs(root *rootfs.Root) error {
	for _, p := range slices.Backward(o.stubPaths()) {
		e := o.stubs[p]
		st, err := root.Lstat(p)
		if err != nil || !matches(e, st) || st.Mode&0o7777 != e.Mode || st.UID != 0 && !o.view.store.single {
			continue
		}
		err = keepTime(root, path.Dir(p), func(d *rootfs.Dir) error { return d.Remove(path.Base(p)) })
		if err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return nil
}

// keepTime does something in the directory p and puts its modification time back.
func keepTime(root *rootfs.Root, p string, do func(d *rootfs.Dir) error) error {
	d, err := root.Dir(p)
	if err != nil {
		return err
	}
	defer d.Close()
	st, err := d.Lstat(".")
	if err != nil {
		return err
	}
	return errors.Join(do(d), d.Chtimes(".", rootfs.Time{Sec: st.Sec, Nsec: st.Nsec}))
}

// removeMerged removes a merged directory; a subvolume goes at once where that is allowed.
func removeMerged(dir string) error {
	if destroySubvolume(filepath.Dir(dir), filepath.Base(dir)) == nil {
		return nil
	}
	return removeAll(dir)
}

// tick waits until the file system's clock has moved on since the last file of m changed:
// then whatever changes later has another change time.
func (m *merged) tick() error {
	f, err := os.CreateTemp(m.volume(), "tick-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	ctime := func() (unix.Timespec, error) {
		var st unix.Stat_t
		err := unix.Fstat(int(f.Fd()), &st)
		return st.Ctim, err
	}
	first, err := ctime()
	if err != nil {
		return err
	}
	nap := unix.Timespec{Nsec: 1e6}
	for range 3000 { // file systems that count in two seconds exist
		if err := unix.Nanosleep(&nap, nil); err != nil && err != unix.EINTR {
			return err
		}
		if err := unix.Fchmod(int(f.Fd()), 0o600); err != nil {
			return err
		}
		if now, err := ctime(); err != nil || now != first {
			return err
		}
	}
	return errors.New("the clock of the file system stands still")
}
