package layer

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"

	"github.com/opencontainers/go-digest"
)

// Sinks says what a [Writer] makes besides the index.
type Sinks struct {
	Blob  *Compression // compress while the tar is hashed; nil: no blob now
	Tree  bool         // unpack beside the store
	Epoch *int64       // SOURCE_DATE_EPOCH: later times are set back to it, in tar, index and tree
}

// ErrChanged is returned by [Writer.Add] if a file is not as long as its
// entry says or does not have the digest that its entry says.
var ErrChanged = errors.New("file changed while it was read")

// Writer makes a layer from entries that come in canonical order. Peak memory
// does not depend on the size of files; the index is held until Close. A
// Writer is used by one goroutine; either Close or Abort ends it.
type Writer struct {
	s     *Store
	ctx   context.Context // of Create: a Writer is one operation
	epoch *int64
	dir   string // holds an unfinished tree, "" for none

	tar   tarWriter
	diff  hash.Hash
	blob  *blobFile
	tree  *tree
	adopt string // becomes the tree on Close

	index  indexBuilder
	open   []string // directories that the next entry may be in
	expect digest.Digest
	file   hash.Hash // of the content that is being copied
	buf    []byte
	err    error
	ended  bool
}

// Create begins a layer. ctx bounds everything until Close.
func (s *Store) Create(ctx context.Context, k Sinks) (*Writer, error) {
	if k.Blob == nil && !k.Tree {
		return nil, errors.New("create layer: neither blob nor tree asked for")
	}
	w, err := s.newWriter(ctx, k, "")
	if err == nil && !k.Tree {
		w.blob.parity = &parity{} // there is nothing else to make the blob from again
	}
	return w, err
}

// createAdopting is Create for entries whose files are already unpacked in
// upperDir: on Close that directory becomes the layer's tree, or is removed if
// there is one. Sinks.Tree has no meaning.
func (s *Store) createAdopting(ctx context.Context, k Sinks, upperDir string) (*Writer, error) {
	k.Tree = false
	return s.newWriter(ctx, k, upperDir)
}

func (s *Store) newWriter(ctx context.Context, k Sinks, adopt string) (*Writer, error) {
	w := &Writer{
		s: s, ctx: ctx, epoch: k.Epoch, adopt: adopt,
		diff: sha256.New(), file: sha256.New(),
	}
	var err error
	if k.Tree {
		if w.dir, err = s.Temp("layer-"); err != nil {
			return nil, fmt.Errorf("create layer: %w", err)
		}
	}
	var sink io.Writer = w.diff
	if k.Blob != nil {
		if w.blob, err = s.newBlobFile(*k.Blob); err != nil {
			w.Abort()
			return nil, fmt.Errorf("create layer: %w", err)
		}
		sink = io.MultiWriter(w.diff, w.blob)
	}
	if k.Tree {
		if w.tree, err = s.newTree(filepath.Join(w.dir, "tree")); err != nil {
			w.Abort()
			return nil, fmt.Errorf("create layer: %w", err)
		}
	}
	w.tar.out = bufio.NewWriterSize(sink, 128<<10)
	return w, nil
}

// Add appends e, which must come after all entries before it and, below the
// root, after the directory it is in. Of a Regular entry content is read to
// its end, and must have exactly e.Size bytes and, if e.Digest is set, that
// digest: else the error is ErrChanged. content may be nil for an empty file
// and is not read for other types. After an error the layer can only be
// aborted.
func (w *Writer) Add(e Entry, content io.Reader) error {
	if w.err == nil {
		w.err = w.add(e, content)
	}
	if w.err != nil {
		return fmt.Errorf("add %s: %w", e.Path, w.err)
	}
	return nil
}

func (w *Writer) add(e Entry, content io.Reader) error {
	if w.ended {
		return errors.New("layer is closed")
	}
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	e, err := canonical(e)
	if err != nil {
		return err
	}
	if w.epoch != nil && e.ModTime > *w.epoch {
		e.ModTime = *w.epoch
	}
	if err := w.place(e); err != nil {
		return err
	}
	if err := w.tar.add(e); err != nil {
		return err
	}
	if e.Type == Regular {
		e.Digest, err = w.copy(e, content)
	} else if w.tree != nil {
		err = w.tree.add(e)
	}
	if err != nil {
		return err
	}
	return w.index.add(e)
}

// place checks that e may come next.
func (w *Writer) place(e Entry) error {
	if len(w.index.table) > 0 && comparePaths(w.index.last, e.Path) >= 0 {
		return fmt.Errorf("%w: comes after %s", errOrder, w.index.last)
	}
	for len(w.open) > 0 && !beneath(e.Path, w.open[len(w.open)-1]) {
		w.open = w.open[:len(w.open)-1]
	}
	parent := path.Dir(e.Path)
	if parent != "." && (len(w.open) == 0 || w.open[len(w.open)-1] != parent) {
		return errors.New("its directory is not in the layer")
	}
	if e.Type == Dir {
		w.open = append(w.open, e.Path)
	}
	if e.Type == Hardlink {
		if target, ok := w.index.find(e.Link); !ok || !target.linkable() {
			return fmt.Errorf("link to %s: no such file before it in the layer", e.Link)
		}
	}
	return nil
}

// copy sends the bytes of a file to its hash, the tar and the tree.
func (w *Writer) copy(e Entry, content io.Reader) (digest.Digest, error) {
	var file *treeFile
	if w.tree != nil {
		var err error
		if file, err = w.tree.create(e.Path); err != nil {
			return "", err
		}
		defer file.close()
	}
	sum, err := w.stream(e.Size, content, file)
	if err != nil {
		return "", err
	}
	if e.Digest != "" && e.Digest != sum {
		return "", fmt.Errorf("%w: digest is %s, not %s", ErrChanged, sum, e.Digest)
	}
	if file != nil {
		return sum, file.finish(e)
	}
	return sum, nil
}

const copyBuffer = 256 << 10

// stream sends size bytes of content to the tar and to file, and returns their digest.
func (w *Writer) stream(size int64, content io.Reader, file *treeFile) (digest.Digest, error) {
	if r, ok := content.(*ready); ok {
		return r.sum, w.emit(r.data, file)
	}
	if w.buf == nil {
		w.buf = make([]byte, copyBuffer)
	}
	w.file.Reset()
	for left := size; left > 0; {
		n, err := 0, io.EOF
		if content != nil {
			n, err = io.ReadFull(content, w.buf[:min(left, copyBuffer)])
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return "", fmt.Errorf("%w: %d bytes shorter than %d", ErrChanged, left-int64(n), size)
		}
		if err == nil {
			err = w.ctx.Err()
		}
		if err == nil {
			w.file.Write(w.buf[:n])
			err = w.emit(w.buf[:n], file)
		}
		if err != nil {
			return "", err
		}
		left -= int64(n)
	}
	return digest.NewDigest(digest.SHA256, w.file), atEnd(content, size)
}

// emit sends bytes of a file to the tar and the tree.
func (w *Writer) emit(b []byte, file *treeFile) error {
	if _, err := w.tar.Write(b); err != nil || file == nil {
		return err
	}
	return file.write(b)
}

func atEnd(content io.Reader, size int64) error {
	if content == nil {
		return nil
	}
	var one [1]byte
	switch _, err := io.ReadFull(content, one[:]); err {
	case io.EOF:
		return nil
	case nil:
		return fmt.Errorf("%w: longer than %d bytes", ErrChanged, size)
	default:
		return err
	}
}

// Close finishes the layer and puts it in the store. A layer that is there
// already stays as it is. On error nothing is left.
func (w *Writer) Close() (Layer, error) {
	if w.ended {
		return Layer{}, errors.New("close layer: already closed")
	}
	defer w.Abort()
	l, err := w.close()
	if err != nil {
		return Layer{}, fmt.Errorf("close layer: %w", err)
	}
	return l, nil
}

func (w *Writer) close() (Layer, error) {
	if w.err != nil {
		return Layer{}, w.err
	}
	if err := w.tar.Close(); err != nil {
		return Layer{}, err
	}
	l := Layer{DiffID: digest.NewDigest(digest.SHA256, w.diff)}
	if w.expect != "" && w.expect != l.DiffID {
		return Layer{}, fmt.Errorf("unpacked files make %s, not %s", l.DiffID, w.expect)
	}
	x := w.index.finish()
	if w.tree != nil {
		if err := w.tree.finish(x); err != nil {
			return Layer{}, err
		}
		w.adopt = filepath.Join(w.dir, "tree")
	}
	if w.adopt != "" {
		if err := w.s.putTree(l, w.adopt); err != nil {
			return Layer{}, err
		}
	}
	if w.blob != nil {
		if err := w.s.finishBlob(w.ctx, l, w.blob); err != nil {
			return Layer{}, err
		}
	}
	// Last, because a layer with an index counts as known.
	return l, w.s.putIndex(l, x)
}

// Abort throws away an unfinished layer; after Close it does nothing.
func (w *Writer) Abort() {
	if w.ended {
		return
	}
	w.ended = true
	if w.blob != nil {
		w.blob.close()
	}
	if w.tree != nil {
		w.tree.close()
	}
	if w.dir != "" {
		removeAll(w.dir)
	}
}

// removeAll is os.RemoveAll that also gets rid of directories without
// permission bits, such as overlayfs makes.
func removeAll(dir string) error {
	if os.RemoveAll(dir) == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
