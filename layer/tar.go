package layer

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"math"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	xattrRecord    = "SCHILY.xattr."
)

// maxID is the highest owner that a file can have; the one above it means "as it is" to chown.
const maxID = math.MaxUint32 - 1

// header is the one tar header that e has: no user and group names, no times
// but the modification's, PAX records only for what does not fit otherwise.
func header(e Entry) (*tar.Header, error) {
	h := &tar.Header{
		Name: e.Path, Mode: int64(e.Mode), Uid: e.UID, Gid: e.GID,
		ModTime: time.Unix(e.ModTime, 0), Format: tar.FormatPAX,
	}
	switch e.Type {
	case Regular:
		h.Typeflag, h.Size = tar.TypeReg, e.Size
	case Dir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case Symlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.Link
	case Hardlink:
		h.Typeflag, h.Linkname = tar.TypeLink, e.Link
	case Char, Block:
		h.Typeflag = tar.TypeChar
		if e.Type == Block {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(e.Major), int64(e.Minor)
	case Fifo:
		h.Typeflag = tar.TypeFifo
	case Whiteout:
		dir, name := path.Split(e.Path)
		return &tar.Header{
			Typeflag: tar.TypeReg, Name: dir + whiteoutPrefix + name,
			ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
		}, nil
	case Opaque:
		return nil, errors.New("opaque markers are not written")
	default:
		return nil, fmt.Errorf("unknown type %q", byte(e.Type))
	}
	for name, value := range e.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+name] = value
	}
	return h, nil
}

// tarBlock is what headers, and files with their padding, are multiples of.
const tarBlock = 512

// tarWriter writes the tar that [tar.Writer] makes of the headers of entries. Most headers are simple: those it makes
// itself, for the general way takes longer than all else that a [Writer] does about a small file.
type tarWriter struct {
	out   *bufio.Writer
	block [tarBlock]byte
	left  int64 // bytes of the entry that are still to come
	pad   int64 // zero bytes after them
}

// add begins an entry. If it is a Regular one, its bytes come next.
func (t *tarWriter) add(e Entry) error {
	if err := t.end(); err != nil {
		return err
	}
	if e.Type == Regular {
		t.left, t.pad = e.Size, -e.Size&(tarBlock-1)
	}
	if t.simple(e) {
		_, err := t.out.Write(t.block[:])
		return err
	}
	h, err := header(e)
	if err != nil {
		return err
	}
	return tar.NewWriter(t.out).WriteHeader(h)
}

// Write takes bytes of the entry.
func (t *tarWriter) Write(b []byte) (int, error) {
	if int64(len(b)) > t.left {
		return 0, tar.ErrWriteTooLong
	}
	t.left -= int64(len(b))
	return t.out.Write(b)
}

// Close ends the tar and passes all of it on.
func (t *tarWriter) Close() error {
	if err := t.end(); err != nil {
		return err
	}
	for range 2 {
		t.pad = tarBlock
		if err := t.end(); err != nil {
			return err
		}
	}
	return t.out.Flush()
}

// end ends an entry.
func (t *tarWriter) end() error {
	if t.left > 0 {
		return fmt.Errorf("%d bytes of the entry before are missing", t.left)
	}
	clear(t.block[:t.pad])
	_, err := t.out.Write(t.block[:t.pad])
	t.pad = 0
	return err
}

// simple makes t.block the header of e if all of that fits there as it is (POSIX, pax, "ustar Interchange Format").
func (t *tarWriter) simple(e Entry) bool {
	const name, mode, uid, gid, size, mtime, sum, kind, magic, major, minor, prefix = 0, 100, 108, 116, 124, 136, 148, 156, 257, 329, 337, 345
	if e.Type != Regular && e.Type != Dir || len(e.Xattrs) > 0 || len(e.Path) >= mode-name || !isASCII(e.Path) {
		return false
	}
	b := &t.block
	*b = [tarBlock]byte{}
	n := copy(b[name:], e.Path)
	b[kind] = tar.TypeReg
	if e.Type == Dir {
		b[name+n], b[kind] = '/', tar.TypeDir
	}
	copy(b[magic:], "ustar\x0000")
	fits := octal(b[mode:uid], int64(e.Mode)) && octal(b[uid:gid], int64(e.UID)) && octal(b[gid:size], int64(e.GID)) &&
		octal(b[size:mtime], e.Size) && octal(b[mtime:sum], e.ModTime) && octal(b[major:minor], 0) && octal(b[minor:prefix], 0)
	total := int64(' ' * (kind - sum)) // the sum counts itself as spaces
	for _, c := range b[:prefix] {
		total += int64(c)
	}
	b[kind-1] = ' '
	return fits && octal(b[sum:kind-1], total)
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] == 0 || s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// octal fills b but for its last byte with the digits of n, if they fit.
func octal(b []byte, n int64) bool {
	left := uint64(n)
	for i := len(b) - 2; i >= 0; i-- {
		b[i] = byte('0' + left&7)
		left >>= 3
	}
	return left == 0
}

// canonical checks what a layer that filo writes may hold, and clears the
// fields that e's type does not have.
func canonical(e Entry) (Entry, error) {
	if !validName(e.Path) {
		return e, errors.New("not a clean relative path")
	}
	if strings.HasPrefix(path.Base(e.Path), whiteoutPrefix) {
		return e, errors.New("names that begin with .wh. mean deleted files in layers, no real file can have one")
	}
	if len(e.Path) > maxPath || len(path.Base(e.Path)) > maxName {
		return e, unix.ENAMETOOLONG
	}
	if e.Path == "." && e.Type != Dir {
		return e, errors.New("the root is not a directory")
	}
	if e.Type == Whiteout {
		return Entry{Path: e.Path, Type: Whiteout}, nil
	}
	if e.UID < 0 || e.GID < 0 || int64(e.UID) > maxID || int64(e.GID) > maxID {
		return e, fmt.Errorf("owner %d:%d is out of range", e.UID, e.GID)
	}
	if e.Size < 0 {
		return e, fmt.Errorf("size %d is negative", e.Size)
	}
	e.Mode &= 0o7777
	e.Implied = false
	e.Xattrs = keptXattrs(e.Xattrs)
	return ownFields(e), nil
}

func ownFields(e Entry) Entry {
	if e.Type != Regular {
		e.Size, e.Digest = 0, ""
	}
	if e.Type != Symlink && e.Type != Hardlink {
		e.Link = ""
	}
	if e.Type != Char && e.Type != Block {
		e.Major, e.Minor = 0, 0
	}
	return e
}

// keptXattrs are those of all that layers carry; overlayfs's own never, as
// they could steer a mount.
func keptXattrs(all map[string]string) map[string]string {
	var kept map[string]string
	for name, value := range all {
		if !layerXattr(name) {
			continue
		}
		if kept == nil {
			kept = map[string]string{}
		}
		kept[name] = value
	}
	return kept
}
