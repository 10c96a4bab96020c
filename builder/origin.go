package builder

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/opencontainers/go-digest"

	"filo/cache"
	"filo/layer"
	"filo/layer/rootfs"
)

// origin is a file system that files are copied from: the build context, a stage, an image, what a URL gave.
type origin struct {
	fs    fs.FS
	files *cache.Files // remembers digests of a local directory; nil: bytes are hashed each time
	view  *layer.View  // fs, if it is one: digests, owners and extended attributes are known
}

// file describes the file name of o as rel; info is what Lstat says of it. Its digest is set only if the origin knows it.
func (o *origin) file(name, rel string, info func() (fs.FileInfo, error)) (file, error) {
	fi, err := info()
	if err != nil {
		return file{}, err
	}
	switch st := fi.Sys().(type) {
	case *layer.Entry:
		f := file{Entry: *st, inode: o.view.Inode(name)}
		f.Path = rel
		return f, nil
	case *rootfs.Stat:
		f := file{}
		f.Entry, f.inode, err = o.statEntry(name, fi, st)
		f.Path = rel
		if f.Type == layer.Regular && f.Digest == "" { // here, where files are looked at side by side
			if f.Digest, _ = o.known(name, st); f.Digest == "" {
				f.stat = new(*st)
			}
		}
		return f, err
	}
	return file{}, fmt.Errorf("lstat %s: unknown file system %T", name, o.fs)
}

func (o *origin) statEntry(name string, fi fs.FileInfo, st *rootfs.Stat) (e layer.Entry, inode string, err error) {
	e = layer.Entry{Mode: st.Mode & 0o7777, UID: st.UID, GID: st.GID, ModTime: st.Sec}
	switch fi.Mode().Type() {
	case 0:
		e.Type, e.Size = layer.Regular, st.Size
	case fs.ModeSocket: // BuildKit sends a socket as an empty file (features 3.1.23)
		e.Type, e.Digest = layer.Regular, digest.FromString("")
	case fs.ModeDir:
		e.Type = layer.Dir
	case fs.ModeSymlink:
		e.Type, e.Mode = layer.Symlink, 0o777
		e.Link, err = fs.ReadLink(o.fs, name)
	case fs.ModeNamedPipe:
		e.Type = layer.Fifo
	case fs.ModeDevice | fs.ModeCharDevice:
		e.Type, e.Major, e.Minor = layer.Char, st.Major, st.Minor
	case fs.ModeDevice:
		e.Type, e.Major, e.Minor = layer.Block, st.Major, st.Minor
	}
	if st.Nlink > 1 && e.Type != layer.Dir {
		inode = fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	}
	return e, inode, err
}

// known returns the digest of the regular file name, which st describes, if it is remembered.
func (o *origin) known(name string, st *rootfs.Stat) (digest.Digest, bool) {
	if st == nil || o.files == nil {
		return "", false
	}
	return o.files.Known(name, *st)
}

// digest returns the digest of the regular file name, which st describes if the origin is a local directory.
func (o *origin) digest(name string, st *rootfs.Stat) (digest.Digest, error) {
	open := func() (io.ReadCloser, error) { return o.open(name) }
	if st != nil && o.files != nil {
		return o.files.Digest(name, *st, open)
	}
	r, err := open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	return digest.SHA256.FromReader(r)
}

// open opens the regular file name.
func (o *origin) open(name string) (io.ReadCloser, error) { return o.fs.Open(name) }

func lstat(fsys fs.FS, name string) (fs.FileInfo, error) { return fs.Lstat(fsys, name) }

// resolve follows the links of p inside o, the last one only if last is set; what is missing stays as written.
func (o *origin) resolve(p string, last bool) (string, error) {
	return rootfs.Resolve(p, last, func(name string) (string, bool, error) {
		fi, err := lstat(o.fs, name)
		if errors.Is(err, fs.ErrNotExist) || isNotDir(err) {
			return "", false, nil
		}
		if err != nil || fi.Mode()&fs.ModeSymlink == 0 {
			return "", false, err
		}
		target, err := fs.ReadLink(o.fs, name)
		return target, true, err
	})
}

// isNotDir reports whether err says that a component of a path is no directory, for which io/fs has no error value.
func isNotDir(err error) bool {
	return err != nil && strings.HasSuffix(err.Error(), "not a directory")
}
