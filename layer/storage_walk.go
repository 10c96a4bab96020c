package layer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// known is what lstat said of a file and of all that is in it. Whoever changes a file
// changes its ctime, so that equal means untouched.
type known struct {
	name string
	kids []known // sorted by name

	mode, uid, gid uint32
	rdev, ino      uint64
	size           int64
	mtime, ctime   [2]int64
}

func newKnown(name string, st *unix.Stat_t) known {
	return known{
		name: name, mode: st.Mode, uid: st.Uid, gid: st.Gid, rdev: uint64(st.Rdev), ino: st.Ino, size: st.Size,
		mtime: [2]int64{int64(st.Mtim.Sec), int64(st.Mtim.Nsec)}, ctime: [2]int64{int64(st.Ctim.Sec), int64(st.Ctim.Nsec)},
	}
}

// untouched says whether o describes the file as k does.
func (k *known) untouched(o *known) bool {
	return k != nil && k.mode == o.mode && k.uid == o.uid && k.gid == o.gid && k.ino == o.ino &&
		k.size == o.size && k.rdev == o.rdev && k.mtime == o.mtime && k.ctime == o.ctime
}

func (k *known) isDir() bool { return k != nil && k.mode&unix.S_IFMT == unix.S_IFDIR }

// find returns what is known of the path p in the directory k, nil for nothing.
func (k *known) find(p string) *known {
	if p == "." {
		return k
	}
	for name := range strings.SplitSeq(p, "/") {
		i, ok := k.search(name)
		if !ok {
			return nil
		}
		k = &k.kids[i]
	}
	return k
}

func (k *known) search(name string) (int, bool) {
	return slices.BinarySearchFunc(k.kids, name, func(c known, name string) int { return strings.Compare(c.name, name) })
}

func (k *known) clone() *known {
	c := *k
	c.kids = slices.Clone(k.kids)
	for i := range c.kids {
		c.kids[i] = *c.kids[i].clone()
	}
	return &c
}

// refresh looks at paths again, and at the directories they are in. What it leaves out or
// does not know is found to have changed later, and compared.
func (k *known) refresh(root *rootfs.Root, paths []string) error {
	dirs, err := newDirStack(root)
	if err != nil {
		return err
	}
	defer dirs.close()
	for _, p := range paths {
		if p == "." {
			continue
		}
		parent := k.find(path.Dir(p))
		if parent == nil {
			continue
		}
		d, err := dirs.open(path.Dir(p), false)
		if err != nil {
			continue // its directory was taken away, by what comes later in paths
		}
		fresh, err := lstat(d.Fd(), path.Base(p))
		i, ok := parent.search(path.Base(p))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if ok {
				parent.kids = slices.Delete(parent.kids, i, i+1)
			}
			continue
		case err != nil:
			return &fs.PathError{Op: "lstat", Path: p, Err: err}
		}
		if !ok {
			parent.kids = slices.Insert(parent.kids, i, fresh)
			continue
		}
		if fresh.isDir() && parent.kids[i].isDir() {
			fresh.kids = parent.kids[i].kids
		}
		parent.kids[i] = fresh
	}
	return nil
}

func lstat(dir int, name string) (known, error) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	return newKnown(name, &st), err
}

// survey looks at every file in root.
func survey(ctx context.Context, root *rootfs.Root) (*known, error) {
	k := &known{}
	w := &statWalk{ctx: ctx, root: root}
	_, err := w.walk(k)
	return k, err
}

// statWalk goes through a merged directory by lstat alone, side by side. Files that changed
// are handed to the walker; without one there is nothing to compare with.
type statWalk struct {
	ctx    context.Context
	root   *rootfs.Root
	walker *walker
	group  errgroup.Group

	mu     sync.Mutex
	before map[string]known // what was known of files that changed, without what is in them
}

// walk returns the nodes of all that changed since k was made, and brings k up to date.
func (w *statWalk) walk(k *known) (*node, error) {
	w.before = map[string]known{}
	d, err := w.root.Dir(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	now, err := lstat(d.Fd(), ".")
	if err != nil {
		return nil, err
	}
	var top *node
	if w.walker != nil {
		if top, err = w.node(d, ".", k, &now); err != nil {
			return nil, err
		}
	}
	w.become(".", k, &now)
	fd, err := openDir(d.Fd(), ".")
	if err != nil {
		return nil, err
	}
	w.group.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	err = w.dir(fd, ".", top, k)
	return top, errors.Join(err, w.group.Wait())
}

func openDir(at int, name string) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// become makes k what now is, with what is in k.
func (w *statWalk) become(p string, k, now *known) {
	if w.walker != nil && !k.untouched(now) {
		old := *k
		old.kids = nil
		w.mu.Lock()
		w.before[p] = old
		w.mu.Unlock()
	}
	kids := k.kids
	*k = *now
	if k.isDir() {
		k.kids = kids
	}
}

// dir goes through the directory p, which is open as fd, and closes it.
func (w *statWalk) dir(fd int, p string, n *node, k *known) error {
	defer unix.Close(fd)
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	l := listing{fd: fd, k: k, seen: make([]bool, len(k.kids))}
	if err := l.read(); err != nil {
		return &fs.PathError{Op: "read directory", Path: p, Err: err}
	}
	if err := w.change(&l, p, n); err != nil {
		return err
	}
	for i := range k.kids {
		c := &k.kids[i]
		if !c.isDir() {
			continue
		}
		if err := w.sub(fd, path.Join(p, c.name), n, c); err != nil {
			return err
		}
	}
	if n != nil {
		slices.SortFunc(n.children, func(a, b *node) int { return strings.Compare(a.Path, b.Path) })
	}
	return nil
}

// sub goes into a directory, in a goroutine of its own if there is one to be had.
func (w *statWalk) sub(at int, p string, parent *node, k *known) error {
	fd, err := openDir(at, k.name)
	if err != nil {
		return &fs.PathError{Op: "open", Path: p, Err: err}
	}
	var n *node
	if parent != nil {
		n = parent.child(p)
	}
	if n == nil && parent != nil {
		n = &node{inUpper: true, verdict: same, unread: true}
		n.Entry = Entry{Path: p, Type: Dir, Mode: k.mode & 0o7777, UID: int(k.uid), GID: int(k.gid), ModTime: k.mtime[0]}
		parent.children = append(parent.children, n)
	}
	if w.group.TryGo(func() error { return w.dir(fd, p, n, k) }) {
		return nil
	}
	return w.dir(fd, p, n, k)
}

// child finds a child among those that changed, which are few.
func (n *node) child(p string) *node {
	for _, c := range n.children {
		if c.Path == p {
			return c
		}
	}
	return nil
}

// change makes nodes of what changed directly in the directory p, and l.k of what is there.
func (w *statWalk) change(l *listing, p string, n *node) error {
	gone := slices.Contains(l.seen, false)
	if len(l.changed) == 0 && !gone {
		return nil
	}
	if n != nil {
		if err := w.nodes(l, p, n); err != nil {
			return err
		}
	}
	var fresh []known
	for i := range l.changed {
		now := &l.changed[i]
		if at, ok := l.k.search(now.name); ok {
			w.become(path.Join(p, now.name), &l.k.kids[at], now)
		} else {
			fresh = append(fresh, *now)
		}
	}
	if gone {
		kids := make([]known, 0, len(l.k.kids)+len(fresh))
		for i, c := range l.k.kids {
			if l.seen[i] {
				kids = append(kids, c)
			}
		}
		l.k.kids = kids
	}
	if len(fresh) > 0 {
		l.k.kids = append(l.k.kids, fresh...)
		slices.SortFunc(l.k.kids, func(a, b known) int { return strings.Compare(a.name, b.name) })
	}
	return nil
}

// nodes makes nodes of what changed in the directory of n.
func (w *statWalk) nodes(l *listing, p string, n *node) error {
	var d *rootfs.Dir
	for i := range l.changed {
		now := &l.changed[i]
		if d == nil {
			var err error
			if d, err = w.root.Dir(p); err != nil {
				return err
			}
			defer d.Close()
		}
		c, err := w.walker.file(d, now.name, path.Join(p, now.name))
		if err != nil {
			return err
		}
		n.children = append(n.children, c)
	}
	for i, seen := range l.seen {
		if seen {
			continue
		}
		c := &node{Entry: Entry{Path: path.Join(p, l.k.kids[i].name), Type: Whiteout}}
		w.walker.compare(c)
		n.children = append(n.children, c)
	}
	return nil
}

// node makes the node of the root. Of a directory that did not change, extended attributes are
// read when it turns out that they are needed.
func (w *statWalk) node(d *rootfs.Dir, p string, was, now *known) (*node, error) {
	if !was.untouched(now) {
		return w.walker.file(d, ".", p)
	}
	n := &node{inUpper: true, verdict: same, unread: true}
	n.Entry = Entry{Path: p, Type: Dir, Mode: now.mode & 0o7777, UID: int(now.uid), GID: int(now.gid), ModTime: now.mtime[0]}
	return n, nil
}

// listing compares a directory with what is known of it. Hundreds of thousands of files pass
// here in every step, and nearly all of them are as they were: for those nothing is allocated.
type listing struct {
	fd      int
	k       *known
	seen    []bool // by index in k.kids
	changed []known
	st      unix.Stat_t
}

const direntBuffer = 16 << 10

var direntBuffers = sync.Pool{New: func() any { b := make([]byte, direntBuffer); return &b }}

func (l *listing) read() error {
	buf := direntBuffers.Get().(*[]byte)
	defer direntBuffers.Put(buf)
	for {
		n, err := unix.Getdents(l.fd, *buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return err
		}
		for rest := (*buf)[:n]; len(rest) > 0; {
			size := int(binary.NativeEndian.Uint16(rest[direntReclen:]))
			if err := l.one(rest[direntName:size]); err != nil {
				return err
			}
			rest = rest[size:]
		}
	}
}

// Of struct linux_dirent64, which is the same on all architectures.
const (
	direntReclen = 16
	direntName   = 19
)

// one looks at the file whose name begins raw and ends with a NUL.
func (l *listing) one(raw []byte) error {
	end := bytes.IndexByte(raw, 0)
	if end < 0 {
		return unix.EIO
	}
	name := raw[:end]
	if string(name) == "." || string(name) == ".." {
		return nil
	}
	text := unsafe.String(&raw[0], end) // lives no longer than the buffer
	if err := retry(func() error { return unix.Fstatat(l.fd, text, &l.st, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return err
	}
	now := newKnown("", &l.st)
	i, ok := sort.Find(len(l.k.kids), func(i int) int { return compareName(name, l.k.kids[i].name) })
	if ok {
		l.seen[i] = true
		if l.k.kids[i].untouched(&now) {
			return nil
		}
		now.name = l.k.kids[i].name
	} else {
		now.name = string(name)
	}
	l.changed = append(l.changed, now)
	return nil
}

func compareName(a []byte, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return int(a[i]) - int(b[i])
		}
	}
	return len(a) - len(b)
}

// nsec is the fraction of the mtime of the file at p before the step.
func (m *merged) nsec(p string) (int64, bool) {
	k := m.files.find(p)
	if k == nil {
		return 0, false
	}
	return k.mtime[1], true
}

// snapshotMerged is Snapshot of a merged directory: one walk finds what is not as it was.
func (s *Store) snapshotMerged(ctx context.Context, o *Overlay, sinks Sinks) (Layer, error) {
	m := o.merged
	if m == nil {
		return Layer{}, errors.New("snapshot: the overlay is closed")
	}
	root, err := rootfs.Open(o.Root)
	if err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	defer root.Close()
	if err := o.dropStubs(root); err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	w := &walker{ctx: ctx, root: root, lower: o.entry, below: o, single: s.single}
	walk := &statWalk{ctx: ctx, root: root, walker: w}
	top, err := walk.walk(m.files)
	if err == nil {
		err = w.settleAll()
	}
	if err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	linkNew(top, walk.before)
	mark(top)
	l, err := s.recordMerged(w, top, sinks)
	if err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	again, err := tidy(root, top, walk.before, sinks.Epoch)
	if err == nil {
		err = m.files.refresh(root, again)
	}
	if err != nil {
		return Layer{}, fmt.Errorf("snapshot: %w", err)
	}
	m.layers = append(slices.Clone(m.layers), l)
	o.merged = nil
	return l, s.giveBack(m)
}

func (s *Store) recordMerged(w *walker, top *node, sinks Sinks) (Layer, error) {
	if err := w.readEmitted(top); err != nil {
		return Layer{}, err
	}
	writer, err := s.Create(w.ctx, sinks)
	if err != nil {
		return Layer{}, err
	}
	defer writer.Abort()
	if err := writer.AddAll(w.emitted(top)); err != nil {
		return Layer{}, err
	}
	return writer.Close()
}

// readEmitted completes the directories that are entries only because of what is in them.
func (w *walker) readEmitted(top *node) error {
	var errs error
	top.each(func(n *node) {
		if errs != nil || !n.emit || !n.unread {
			return
		}
		d, name, err := w.root.Parent(n.Path)
		if err != nil {
			errs = err
			return
		}
		defer d.Close()
		errs = w.xattrs(d, name, n)
		if l, ok := w.lower(n.Path); ok && w.single {
			n.UID, n.GID = l.UID, l.GID
		}
	})
	return errs
}

// linkNew is linkUp for a merged directory. There the names of a file from below are one file
// still, when an overlay has made a copy for each that was touched; so it is here. A file that
// had one name is one copy in both, whatever names it got.
func linkNew(top *node, before map[string]known) {
	old := func(n *node) bool { k, ok := before[n.Path]; return ok && k.ino == n.inode[1] }
	names := map[[2]uint64]int{} // that a file had before
	top.each(func(n *node) {
		if n.hasNames() && old(n) {
			names[n.inode]++
		}
	})
	first := map[[2]uint64]*node{}
	top.each(func(n *node) {
		if n.hasNames() && !(names[n.inode] > 1 && old(n)) {
			n.linkTo(first)
		}
	})
}

// tidy gives files the times that the layer has for them, and directories that are none of
// its entries the times they had. It returns the paths it changed.
func tidy(root *rootfs.Root, top *node, before map[string]known, epoch *int64) (paths []string, err error) {
	t := trimmer{epoch: epoch}
	top.each(func(n *node) {
		if err != nil || !n.inUpper || n.Path == "." || n.verdict == void {
			return
		}
		to := rootfs.Time{}
		k, ok := before[n.Path]
		switch {
		case n.emit && t.late(n):
			to.Sec = *epoch
		case !n.emit && n.Type == Dir && !n.unread && ok:
			to = rootfs.Time{Sec: k.mtime[0], Nsec: k.mtime[1]}
		default:
			return
		}
		err = root.Set(n.Path, rootfs.Attr{Time: &to})
		paths = append(paths, n.Path)
	})
	return paths, err
}
