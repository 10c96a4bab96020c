package layer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// A tree is a layer unpacked so that overlayfs can use it as a lower
// directory: a whiteout is a character device 0:0, an opaque directory has
// the attribute user.overlay.opaque=y.

// Tree returns the directory in which l is unpacked, and unpacks it if need be.
func (s *Store) Tree(ctx context.Context, l Layer) (string, error) {
	if err := checkDigest(l.DiffID); err != nil {
		return "", fmt.Errorf("unpack layer: %w", err)
	}
	if !s.hasTree(l) {
		if err := s.obtain(ctx, l, need{tree: true}); err != nil {
			return "", err
		}
	}
	return s.treePath(l), nil
}

// treePath is where the tree of l is that steps of this process use.
func (s *Store) treePath(l Layer) string {
	return filepath.Join(s.layerDir(l), s.treeOrigin().name())
}

// treesOf lists own, where l is or was unpacked for steps of this process, and where it is for those of others.
func (s *Store) treesOf(l Layer, own string) []string {
	others := slices.DeleteFunc(s.unpacked(l), func(tree string) bool { return tree == s.treePath(l) })
	return append([]string{own}, others...)
}

// unpacked lists where l is unpacked for whatever kind of process.
func (s *Store) unpacked(l Layer) (trees []string) {
	list, _ := os.ReadDir(s.layerDir(l)) // what is not there holds none
	for _, d := range list {
		if d.IsDir() && strings.HasPrefix(d.Name(), treeName) {
			trees = append(trees, filepath.Join(s.layerDir(l), d.Name()))
		}
	}
	return trees
}

// treeOrigin says under which circumstances a tree was made.
//
// Trees are not synced to disk: they are big, and most are never needed after
// a power cut. Instead a tree made before the last boot is compared with the
// index once, file by file. A tree made under another id map has other owners
// than it should: processes with another one have trees of their own, beside it,
// since steps of those that made it may be on it.
type treeOrigin struct {
	Boot   string `json:"boot"`
	IDs    string `json:"ids"`
	Single bool   `json:"singleID,omitempty"`
	Plain  bool   `json:"plain,omitempty"` // without whiteouts and opaque marks: of no use in an overlay
}

// treeName is what a tree is called, and what the names of others begin with.
const treeName = "tree"

// name is what trees of this origin are called, in whatever boot they were made.
func (o treeOrigin) name() string {
	const all = "0 0 4294967295 / 0 0 4294967295" // no user namespace
	if o.IDs == all && !o.Single && !o.Plain {
		return treeName
	}
	h := fnv.New32a()
	fmt.Fprint(h, o.IDs, o.Single, o.Plain)
	return treeName + "-" + strconv.FormatUint(uint64(h.Sum32()), 16)
}

func newTreeOrigin(single bool) treeOrigin {
	text := func(file string) string {
		b, _ := os.ReadFile(file) // no /proc: every tree is checked once a process
		return strings.Join(strings.Fields(string(b)), " ")
	}
	return treeOrigin{
		Boot:   text("/proc/sys/kernel/random/boot_id"),
		IDs:    text("/proc/self/uid_map") + " / " + text("/proc/self/gid_map"),
		Single: single,
	}
}

// treeOrigin is that of the trees which this process makes.
func (s *Store) treeOrigin() treeOrigin {
	made := s.origin
	made.Plain = s.merges()
	return made
}

// hasTree says whether there is a tree of l that was made since the last boot and that nobody wrote to.
func (s *Store) hasTree(l Layer) bool {
	c := s.inspect(l)
	return c != nil && c.wait(context.Background()) == nil
}

func (s *Store) trustTree(l Layer) {
	s.mu.Lock()
	s.compared[l.DiffID] = wholeTree
	delete(s.useless, l.DiffID)
	s.mu.Unlock()
	s.touch(s.layerDir(l))
}

func (s *Store) readOrigin(l Layer) (treeOrigin, error) {
	var made treeOrigin
	b, err := ReadFile(s.treePath(l) + ".json")
	if err != nil {
		return made, err
	}
	return made, json.Unmarshal(b, &made)
}

// adoptTree makes a tree of unknown state trusted if it is what x says.
func (s *Store) adoptTree(ctx context.Context, l Layer, x *index) error {
	made, err := s.readOrigin(l)
	if err != nil {
		made = s.treeOrigin() // its maker died, or the disk lost it: reading all tells
		made.Boot = ""
	}
	if made.name() != s.treeOrigin().name() {
		return errors.New("tree has another name than it should")
	}
	check := treeCheck{dir: s.treePath(l), x: x, plain: made.Plain, single: s.single, deep: made.Boot == "" || made.Boot != s.origin.Boot}
	if err := check.run(ctx); err != nil {
		if _, gone := os.Lstat(s.treePath(l)); gone == nil && ctx.Err() == nil {
			s.repaired("tree of layer %s", l.DiffID)
		}
		return err
	}
	return s.markTree(l)
}

func (s *Store) markTree(l Layer) error {
	b, err := json.Marshal(s.treeOrigin())
	if err != nil {
		return err
	}
	if err := s.putFile(s.treePath(l)+".json", b); err != nil {
		return err
	}
	s.trustTree(l)
	return nil
}

func matches(e Entry, st rootfs.Stat) bool {
	kind := st.Mode & unix.S_IFMT
	switch e.Type {
	case Regular:
		return kind == unix.S_IFREG && st.Size == e.Size
	case Hardlink: // whether it is one, who looks at the other name knows
		return kind != unix.S_IFDIR
	case Dir:
		return kind == unix.S_IFDIR
	case Symlink:
		return kind == unix.S_IFLNK && st.Size == int64(len(e.Link))
	case Whiteout:
		return kind == unix.S_IFCHR
	}
	return true // devices may be stand-ins
}

// putTree makes dir the tree of l, or removes it if l has one.
func (s *Store) putTree(l Layer, dir string) error {
	if err := os.MkdirAll(s.layerDir(l), 0o755); err != nil {
		return err
	}
	err := os.Rename(dir, s.treePath(l))
	if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY) {
		return removeAll(dir)
	}
	if errors.Is(err, unix.EACCES) {
		// To move a directory one must be able to write it: its ".." changes.
		err = moveReadOnly(dir, s.treePath(l))
	}
	if err != nil {
		return err
	}
	return s.markTree(l)
}

func moveReadOnly(dir, to string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	if err := os.Rename(dir, to); err != nil {
		return err
	}
	return errors.Join(os.Chmod(to, info.Mode()), os.Chtimes(to, info.ModTime(), info.ModTime()))
}

// dropTree moves an untrusted tree of l out of the way, and returns where it is then: in dir. One that was whole since the
// last boot may have steps of other processes on it, who see what is removed vanish; it stays with the layer.
func (s *Store) dropTree(l Layer, dir string) (to string) {
	if made, err := s.readOrigin(l); err == nil && made.Boot == s.origin.Boot {
		if kept, err := os.MkdirTemp(s.layerDir(l), "lost-"); err == nil {
			dir = kept
			defer os.Remove(kept) // if there was no tree
		}
	}
	to = filepath.Join(dir, "old")
	if err := os.Rename(s.treePath(l), to); errors.Is(err, unix.EACCES) {
		_ = moveReadOnly(s.treePath(l), to)
	}
	return to
}

// rebuild makes what k asks for from index and tree of l, and fails if they
// do not make exactly l's tar, as of most layers that filo did not write.
func (s *Store) rebuild(ctx context.Context, l Layer, k Sinks, x *index, dir string) error {
	root, err := rootfs.Open(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	w, err := s.newWriter(ctx, k, "")
	if err != nil {
		return err
	}
	defer w.Abort()
	w.expect = l.DiffID
	err = w.AddAll(func(yield func(File) bool) {
		for e := range x.all() {
			if !yield(File{Entry: e, Open: func() (io.ReadCloser, error) { return root.Read(e.Path) }}) {
				return
			}
		}
	})
	if errors.Is(err, ErrChanged) { // that is for files of the build
		err = fmt.Errorf("%w: %v", errDamagedTree, err)
	}
	if err != nil {
		return err
	}
	_, err = w.Close()
	return err
}

// reindex makes the index of l from a tree of it, if that still says all that
// the layer says.
func (s *Store) reindex(ctx context.Context, l Layer, tree string) error {
	root, err := rootfs.Open(tree)
	if err != nil {
		return err
	}
	defer root.Close()
	nothing := func(string) (*Entry, bool) { return nil, false }
	files := walker{ctx: ctx, root: root, lower: nothing, single: s.single}
	top, err := files.walk()
	if err != nil {
		return err
	}
	linkUp(top)
	w, err := s.newWriter(ctx, Sinks{}, "")
	if err != nil {
		return err
	}
	defer w.Abort()
	w.expect = l.DiffID
	err = w.AddAll(files.some(top, func(n *node) bool {
		// Whether the layer has an entry for its root the tree doesn't tell; those that filo makes seldom have one.
		return n.Path != "." && (n.verdict != void || n.Type == Whiteout)
	}))
	if err == nil {
		_, err = w.Close()
	}
	return err
}

// tree unpacks entries into a directory. All paths are taken relative to open
// directories and no link is followed, so that nothing gets outside.
type tree struct {
	root   *rootfs.Root
	dirs   *dirStack
	single bool
	plain  bool
}

func (s *Store) newTree(dir string) (*tree, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := rootfs.Open(dir)
	if err != nil {
		return nil, err
	}
	dirs, err := newDirStack(root)
	if err != nil {
		root.Close()
		return nil, err
	}
	return &tree{root: root, dirs: dirs, single: s.single, plain: s.merges()}, nil
}

func (t *tree) close() {
	t.dirs.close()
	t.root.Close()
}

// add makes what e says, unless it is a Regular, see create, or something
// that finish makes. Directories get their attributes in finish: entries
// still have to be put in them.
func (t *tree) add(e Entry) error {
	if e.Type == Whiteout || e.Type == Opaque || e.Path == "." {
		return nil
	}
	dir, err := t.dirs.open(path.Dir(e.Path), true)
	if err != nil {
		return err
	}
	name := path.Base(e.Path)
	switch e.Type {
	case Dir:
		return dir.Mkdir(name, 0o700)
	case Symlink:
		err = dir.Symlink(e.Link, name)
	case Hardlink:
		return t.link(e, dir, name)
	case Char:
		err = t.device(dir, name, unix.S_IFCHR, e)
	case Block:
		err = t.device(dir, name, unix.S_IFBLK, e)
	case Fifo:
		err = dir.Mknod(name, unix.S_IFIFO|0o600, 0, 0)
	default:
		err = fmt.Errorf("unknown type %q", byte(e.Type))
	}
	if err != nil {
		return err
	}
	return t.dress(dir, name, e)
}

func (t *tree) link(e Entry, dir *rootfs.Dir, name string) error {
	from, err := t.root.Dir(".")
	if err != nil {
		return err
	}
	defer func() { from.Close() }()
	target, rest, deeper := strings.Cut(e.Link, "/")
	for ; deeper; target, rest, deeper = strings.Cut(rest, "/") {
		next, err := from.Dir(target)
		if err != nil {
			return err
		}
		from.Close()
		from = next
	}
	return dir.Link(from, target, name)
}

// device makes an empty file where the kernel allows no device: in every user
// namespace. The index has the truth, and a RUN finds no device nodes of its
// image usable in any case.
func (t *tree) device(dir *rootfs.Dir, name string, kind uint32, e Entry) error {
	err := dir.Mknod(name, kind|0o600, e.Major, e.Minor)
	if errors.Is(err, unix.EPERM) || e.Type == Char && e.Major == 0 && e.Minor == 0 && err == nil {
		// 0:0 made as asked would be a whiteout.
		if err == nil {
			if err := dir.Remove(name); err != nil {
				return err
			}
		}
		return dir.Mknod(name, unix.S_IFREG|0o600, 0, 0)
	}
	return err
}

// dress sets the attributes of name as e has them.
func (t *tree) dress(dir *rootfs.Dir, name string, e Entry) error {
	if err := dir.Chown(name, e.UID, e.GID); err != nil && !t.excuse(err) {
		return err
	}
	if e.Type != Symlink {
		if err := dir.Chmod(name, e.Mode); err != nil {
			return err
		}
	}
	for _, key := range slices.Sorted(maps.Keys(e.Xattrs)) {
		if err := dir.SetXattr(name, key, e.Xattrs[key]); err != nil && !t.excuseXattr(e, err) {
			return err
		}
	}
	return dir.Chtimes(name, rootfs.Time{Sec: e.ModTime})
}

// excuse says whether err of chown only means that there are no other owners:
// EPERM without any privilege, EINVAL for an id that a user namespace lacks.
func (t *tree) excuse(err error) bool {
	return t.single && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL))
}

// excuseXattr: only files and directories can have user attributes, and not
// every file system has any.
func (t *tree) excuseXattr(e Entry, err error) bool {
	if errors.Is(err, unix.EOPNOTSUPP) || t.single && errors.Is(err, unix.EPERM) {
		return true
	}
	return e.Type != Regular && e.Type != Dir && errors.Is(err, unix.EPERM)
}

// remove removes path and what is below it.
func (t *tree) remove(p string) error {
	t.dirs.forget(p)
	dir, err := t.dirs.open(path.Dir(p), false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // of implied directories only those are made that something is in
	}
	if err != nil {
		return err
	}
	return dir.RemoveAll(path.Base(p))
}

// finish makes whiteouts and opaque directories and sets the attributes of
// all directories, each after those inside it.
func (t *tree) finish(x *index) error {
	var open []Entry
	leave := func() error {
		e := open[len(open)-1]
		open = open[:len(open)-1]
		return t.dressDir(e)
	}
	rooted := false
	for e := range x.all() {
		if t.plain && (e.Type == Opaque || e.Type == Whiteout) {
			continue
		}
		if e.Type == Opaque {
			if err := t.makeOpaque(e.Path); err != nil {
				return fmt.Errorf("make %s opaque: %w", e.Path, err)
			}
			continue
		}
		for len(open) > 0 && !beneath(e.Path, open[len(open)-1].Path) {
			if err := leave(); err != nil {
				return err
			}
		}
		switch e.Type {
		case Dir:
			open = append(open, e)
			rooted = rooted || e.Path == "."
		case Whiteout:
			if err := t.makeWhiteout(e.Path); err != nil {
				return err
			}
		}
	}
	for len(open) > 0 {
		if err := leave(); err != nil {
			return err
		}
	}
	for _, p := range x.impliedDirs() {
		if err := t.dressDir(impliedDir(p)); err != nil {
			return err
		}
	}
	if !rooted {
		return t.dressDir(impliedDir("."))
	}
	return nil
}

func (t *tree) dressDir(e Entry) error {
	dir, err := t.dirs.open(path.Dir(e.Path), true)
	if err != nil {
		return err
	}
	return t.dress(dir, path.Base(e.Path), e)
}

func (t *tree) makeOpaque(p string) error {
	dir, err := t.dirs.open(p, true)
	if err != nil {
		return err
	}
	return dir.SetXattr(".", overlayXattrs+"opaque", "y")
}

func (t *tree) makeWhiteout(p string) error {
	dir, err := t.dirs.open(path.Dir(p), true)
	if err != nil {
		return err
	}
	return dir.Mknod(path.Base(p), unix.S_IFCHR, 0, 0)
}

// treeFile is a regular file of a tree while it is written.
type treeFile struct {
	tree *tree
	dir  *rootfs.Dir
	name string
	fd   int
	size int64 // so far, holes included
	hole int64 // zeros at the end that are not written yet
}

// create begins the Regular file at p; write and finish complete it.
func (t *tree) create(p string) (*treeFile, error) {
	dir, err := t.dirs.open(path.Dir(p), true)
	if err != nil {
		return nil, err
	}
	// Not dir.Create: an os.File costs three system calls more, for each file of an image.
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	f := &treeFile{tree: t, dir: dir, name: path.Base(p), fd: -1}
	err = retry(func() (err error) {
		f.fd, err = unix.Openat(dir.Fd(), f.name, flags, 0o600)
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "create", Path: p, Err: err}
	}
	return f, nil
}

const holeSize = 64 << 10

var zeros [holeSize]byte

// write appends b; aligned runs of zeros are left out, as holes.
func (f *treeFile) write(b []byte) error {
	for len(b) > 0 {
		n := min(len(b), int(holeSize-f.size%holeSize))
		if n == holeSize && bytes.Equal(b[:n], zeros[:]) {
			f.hole += holeSize
		} else if err := f.put(b[:n]); err != nil {
			return err
		}
		f.size += int64(n)
		b = b[n:]
	}
	return nil
}

func (f *treeFile) put(b []byte) error {
	if f.hole > 0 {
		if _, err := unix.Seek(f.fd, f.hole, unix.SEEK_CUR); err != nil {
			return err
		}
		f.hole = 0
	}
	for len(b) > 0 {
		n, err := unix.Write(f.fd, b)
		if err != nil && err != unix.EINTR {
			return &fs.PathError{Op: "write", Path: f.name, Err: err}
		}
		b = b[max(n, 0):]
	}
	return nil
}

// finish sets length and attributes.
func (f *treeFile) finish(e Entry) error {
	if f.hole > 0 {
		if err := retry(func() error { return unix.Ftruncate(f.fd, f.size) }); err != nil {
			return err
		}
	}
	if err := unix.Fchown(f.fd, e.UID, e.GID); err != nil && !f.tree.excuse(err) {
		return &fs.PathError{Op: "chown", Path: e.Path, Err: err}
	}
	if err := unix.Fchmod(f.fd, e.Mode); err != nil {
		return &fs.PathError{Op: "chmod", Path: e.Path, Err: err}
	}
	for _, key := range slices.Sorted(maps.Keys(e.Xattrs)) {
		err := unix.Fsetxattr(f.fd, key, []byte(e.Xattrs[key]), 0)
		if err != nil && !f.tree.excuseXattr(e, err) {
			return &fs.PathError{Op: "setxattr " + key, Path: e.Path, Err: err}
		}
	}
	if err := f.dir.Chtimes(f.name, rootfs.Time{Sec: e.ModTime}); err != nil {
		return err
	}
	return f.close()
}

// close gives the file up; after finish it does nothing.
func (f *treeFile) close() error {
	if f.fd < 0 {
		return nil
	}
	fd := f.fd
	f.fd = -1
	return unix.Close(fd)
}

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// dirStack keeps the directories on the way to the last path open, since the
// next path is most often near.
type dirStack struct {
	names []string
	dirs  []*rootfs.Dir // dirs[0] is the root, dirs[i+1] is names[i] in dirs[i]
	last  string        // path of the last of dirs; "" if it has to be found out
}

// maxStack bounds the open descriptors; overlays and tars of real images are
// nowhere near.
const maxStack = 500

func newDirStack(root *rootfs.Root) (*dirStack, error) {
	d, err := root.Dir(".")
	if err != nil {
		return nil, err
	}
	return &dirStack{dirs: []*rootfs.Dir{d}}, nil
}

func (s *dirStack) close() { s.cut(-1) }

// cut closes all directories but the root and the first n below it.
func (s *dirStack) cut(n int) {
	for len(s.dirs) > n+1 {
		s.dirs[len(s.dirs)-1].Close()
		s.dirs = s.dirs[:len(s.dirs)-1]
	}
	s.names = s.names[:max(0, min(n, len(s.names)))]
	s.last = ""
}

// open returns the directory p; it stays open until the next call. With mk
// directories that are missing are made.
func (s *dirStack) open(p string, mk bool) (*rootfs.Dir, error) {
	if p == s.last {
		return s.dirs[len(s.dirs)-1], nil
	}
	var names []string
	if p != "." {
		names = strings.Split(p, "/")
	}
	if len(names) > maxStack {
		return nil, fmt.Errorf("open %.40s…: nested more than %d directories deep", p, maxStack)
	}
	same := 0
	for same < len(names) && same < len(s.names) && names[same] == s.names[same] {
		same++
	}
	s.cut(same)
	for _, name := range names[same:] {
		last := s.dirs[len(s.dirs)-1]
		d, err := last.Dir(name)
		if mk && errors.Is(err, fs.ErrNotExist) {
			if err = last.Mkdir(name, 0o700); err == nil {
				d, err = last.Dir(name)
			}
		}
		if err != nil {
			return nil, err
		}
		s.names = append(s.names, name)
		s.dirs = append(s.dirs, d)
	}
	s.last = p
	return s.dirs[len(s.dirs)-1], nil
}

// forget closes p and what is below it, because it goes away.
func (s *dirStack) forget(p string) {
	names := strings.Split(p, "/")
	if len(names) <= len(s.names) && slices.Equal(names, s.names[:len(names)]) {
		s.cut(len(names) - 1)
	}
}

// touch notes that a layer is in use; see Prune. It is only a hint.
func (s *Store) touch(p string) {
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}, 0)
}
