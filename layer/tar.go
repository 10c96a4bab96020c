package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"path"
	"strings"
	"time"
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

// canonical checks what a layer that filo writes may hold, and clears the
// fields that e's type does not have.
func canonical(e Entry) (Entry, error) {
	if !validName(e.Path) {
		return e, errors.New("not a clean relative path")
	}
	if strings.HasPrefix(path.Base(e.Path), whiteoutPrefix) {
		return e, errors.New("names that begin with .wh. mean deleted files in layers, no real file can have one")
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
