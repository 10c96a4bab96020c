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
	inode    [2]uint64
	links    uint32
	nsec     int64   // of the mtime; the seconds are in ModTime
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
	workers := runtime.GOMAXPROCS(0)
	w.group.SetLimit(workers)
	err = w.dir(d, top)
	if waitErr := w.group.Wait(); err == nil {
		err = waitErr
	}
	if err != nil {
		return nil, err
	}
	var hashes errgroup.Group
	hashes.SetLimit(workers)
	for _, d := range w.doubts {
		hashes.Go(func() error { return w.settle(d) })
	}
	return top, hashes.Wait()
}

// dir reads the directory n, which is open as d, and closes it.
func (w *walker) dir(d *rootfs.Dir, n *node) error {
	defer d.Close()
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	list, err := d.List()
	if err != nil {
		return err
	}
	n.children = make([]*node, 0, len(list))
	for _, l := range list {
		name := l.Name
		c, err := w.file(d, name, path.Join(n.Path, name))
		if err != nil {
			return err
		}
		n.children = append(n.children, c)
		if c.Type != Dir {
			continue
		}
		c.opaque = c.opaque || n.opaque
		sub, err := d.Dir(name)
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

// file makes the node of one name in d.
func (w *walker) file(d *rootfs.Dir, name, p string) (*node, error) {
	st, err := d.Lstat(name)
	if err != nil {
		return nil, err
	}
	n := &node{inUpper: true, inode: [2]uint64{st.Dev, st.Ino}, links: st.Nlink, nsec: st.Nsec}
	n.Entry = Entry{Path: p, Mode: st.Mode & 0o7777, UID: st.UID, GID: st.GID, ModTime: st.Sec}
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
	if n.Type == Regular || n.Type == Dir {
		err = w.xattrs(d, name, n)
	}
	if err == nil {
		w.compare(n)
	}
	return n, err
}

// opaqueXattr marks an upper directory that hides the lower ones. trusted.overlay.opaque
// means nothing in a mount with userxattr: there it is an attribute that a process set.
const opaqueXattr = overlayXattrs + "opaque"

// xattrs reads the extended attributes of a file or directory; nothing else can have those
// that layers carry.
func (w *walker) xattrs(d *rootfs.Dir, name string, n *node) error {
	if !mayHaveXattrs(d, name) {
		return nil
	}
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
	l, ok := w.lower(n.Path)
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
	if n.Type == Regular && n.Size > 0 {
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
