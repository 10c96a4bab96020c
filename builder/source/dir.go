package source

import (
	"errors"
	"io/fs"
	"iter"
	"os"
	"path"
	"strings"
	"sync"

	"filo/layer/rootfs"
)

// dirFS serves a directory of the machine.
type dirFS struct {
	root *rootfs.Root
	as   func(rootfs.Stat) rootfs.Stat // how a file is reported
	mu   sync.Mutex
	open map[string]*handle // directories that are open, by name
	tick uint64             // counts uses
}

// handle is an open directory that may be in use.
type handle struct {
	*rootfs.Dir
	users int
	used  uint64 // tick of the last use
}

// maxOpen is how many directories stay open for the next name in them: enough for a deep walk and for files hashed
// side by side, few against the usual limit of 1024 descriptors.
const maxOpen = 32

// rootOwned reports files as root's: contexts carry no owners.
func rootOwned(st rootfs.Stat) rootfs.Stat {
	st.UID, st.GID = 0, 0
	return st
}

func openDirFS(dir string, as func(rootfs.Stat) rootfs.Stat) (*dirFS, error) {
	root, err := rootfs.Open(dir)
	if err != nil {
		return nil, err
	}
	return &dirFS{root: root, as: as, open: map[string]*handle{}}, nil
}

// Close closes the directory; nothing else may be called any more.
func (d *dirFS) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for name, h := range d.open {
		errs = append(errs, h.Close())
		delete(d.open, name)
	}
	return errors.Join(append(errs, d.root.Close())...)
}

// Open opens the regular file or directory name, links followed inside the root. Nothing else can be opened: to open
// a fifo could wait and to open a device could do anything.
func (d *dirFS) Open(name string) (fs.File, error) {
	if err := check("open", name); err != nil {
		return nil, err
	}
	p := name
	for range maxLinks {
		f, link, err := d.openOnce(name, p)
		if err != nil {
			return nil, pathError("open", name, err)
		}
		if link == "" {
			return f, nil
		}
		if !path.IsAbs(link) {
			link = path.Dir(p) + "/" + link // not cleaned: what ".." means is the kernel's to say
		}
		p = link
	}
	return nil, pathError("open", name, errLoop)
}

// openOnce opens p, or returns the text of the link that it is.
func (d *dirFS) openOnce(name, p string) (fs.File, string, error) {
	dir, base, done, err := d.parent(p)
	if err != nil {
		return nil, "", err
	}
	defer done()
	st, err := dir.Lstat(base)
	if err != nil {
		return nil, "", err
	}
	fi := newInfo(name, d.as(st))
	switch fi.Mode().Type() {
	case fs.ModeSymlink:
		link, err := dir.Readlink(base)
		return nil, link, err
	case fs.ModeDir:
		return &openDir{info: fi, name: name, list: d.ReadDir}, "", nil
	case 0:
		f, err := dir.OpenFile(base, os.O_RDONLY, 0)
		if err != nil {
			return nil, "", err
		}
		return &openFile{content: f, info: fi, name: name}, "", nil
	}
	return nil, "", errNoFile
}

// Lstat returns what name is, links not followed in its last part.
func (d *dirFS) Lstat(name string) (fs.FileInfo, error) {
	if err := check("lstat", name); err != nil {
		return nil, err
	}
	dir, base, done, err := d.parent(name)
	if err != nil {
		return nil, pathError("lstat", name, err)
	}
	defer done()
	st, err := dir.Lstat(base)
	if err != nil {
		return nil, pathError("lstat", name, err)
	}
	return newInfo(name, d.as(st)), nil
}

// ReadLink returns the text of the symbolic link name.
func (d *dirFS) ReadLink(name string) (string, error) {
	if err := check("readlink", name); err != nil {
		return "", err
	}
	dir, base, done, err := d.parent(name)
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	defer done()
	link, err := dir.Readlink(base)
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	return link, nil
}

// ReadDir lists the directory name in the order of names. Entries know their type; their Info looks at the file.
func (d *dirFS) ReadDir(name string) ([]fs.DirEntry, error) {
	var entries []fs.DirEntry
	err := d.list("readdir", name, func(listed []rootfs.Listed, _ *handle) error {
		entries = make([]fs.DirEntry, 0, len(listed))
		made := make([]dirEntry, 0, len(listed))
		for p, l := range at(name, listed) {
			made = append(made, dirEntry{Listed: l, fs: d, path: p})
			entries = append(entries, &made[len(made)-1])
		}
		return nil
	})
	return entries, err
}

// List is what the function [List] calls.
func (d *dirFS) List(name string, visit Visit) error {
	return d.list("list", name, func(listed []rootfs.Listed, dir *handle) error {
		e := openEntry{as: d.as, dir: dir}
		for e.path, e.Listed = range at(name, listed) {
			if err := visit(e.path, &e); err != nil {
				return err
			}
		}
		return nil
	})
}

// list opens the directory name and gives use what is in it.
func (d *dirFS) list(op, name string, use func(listed []rootfs.Listed, dir *handle) error) error {
	if err := check(op, name); err != nil {
		return err
	}
	dir, done, err := d.dir(name)
	if err != nil {
		return pathError(op, name, err)
	}
	defer done()
	listed, err := dir.List()
	if err != nil {
		return pathError(op, name, err)
	}
	return use(listed, dir)
}

// at returns what is listed of the directory dir with where in the file system it is: parts of one string.
func at(dir string, listed []rootfs.Listed) iter.Seq2[string, rootfs.Listed] {
	if dir == "." {
		dir = ""
	} else {
		dir += "/"
	}
	size := 0
	for _, l := range listed {
		size += len(dir) + len(l.Name)
	}
	var b strings.Builder
	b.Grow(size)
	for _, l := range listed {
		b.WriteString(dir)
		b.WriteString(l.Name)
	}
	return func(yield func(string, rootfs.Listed) bool) {
		paths := b.String()
		for _, l := range listed {
			n := len(dir) + len(l.Name)
			if !yield(paths[:n], l) {
				return
			}
			paths = paths[n:]
		}
	}
}

// dirEntry is an entry whose stat is not known yet.
type dirEntry struct {
	rootfs.Listed
	fs   *dirFS
	path string
}

func (e *dirEntry) Name() string               { return e.Listed.Name }
func (e *dirEntry) IsDir() bool                { return e.Listed.Type == modeDir }
func (e *dirEntry) Type() fs.FileMode          { return rootfs.Stat{Mode: e.Listed.Type}.FileMode() }
func (e *dirEntry) Info() (fs.FileInfo, error) { return e.fs.Lstat(e.path) }
func (e *dirEntry) String() string             { return fs.FormatDirEntry(e) }

// openEntry is an entry of a directory that is open, one after the other.
type openEntry struct {
	dirEntry
	as   func(rootfs.Stat) rootfs.Stat
	dir  *handle
	info info
}

// Info looks at the file. What it returns is good until the next entry.
func (e *openEntry) Info() (fs.FileInfo, error) {
	st, err := e.dir.Lstat(e.Name())
	if err != nil {
		return nil, pathError("lstat", e.path, err)
	}
	e.info = info{name: e.Name(), stat: e.as(st)}
	return &e.info, nil
}

// parent opens the directory of p. done gives it back.
func (d *dirFS) parent(p string) (dir *handle, base string, done func(), err error) {
	name, base := path.Split(p)
	if base == ".." || base == "" {
		name, base = p, "."
	}
	dir, done, err = d.dir(name)
	return dir, base, done, err
}

// dir opens the directory name, or takes the one that is open. done gives it back.
func (d *dirFS) dir(name string) (*handle, func(), error) {
	if name = strings.Trim(name, "/"); name == "" {
		name = "."
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	h, ok := d.open[name]
	if !ok {
		dir, err := d.root.Dir(name)
		if err != nil {
			return nil, nil, err
		}
		d.evict(maxOpen - 1)
		h = &handle{Dir: dir}
		d.open[name] = h
	}
	d.tick++
	h.users, h.used = h.users+1, d.tick
	return h, func() { d.release(h) }, nil
}

func (d *dirFS) release(h *handle) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h.users--
	d.evict(maxOpen) // more than that were in use at once
}

// evict closes the directories unused for longest until at most n are open, or the others are in use.
func (d *dirFS) evict(n int) {
	for len(d.open) > n {
		var oldest string
		for name, h := range d.open {
			if h.users == 0 && (oldest == "" || h.used < d.open[oldest].used) {
				oldest = name
			}
		}
		if oldest == "" {
			return
		}
		d.open[oldest].Close()
		delete(d.open, oldest)
	}
}

// removing makes Close of a file system also remove the directory that was made for it.
func removing(dir string, close func() error) func() error {
	return func() error { return errors.Join(close(), os.RemoveAll(dir)) }
}
