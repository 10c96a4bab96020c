package layer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"path"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// node is one file of an upper directory, and what a snapshot makes of it.
type node struct {
	Entry
	verdict  verdict
	emit     bool // an entry of the layer: it changed, or something inside it did
	inUpper  bool // else it is a deletion that the upper says by an opaque directory
	opaque   bool // a directory in which nothing of the lower layers shows
	unread   bool // a directory of which only lstat was asked
	new      bool // the lower layers have nothing at its path, nor below it
	inode    [2]uint64
	links    uint32
	nsec     int64   // of the mtime; the seconds are in ModTime
	content  []byte  // of a tiny file, which has its Digest then; nil if it was not read
	children []*node // sorted by name
}

type verdict byte

const (
	changed verdict = iota
	same            // as in the lower layers, but for the mtime of a directory
	void            // nothing a layer could hold: a socket, a whiteout of nothing
)

// walker reads an upper directory and compares each file with the layers below.
type walker struct {
	ctx    context.Context
	root   *rootfs.Root // the upper
	lower  func(path string) (*Entry, bool)
	below  *Overlay // where lower looks; nil if it never finds anything
	single bool
	group  errgroup.Group
	kept   atomic.Int64 // bytes of content in nodes

	mu     sync.Mutex
	doubts []doubt
}

// doubt is a file that only its content can tell from the one below it.
type doubt struct {
	node  *node
	lower digest.Digest
}

// walk returns the root of all files. The directories are read side by side: on a cold
// disk, and with tens of thousands of copied-up files, one at a time would take the longer.
func (w *walker) walk() (*node, error) {
	d, err := w.root.Dir(".")
	if err != nil {
		return nil, err
	}
	top, err := w.file(d, ".", ".")
	if err != nil {
		d.Close()
		return nil, err
	}
	w.group.SetLimit(runtime.GOMAXPROCS(0))
	err = w.dir(d, top)
	if waitErr := w.group.Wait(); err == nil {
		err = waitErr
	}
	if err != nil {
		return nil, err
	}
	return top, w.settleAll()
}

// part is how many files of a directory one goroutine looks at, if there is another one for more.
const part = 256

// dir reads the directory n, which is open as d, and closes it.
func (w *walker) dir(d *rootfs.Dir, n *node) error {
	defer d.Close()
	list, err := d.List()
	if err != nil {
		return err
	}
	n.children = make([]*node, len(list))
	var parts sync.WaitGroup
	defer parts.Wait()
	for at := 0; at < len(list); at += part {
		some, nodes := list[at:min(at+part, len(list))], n.children[at:]
		parts.Add(1)
		look := func() error {
			defer parts.Done()
			return w.files(d, n, some, nodes)
		}
		if len(nodes) > part && w.group.TryGo(look) {
			continue
		}
		if err := look(); err != nil {
			return err
		}
	}
	return nil
}

// files makes the nodes of some files in the directory n, which is open as d, and of all that is in them.
func (w *walker) files(d *rootfs.Dir, n *node, list []rootfs.Listed, nodes []*node) error {
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	for i, l := range list {
		c, err := w.listed(d, l, path.Join(n.Path, l.Name))
		if err != nil {
			return err
		}
		c.new = n.new
		w.compare(c)
		nodes[i] = c
		if c.Type != Dir {
			continue
		}
		c.opaque = c.opaque || n.opaque
		sub, err := d.Dir(l.Name)
		if err != nil {
			return err
		}
		if w.group.TryGo(func() error { return w.dir(sub, c) }) {
			continue
		}
		if err := w.dir(sub, c); err != nil {
			return err
		}
	}
	return nil
}

// Of a regular file all is asked for while it is open: that takes half the time of asking by name each time. The content
// of tiny ones is kept for the layer, as long as that is little.
const (
	tinyFile = 1 << 10
	keptMost = 4 << 20
)

// listed makes the node of one name in d, and does not compare it.
func (w *walker) listed(d *rootfs.Dir, l rootfs.Listed, p string) (*node, error) {
	if l.Type != unix.S_IFREG {
		return w.node(d, l.Name, p)
	}
	r, err := d.Read(l.Name)
	if err != nil {
		return w.node(d, l.Name, p) // that takes no permission to read
	}
	defer r.Close()
	st, err := r.Stat()
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return w.node(d, l.Name, p)
	}
	n := newNode(st, p)
	n.Type, n.Size = Regular, st.Size
	if size, err := unix.Flistxattr(r.Fd(), nil); err != nil || size > 0 {
		if err := w.xattrs(d, l.Name, n); err != nil {
			return nil, err
		}
	}
	if n.Size > 0 && n.Size <= tinyFile && n.links == 1 && w.kept.Add(n.Size) <= keptMost {
		n.read(r)
	}
	return n, nil
}

// read takes the content of n, unless it is not as long as it should be, which is for the [Writer] to say.
func (n *node) read(r *rootfs.Reader) {
	b := make([]byte, n.Size+1)
	if got, err := r.Read(b); err != nil || int64(got) != n.Size {
		return
	}
	n.content = b[:n.Size]
	n.Digest = digestOf(n.content)
}

func newNode(st rootfs.Stat, p string) *node {
	n := &node{inUpper: true, inode: [2]uint64{st.Dev, st.Ino}, links: st.Nlink, nsec: st.Nsec}
	n.Entry = Entry{Path: p, Mode: st.Mode & 0o7777, UID: st.UID, GID: st.GID, ModTime: st.Sec}
	return n
}

// file makes the node of one name in d and compares it.
func (w *walker) file(d *rootfs.Dir, name, p string) (*node, error) {
	n, err := w.node(d, name, p)
	if err == nil {
		w.compare(n)
	}
	return n, err
}

func (w *walker) node(d *rootfs.Dir, name, p string) (*node, error) {
	st, err := d.Lstat(name)
	if err != nil {
		return nil, err
	}
	n := newNode(st, p)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Type, n.Size = Regular, st.Size
	case unix.S_IFDIR:
		n.Type = Dir
	case unix.S_IFLNK:
		n.Type = Symlink
		n.Link, err = d.Readlink(name)
	case unix.S_IFIFO:
		n.Type = Fifo
	case unix.S_IFBLK:
		n.Type, n.Major, n.Minor = Block, st.Major, st.Minor
	case unix.S_IFCHR:
		n.Type, n.Major, n.Minor = Char, st.Major, st.Minor
		if st.Major == 0 && st.Minor == 0 {
			n.Entry = Entry{Path: p, Type: Whiteout}
		}
	default:
		n.verdict = void
		return n, nil
	}
	if (n.Type == Regular || n.Type == Dir) && mayHaveXattrs(d, name) {
		err = w.xattrs(d, name, n)
	}
	return n, err
}

// opaqueXattr marks an upper directory that hides the lower ones. trusted.overlay.opaque
// means nothing in a mount with userxattr: there it is an attribute that a process set.
const opaqueXattr = overlayXattrs + "opaque"

// xattrs reads the extended attributes of a file or directory; nothing else can have those
// that layers carry.
func (w *walker) xattrs(d *rootfs.Dir, name string, n *node) error {
	attrs, err := d.Xattrs(name, func(key string) bool {
		return key == opaqueXattr || layerXattr(key)
	})
	if err != nil {
		return err
	}
	if n.Type == Dir {
		n.opaque = attrs[opaqueXattr] == "y"
	}
	delete(attrs, opaqueXattr)
	if len(attrs) > 0 {
		n.Xattrs = attrs
	}
	return nil
}

// mayHaveXattrs asks by listxattrat (Linux 6.13) if name has extended attributes at all. Most files have none, and to find
// that out by a path through /proc, as [rootfs.Dir.Xattrs] must, takes as long as all else about a file.
func mayHaveXattrs(d *rootfs.Dir, name string) bool {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return true
	}
	n, _, errno := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(d.Fd()), uintptr(unsafe.Pointer(p)), unix.AT_SYMLINK_NOFOLLOW, 0, 0, 0)
	return errno != 0 || n > 0
}

// layerXattr says whether layers carry the attribute.
func layerXattr(key string) bool {
	return strings.HasPrefix(key, "user.") && !strings.HasPrefix(key, overlayXattrs) ||
		key == "security.capability"
}

// compare sets the verdict of n, and its owner where the disk does not have it.
func (w *walker) compare(n *node) {
	if n.verdict == void {
		return
	}
	var l *Entry
	ok := false
	if !n.new {
		l, ok = w.lower(n.Path)
		n.new = !ok
	}
	if n.Type == Whiteout {
		if !ok || w.below.isStub(n.Path) {
			n.verdict = void
		}
		return
	}
	alike := ok && l.Type == n.Type
	if w.single {
		n.UID, n.GID = 0, 0
		if alike {
			n.UID, n.GID = l.UID, l.GID
		}
	}
	if !alike || !sameAttributes(&n.Entry, l) || n.Type == Regular && !w.untouched(n) {
		return
	}
	if n.content != nil && n.Digest != l.Digest {
		return
	}
	if n.content == nil && n.Type == Regular && n.Size > 0 {
		w.mu.Lock()
		w.doubts = append(w.doubts, doubt{n, l.Digest})
		w.mu.Unlock()
		return
	}
	n.verdict = same
}

func sameAttributes(a, b *Entry) bool {
	return (a.Mode == b.Mode || a.Type == Symlink) && a.UID == b.UID && a.GID == b.GID &&
		a.Size == b.Size && a.Link == b.Link && a.Major == b.Major && a.Minor == b.Minor &&
		(a.ModTime == b.ModTime || a.Type == Dir) &&
		maps.Equal(a.Xattrs, visibleXattrs(b.Xattrs))
}

// settleAll reads the files that only their content can tell from what was there.
func (w *walker) settleAll() error {
	var hashes errgroup.Group
	hashes.SetLimit(runtime.GOMAXPROCS(0))
	for _, d := range w.doubts {
		hashes.Go(func() error { return w.settle(d) })
	}
	return hashes.Wait()
}

// settle reads the file of d.
func (w *walker) settle(d doubt) error {
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	f, err := w.open(d.node)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("read %s: %w", d.node.Path, err)
	}
	if "sha256:"+hex.EncodeToString(h.Sum(nil)) == string(d.lower) {
		d.node.verdict = same
	}
	return nil
}

// untouched compares the fraction of the mtime, which layers do not carry, with that of the unpacked file below: a
// copied-up file keeps it, one that was written again within the same second does not.
func (w *walker) untouched(n *node) bool {
	nsec, ok := w.below.nsec(n.Path)
	return !ok || nsec == n.nsec
}

func (w *walker) open(n *node) (io.ReadCloser, error) { return w.root.Read(n.Path) }
