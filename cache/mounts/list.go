package mounts

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// format is the version of the list.
const format = 1

// listName is the one file of a list's blob.
const listName = "files.json"

// What of a list is read: its author may be anybody.
const (
	maxList  = 256 << 20
	maxFiles = 2_000_000
	maxPacks = 20_000
)

// List says what files an archive has and where their content is.
type List struct {
	part  Part // the blob it was read from
	Packs []pack
	Files []file
}

// listWire is a list as it is written.
type listWire struct {
	Format int   `json:"format"`
	Packs  packs `json:"packs"`
	Files  files `json:"files"`
}

type (
	packs []pack
	files []file
)

// UnmarshalJSON implements json.Unmarshaler.
func (p *packs) UnmarshalJSON(data []byte) (err error) {
	*p, err = few[pack](data, maxPacks)
	return err
}

// UnmarshalJSON implements json.Unmarshaler.
func (f *files) UnmarshalJSON(data []byte) (err error) {
	*f, err = few[file](data, maxFiles)
	return err
}

// few reads a JSON array of no more elements than most. One of three bytes may take a hundred in memory, and a gigabyte of
// them compresses to nothing: that there are too many must be seen before they are all there.
func few[T any](data []byte, most int) (list []T, err error) {
	d := json.NewDecoder(bytes.NewReader(data))
	if t, err := d.Token(); t != json.Delim('[') {
		return nil, err // null, or nothing that we would write
	}
	for d.More() {
		if len(list) == most {
			return nil, errTooLong
		}
		var e T
		if err := d.Decode(&e); err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

var errTooLong = errors.New("it is too long")

// pack is a blob that holds contents.
type pack struct {
	Blob   digest.Digest `json:"blob"`
	Size   int64         `json:"size"`
	DiffID digest.Digest `json:"diffID"`
	Bytes  int64         `json:"bytes"` // of contents, used or not
}

func (p pack) part() Part {
	return Part{p.DiffID, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: p.Blob, Size: p.Size}}
}

// file is one path. Paths come in the order of a walk: a directory before what is in it.
type file struct {
	Path   text          `json:"path"`
	Type   string        `json:"type"`
	Mode   uint32        `json:"mode,omitempty"`
	UID    int           `json:"uid,omitempty"`
	GID    int           `json:"gid,omitempty"`
	Sec    int64         `json:"sec,omitempty"`
	Nsec   int64         `json:"nsec,omitempty"`
	Link   text          `json:"link,omitempty"` // of a symbolic link its text, of a hard link the path of the regular file
	Size   int64         `json:"size,omitempty"`
	Digest digest.Digest `json:"digest,omitempty"` // of a file that is not empty
	Pack   int           `json:"pack,omitempty"`
}

// The types of a file.
const (
	regular  = "file"
	dir      = "dir"
	symlink  = "symlink"
	hardlink = "hardlink"
)

// text is a string of any bytes. In JSON one that is no UTF-8 is an array with its bytes as base64.
type text string

// MarshalJSON implements json.Marshaler.
func (t text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal([][]byte{[]byte(t)})
}

// UnmarshalJSON implements json.Unmarshaler.
func (t *text) UnmarshalJSON(data []byte) error {
	if !strings.HasPrefix(string(data), "[") {
		return json.Unmarshal(data, (*string)(t))
	}
	var raw [][]byte
	if err := json.Unmarshal(data, &raw); err != nil || len(raw) != 1 {
		return errors.Join(err, errors.New("malformed text"))
	}
	*t = text(raw[0])
	return nil
}

// ReadList reads the blob of a list, and verifies it.
func ReadList(body io.Reader, p Part) (*List, error) {
	var data []byte
	err := readPart(body, p, maxList, func(h *tar.Header, content io.Reader) (err error) {
		if h.Name != listName || data != nil {
			return fmt.Errorf("unknown file %q", h.Name)
		}
		data, err = io.ReadAll(content)
		return err
	})
	if err != nil {
		return nil, err
	}
	l, err := parseList(data)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", p.Blob.Digest, err)
	}
	l.part = p
	return l, nil
}

func parseList(data []byte) (*List, error) {
	var w listWire
	if err := json.Unmarshal(data, &w); err != nil {
		return nil, err
	}
	if w.Format != format {
		return nil, fmt.Errorf("format %d is unknown", w.Format)
	}
	l := &List{Packs: w.Packs, Files: w.Files}
	return l, l.check()
}

// write makes a blob of the list.
func (l *List) write(temp string) (Part, string, error) {
	data, err := json.Marshal(listWire{format, l.Packs, l.Files})
	if err != nil {
		return Part{}, "", err
	}
	w, err := newPart(temp)
	if err != nil {
		return Part{}, "", err
	}
	err = w.WriteHeader(&tar.Header{Name: listName, Mode: 0o644, Size: int64(len(data))})
	if err == nil {
		_, err = w.Write(data)
	}
	if err != nil {
		w.abort()
		return Part{}, "", err
	}
	return w.finish()
}

// Bytes is how much the files hold.
func (l *List) Bytes() (n int64) {
	for i := range l.Files {
		n += l.Files[i].Size
	}
	return n
}

// same reports whether two lists say the same.
func (l *List) same(o *List) bool {
	return slices.Equal(l.Packs, o.Packs) && slices.Equal(l.Files, o.Files)
}

// check refuses a list that is not one that we would write. What passes can be made in an empty directory without ever
// leaving it: each path is below a directory that the list has before it, no path comes twice.
func (l *List) check() error {
	for _, p := range l.Packs {
		if !valid(p.Blob) || !valid(p.DiffID) || p.Size <= 0 || p.Bytes < 0 {
			return errors.New("malformed pack")
		}
	}
	seen := map[string]string{".": dir} // types by path
	total := int64(0)
	for i := range l.Files {
		f := &l.Files[i]
		if err := l.checkFile(f, seen); err != nil {
			return fmt.Errorf("path %q: %w", string(f.Path), err)
		}
		seen[string(f.Path)] = f.Type
		if total += f.Size; total < 0 {
			return errors.New("it is too large")
		}
	}
	return nil
}

func (l *List) checkFile(f *file, seen map[string]string) error {
	p := string(f.Path)
	if p == "" || p == ".." || p != path.Clean(p) || path.IsAbs(p) || strings.HasPrefix(p, "../") || strings.ContainsRune(p, 0) {
		return errors.New("malformed")
	}
	if seen[p] != "" {
		return errors.New("it comes twice")
	}
	if seen[path.Dir(p)] != dir {
		return errors.New("it is in no directory")
	}
	if f.Mode&^0o7777 != 0 || f.UID < 0 || f.GID < 0 || f.Nsec < 0 || f.Nsec >= 1e9 || f.Size < 0 {
		return errors.New("malformed attributes")
	}
	hasContent := f.Type == regular && f.Size > 0
	switch {
	case f.Type != regular && f.Type != dir && f.Type != symlink && f.Type != hardlink:
		return fmt.Errorf("unknown type %q", f.Type)
	case !hasContent && (f.Size > 0 || f.Digest != ""):
		return errors.New("it cannot have content")
	case hasContent && (!valid(f.Digest) || f.Pack < 0 || f.Pack >= len(l.Packs)):
		return errors.New("its content is nowhere")
	case f.Type == hardlink && seen[string(f.Link)] != regular:
		return errors.New("it is a link of no file")
	case f.Type == symlink && (f.Link == "" || strings.ContainsRune(string(f.Link), 0)):
		return errors.New("malformed link")
	}
	return nil
}

func valid(d digest.Digest) bool {
	return d.Validate() == nil && d.Algorithm() == digest.SHA256
}
