package source

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"filo/layer/rootfs"
)

// tree is a file system in memory; the bytes of all its files are in one spool file.
// Once made it is only read.
type tree struct {
	root  *node
	spool *os.File
	last  uint64 // last inode number given
}

// node is one file of a tree. Hard links are one node with several names.
type node struct {
	stat     rootfs.Stat
	link     string           // of a symbolic link
	offset   int64            // in the spool, of a regular file
	children map[string]*node // of a directory
}

// Types of files as the kernel has them in st_mode (inode(7)): rootfs.Stat speaks them.
const (
	modeType    = 0o170000
	modeDir     = 0o040000
	modeRegular = 0o100000
	modeSymlink = 0o120000
	modeChar    = 0o020000
	modeBlock   = 0o060000
	modeFifo    = 0o010000
)

// newSpool makes a file in dir that vanishes when it is closed.
func newSpool(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "source-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func newTree(spool *os.File) *tree {
	t := &tree{spool: spool, root: newDir(), last: 1}
	t.root.stat.Ino = t.last
	return t
}

// oneFile is a tree of one regular file with all the bytes of spool.
func oneFile(spool *os.File, name string, st rootfs.Stat) *tree {
	t := newTree(spool)
	st.Mode, st.Nlink = st.Mode|modeRegular, 1
	t.put(t.root, name, &node{stat: st})
	return t
}

func newDir() *node {
	return &node{stat: rootfs.Stat{Mode: modeDir | 0o755, Nlink: 1}, children: map[string]*node{}}
}

func (t *tree) put(dir *node, name string, n *node) {
	t.last++
	n.stat.Ino = t.last
	if n.stat.Nlink == 0 {
		n.stat.Nlink = 1
	}
	dir.children[name] = n
}

func (n *node) is(kind uint32) bool { return n.stat.Mode&modeType == kind }

// walker resolves a path of a tree.
type walker struct {
	t     *tree
	stack []*node // directories from the root to where we are
	todo  []string
	links int
	make  bool // make directories that are missing
}

// dir resolves p to a directory, links followed inside the root.
func (t *tree) dir(p string, create bool) (*node, error) {
	w := walker{t: t, stack: []*node{t.root}, todo: strings.Split(p, "/"), make: create}
	for len(w.todo) > 0 {
		name := w.todo[0]
		w.todo = w.todo[1:]
		if err := w.step(name); err != nil {
			return nil, err
		}
	}
	return w.at(), nil
}

func (w *walker) at() *node { return w.stack[len(w.stack)-1] }

func (w *walker) step(name string) error {
	switch name {
	case "", ".":
		return nil
	case "..":
		w.stack = w.stack[:max(1, len(w.stack)-1)]
		return nil
	}
	n, ok := w.at().children[name]
	if !ok {
		if !w.make {
			return fs.ErrNotExist
		}
		n = newDir()
		w.t.put(w.at(), name, n)
	}
	switch {
	case n.is(modeDir):
		w.stack = append(w.stack, n)
		return nil
	case n.is(modeSymlink):
		return w.follow(n.link)
	}
	return errNotDir
}

func (w *walker) follow(link string) error {
	if w.links++; w.links > maxLinks {
		return errLoop
	}
	if path.IsAbs(link) {
		w.stack = w.stack[:1]
	}
	w.todo = append(strings.Split(link, "/"), w.todo...)
	return nil
}

// lookup finds p; a link in its last name is not followed.
func (t *tree) lookup(p string) (*node, error) {
	if p == "." {
		return t.root, nil
	}
	dir, err := t.dir(path.Dir(p), false)
	if err != nil {
		return nil, err
	}
	n, ok := dir.children[path.Base(p)]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return n, nil
}

// find checks and looks up name for op.
func (t *tree) find(op, name string) (*node, error) {
	if err := check(op, name); err != nil {
		return nil, err
	}
	n, err := t.lookup(name)
	if err != nil {
		return nil, pathError(op, name, err)
	}
	return n, nil
}

// Close frees the bytes; open files cannot be read any more.
func (t *tree) Close() error { return t.spool.Close() }

// Open opens the regular file or directory name, links followed inside the root.
func (t *tree) Open(name string) (fs.File, error) {
	n, err := t.find("open", name)
	if err != nil {
		return nil, err
	}
	if n, err = t.follow(name, n); err != nil {
		return nil, pathError("open", name, err)
	}
	switch fi := newInfo(name, n.stat); fi.Mode().Type() {
	case fs.ModeDir:
		return &openDir{info: fi, name: name, list: t.ReadDir}, nil
	case 0:
		r := spooled{io.NewSectionReader(t.spool, n.offset, n.stat.Size)}
		return &openFile{content: r, info: fi, name: name}, nil
	}
	return nil, pathError("open", name, errNoFile)
}

// follow returns what the file n at name leads to.
func (t *tree) follow(name string, n *node) (*node, error) {
	dir := path.Dir(name)
	for range maxLinks {
		if !n.is(modeSymlink) {
			return n, nil
		}
		at, last := path.Split(n.link)
		if !path.IsAbs(at) {
			at = dir + "/" + at
		}
		parent, err := t.dir(at, false)
		if err != nil {
			return nil, err
		}
		if last == "" || last == "." || last == ".." {
			return t.dir(at+"/"+last, false)
		}
		next, ok := parent.children[last]
		if !ok {
			return nil, fs.ErrNotExist
		}
		n, dir = next, at
	}
	return nil, errLoop
}

// Lstat returns what name is, links not followed in its last part.
func (t *tree) Lstat(name string) (fs.FileInfo, error) {
	n, err := t.find("lstat", name)
	if err != nil {
		return nil, err
	}
	return newInfo(name, n.stat), nil
}

// ReadLink returns the text of the symbolic link name.
func (t *tree) ReadLink(name string) (string, error) {
	n, err := t.find("readlink", name)
	if err != nil {
		return "", err
	}
	if !n.is(modeSymlink) {
		return "", pathError("readlink", name, fs.ErrInvalid)
	}
	return n.link, nil
}

// ReadDir lists the directory name in the order of names.
func (t *tree) ReadDir(name string) ([]fs.DirEntry, error) {
	if err := check("readdir", name); err != nil {
		return nil, err
	}
	dir, err := t.dir(name, false)
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	entries := make([]fs.DirEntry, 0, len(dir.children))
	for name, n := range dir.children {
		entries = append(entries, newInfo(name, n.stat))
	}
	sortEntries(entries)
	return entries, nil
}

// newest returns the latest time of a regular file, nil if there is none.
func (t *tree) newest() *int64 { return t.root.newest(nil) }

func (n *node) newest(so *int64) *int64 {
	if n.is(modeRegular) && (so == nil || n.stat.Sec > *so) {
		so = &n.stat.Sec
	}
	for _, c := range n.children {
		so = c.newest(so)
	}
	return so
}

// spooled is the content of a tree's file.
type spooled struct{ *io.SectionReader }

func (spooled) Close() error { return nil }
