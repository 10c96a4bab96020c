package source

import (
	"errors"
	"fmt"
	"io/fs"
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
	if err := check("readdir", name); err != nil {
		return nil, err
	}
	dir, done, err := d.dir(name)
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	defer done()
	// Through /proc, since rootfs has no listing with types; "." makes a full path of the few names that
	// os.File has to lstat where the file system keeps no types in its directories.
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d/.", dir.Fd()))
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	defer f.Close()
	raw, err := f.ReadDir(-1)
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	sortEntries(raw)
	entries, made := make([]fs.DirEntry, len(raw)), make([]dirEntry, len(raw))
	for i, e := range raw {
		made[i] = dirEntry{fs: d, dir: name, name: e.Name(), mode: e.Type()}
		entries[i] = &made[i]
	}
	return entries, nil
}

// dirEntry is an entry whose stat is not known yet.
type dirEntry struct {
	fs   *dirFS
	dir  string
	name string
	mode fs.FileMode
}

func (e *dirEntry) Name() string               { return e.name }
func (e *dirEntry) IsDir() bool                { return e.mode.IsDir() }
func (e *dirEntry) Type() fs.FileMode          { return e.mode }
func (e *dirEntry) Info() (fs.FileInfo, error) { return e.fs.Lstat(path.Join(e.dir, e.name)) }
func (e *dirEntry) String() string             { return fs.FormatDirEntry(e) }

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
