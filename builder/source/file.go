package source

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"filo/layer/rootfs"
)

// maxLinks is how many links one path may go through, as in the kernel (path_resolution(7)).
const maxLinks = 40

var (
	errNotDir = errors.New("not a directory")
	errIsDir  = errors.New("is a directory")
	errLoop   = errors.New("too many levels of symbolic links")
	errNoFile = errors.New("not a regular file")
)

// valid is [fs.ValidPath] for names that need not be UTF-8.
func valid(name string) bool {
	if name == "." {
		return true
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return strings.IndexByte(name, 0) < 0
}

func check(op, name string) error {
	if !valid(name) {
		return &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	return nil
}

// pathError gives err the name that was asked for: what lies below may know the file by another.
func pathError(op, name string, err error) error {
	var inner *fs.PathError
	if errors.As(err, &inner) {
		err = inner.Err
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// info is the FileInfo and the DirEntry of a file whose stat is known.
type info struct {
	name string
	stat rootfs.Stat
}

func newInfo(name string, st rootfs.Stat) *info { return &info{path.Base(name), st} }

func (i *info) Name() string       { return i.name }
func (i *info) Size() int64        { return i.stat.Size }
func (i *info) Mode() fs.FileMode  { return i.stat.FileMode() }
func (i *info) ModTime() time.Time { return time.Unix(i.stat.Sec, i.stat.Nsec) }
func (i *info) IsDir() bool        { return i.Mode().IsDir() }
func (i *info) Sys() any           { return &i.stat }
func (i *info) Type() fs.FileMode  { return i.Mode().Type() }
func (i *info) String() string     { return fs.FormatFileInfo(i) }

func (i *info) Info() (fs.FileInfo, error) { return i, nil }

// openFile is an open regular file.
type openFile struct {
	content
	info *info
	name string // as opened, for errors
}

// content is where the bytes of an open file come from.
type content interface {
	io.ReadSeeker
	io.ReaderAt
	io.Closer
}

func (f *openFile) Stat() (fs.FileInfo, error) { return f.info, nil }

func (f *openFile) Read(b []byte) (int, error) {
	n, err := f.content.Read(b)
	return n, f.wrap("read", err)
}

// WriteTo lets io.Copy use what the content has to move bytes in bulk.
func (f *openFile) WriteTo(w io.Writer) (int64, error) {
	n, err := io.Copy(w, f.content)
	var inner *fs.PathError
	if errors.As(err, &inner) && inner.Op == "read" {
		err = f.wrap("read", err)
	}
	return n, err
}

func (f *openFile) wrap(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return pathError(op, f.name, err)
}

// openDir is an open directory.
type openDir struct {
	info    fs.FileInfo
	name    string
	list    func(name string) ([]fs.DirEntry, error)
	entries []fs.DirEntry // left to give, once listed
	listed  bool
}

func (d *openDir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *openDir) Close() error               { return nil }

func (d *openDir) Read([]byte) (int, error) { return 0, pathError("read", d.name, errIsDir) }

func (d *openDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if !d.listed {
		entries, err := d.list(d.name)
		if err != nil {
			return nil, err
		}
		d.entries, d.listed = entries, true
	}
	if n <= 0 {
		n = len(d.entries)
	} else if len(d.entries) == 0 {
		return nil, io.EOF
	}
	n = min(n, len(d.entries))
	out := d.entries[:n:n]
	d.entries = d.entries[n:]
	return out, nil
}

// Visit is called with what is in a directory: its path in the file system and its entry, whose Info does not follow
// links. The entry and its Info are good until Visit returns, so that listing a directory makes nothing for each file.
type Visit func(path string, e fs.DirEntry) error

// List calls visit for what is in the directory name of fsys, in the order of names. The error of visit ends it and is
// returned.
func List(fsys fs.FS, name string, visit Visit) error {
	if l, ok := fsys.(interface{ List(string, Visit) error }); ok {
		return l.List(name, visit)
	}
	entries, err := fs.ReadDir(fsys, name)
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := path.Join(name, e.Name())
		if err := visit(p, lookedUp{e, fsys, p}); err != nil {
			return err
		}
	}
	return nil
}

// lookedUp is an entry whose Info is that of its file system's Lstat.
type lookedUp struct {
	fs.DirEntry
	fs   fs.FS
	path string
}

func (e lookedUp) Info() (fs.FileInfo, error) { return fs.Lstat(e.fs, e.path) }

func sortEntries(entries []fs.DirEntry) {
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
}
