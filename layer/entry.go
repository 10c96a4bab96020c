package layer

import "github.com/opencontainers/go-digest"

// Type is the kind of an [Entry].
type Type byte

// The kinds of entries.
const (
	Regular  Type = '-'
	Dir      Type = 'd'
	Symlink  Type = 'l'
	Hardlink Type = 'h'
	Char     Type = 'c'
	Block    Type = 'b'
	Fifo     Type = 'p'
	Whiteout Type = 'w' // the path is deleted from the layers below (OCI image spec, layer.md, Whiteouts)
	Opaque   Type = 'o' // what the layers below have inside the directory Path is hidden; read from pulled layers, never written by filo
)

// Entry is one file of a layer, as a tar header says it, with its content digest.
type Entry struct {
	Path         string // slash-separated, clean, relative to the root, any bytes but NUL; "." is the root itself. Of a Whiteout: the deleted path
	Type         Type
	Mode         uint32 // permission, setuid, setgid and sticky bits: 07777
	UID, GID     int
	Size         int64             // of a Regular file
	Digest       digest.Digest     // content of a Regular file; set by the [Writer]
	Link         string            // Symlink: the target text. Hardlink: Path of an entry of the same layer, before this one, that is a file of any type
	Major, Minor uint32            // of Char and Block
	Xattrs       map[string]string // only "user.*" and "security.capability"; nil for none
	ModTime      int64             // seconds since the epoch: layers carry whole seconds
	Implied      bool              // a directory that the layer only names as the parent of its entries; in listings, never stored
}

// linkable says whether a Hardlink can be another name of e.
func (e *Entry) linkable() bool {
	switch e.Type {
	case Regular, Symlink, Char, Block, Fifo:
		return true
	case Dir, Hardlink, Whiteout, Opaque:
	}
	return false
}

// Same reports whether e and o describe the same file at the same path with the same content. Of directories the
// modification time does not count: it changes with what they hold.
func (e Entry) Same(o Entry) bool {
	return e.Type == o.Type && e.Digest == o.Digest && sameAttributes(&e, &o)
}

// ComparePaths orders paths as entries are ordered in a layer: component by component, so that what a directory holds
// follows it directly. "." is first.
func ComparePaths(a, b string) int { return comparePaths(a, b) }
