package layer

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Blobs are not synced to disk before they are renamed, only before an image
// is named that needs them: see durable.go. Every reader verifies size and
// digest; a blob that does not match is removed, and made or fetched again
// when it is next needed.

// promise is a blob of a layer that can be fetched.
type promise struct {
	desc  ocispec.Descriptor
	fetch func(context.Context) (io.ReadCloser, error)
}

// Promise says that the blob d of l can be had from fetch. It is fetched when
// something needs it, at most once; then digest, size and diff ID are
// verified, the blob is stored and the layer indexed. fetch may be called
// from any goroutine until the store is closed. If what it returns has a method
// Ref() string, errors name the blob by that.
func (s *Store) Promise(l Layer, d ocispec.Descriptor, fetch func(context.Context) (io.ReadCloser, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.promised[d.Digest] = l
	list := s.promises[l.DiffID]
	i := slices.IndexFunc(list, func(p promise) bool { return p.desc.Digest == d.Digest })
	if i >= 0 {
		list = slices.Delete(slices.Clone(list), i, i+1)
	}
	// The newest first: it is the one that the caller knows to work now.
	s.promises[l.DiffID] = append([]promise{{d, fetch}}, list...)
}

func (s *Store) promisesOf(l Layer) []promise {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.promises[l.DiffID]
}

// storedBlob is one line of layers/<hex>/blobs.
type storedBlob struct {
	Algorithm  string             `json:"algorithm"`
	Level      int                `json:"level,omitempty"` // 0 for a blob that filo did not compress
	Descriptor ocispec.Descriptor `json:"descriptor"`
}

// suits says whether b is what c asks for; a blob of unknown level is unless a
// level was asked for.
func (b storedBlob) suits(c Compression, asked Compression) bool {
	if b.Algorithm != c.Algorithm {
		return false
	}
	return b.Level == c.Level || asked.Level == 0
}

// Blob returns the descriptor of a blob of l, with an OCI media type. A blob
// that exists or is promised is preferred to making one; with force only if
// it is compressed as c says. A promised blob is not fetched. A new blob is
// made from another one or from the tree, and must have l's diff ID.
func (s *Store) Blob(ctx context.Context, l Layer, c Compression, force bool) (ocispec.Descriptor, error) {
	fail := func(err error) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("compress layer %s: %w", l.DiffID, err)
	}
	if err := checkDigest(l.DiffID); err != nil {
		return fail(err)
	}
	want, err := c.normal()
	if err != nil {
		return fail(err)
	}
	asked := wantedBlob{l.DiffID, want, c, force}
	s.mu.Lock()
	known, ok := s.blobs[asked]
	s.mu.Unlock()
	if ok && s.hasBlob(known) {
		return known, nil
	}
	if d, ok := s.existingBlob(l, want, c, force); ok {
		s.mu.Lock()
		s.blobs[asked] = d
		s.mu.Unlock()
		return d, s.noteTwin(ctx, l, d)
	}
	unlock, err := s.Lock(ctx, "blob "+l.DiffID.String())
	if err != nil {
		return fail(err)
	}
	defer unlock()
	if d, ok := s.existingBlob(l, want, c, force); ok {
		return d, nil
	}
	if err := s.makeBlob(ctx, l, want); err != nil {
		return fail(err)
	}
	s.mu.Lock() // who asked before may get the new one now
	maps.DeleteFunc(s.blobs, func(w wantedBlob, _ ocispec.Descriptor) bool { return w.diffID == l.DiffID })
	s.mu.Unlock()
	if d, ok := s.existingBlob(l, want, c, true); ok {
		return d, nil
	}
	return fail(errors.New("blob vanished"))
}

// wantedBlob is what Blob was asked for.
type wantedBlob struct {
	diffID      digest.Digest
	want, asked Compression
	force       bool
}

func (s *Store) existingBlob(l Layer, c, asked Compression, force bool) (ocispec.Descriptor, bool) {
	var other ocispec.Descriptor
	for _, b := range s.storedBlobs(l) {
		if b.Algorithm == c.Algorithm && b.Level == c.Level {
			return b.Descriptor, true
		}
		if b.suits(c, asked) || other.Digest == "" && !force {
			other = b.Descriptor
		}
	}
	if other.Digest != "" {
		return other, true
	}
	for _, p := range s.promisesOf(l) {
		algorithm, err := algorithmOf(p.desc)
		if err == nil && (!force || storedBlob{Algorithm: algorithm}.suits(c, asked)) {
			return ociDescriptor(p.desc, algorithm), true
		}
	}
	return ocispec.Descriptor{}, false
}

func ociDescriptor(d ocispec.Descriptor, algorithm string) ocispec.Descriptor {
	var annotations map[string]string
	if algorithm == EStargz {
		annotations = BlobAnnotations(d)
	}
	return ocispec.Descriptor{MediaType: mediaType(algorithm), Digest: d.Digest, Size: d.Size, Annotations: annotations}
}

// makeBlob compresses l from a stored or promised blob, or from its tree.
func (s *Store) makeBlob(ctx context.Context, l Layer, c Compression) error {
	if len(s.storedBlobs(l)) == 0 {
		if s.hasTree(l) && s.blobFromTree(ctx, l, c, s.treePath(l)) == nil {
			return nil
		}
		promises := s.promisesOf(l)
		if len(promises) == 0 {
			if err := s.obtain(ctx, l, need{tree: true}); err != nil {
				return err
			}
			return s.blobFromTree(ctx, l, c, s.treePath(l))
		}
		if err := s.obtain(ctx, l, need{blob: promises[0].desc.Digest}); err != nil {
			if s.blobFromAny(ctx, l, c) != nil {
				return err
			}
			return nil
		}
	}
	return s.blobFromBlob(ctx, l, c)
}

// blobFromAny compresses l from what is here. The tree need not be trusted for that: what comes out has a digest.
func (s *Store) blobFromAny(ctx context.Context, l Layer, c Compression) error {
	err := s.blobFromBlob(ctx, l, c)
	for _, tree := range s.treesOf(l, s.treePath(l)) {
		if _, none := os.Lstat(tree); none == nil && err != nil {
			err = s.blobFromTree(ctx, l, c, tree)
		}
	}
	return err
}

// blobFromBlob compresses l from another blob of it.
func (s *Store) blobFromBlob(ctx context.Context, l Layer, c Compression) error {
	failed := error(nil)
	for _, b := range s.storedBlobs(l) {
		err := s.recompress(ctx, l, b.Descriptor, c)
		if err == nil {
			return nil
		}
		failed = errors.Join(failed, err)
	}
	return cmp.Or(failed, errNotHere)
}

// blobFromTree compresses l from a tree of it. If that turns out to be damaged and is ours, it is removed.
func (s *Store) blobFromTree(ctx context.Context, l Layer, c Compression, tree string) error {
	x, err := s.index(ctx, l)
	if err != nil {
		return err
	}
	err = s.rebuild(ctx, l, Sinks{Blob: &c}, x, tree)
	if tree == s.treePath(l) && (errors.Is(err, errDamagedTree) || errors.Is(err, fs.ErrNotExist)) {
		err = errors.Join(err, s.loseTree(l))
	}
	return err
}

// loseTree removes the tree of l, which is damaged.
func (s *Store) loseTree(l Layer) error {
	s.repaired("tree of layer %s", l.DiffID)
	dir, err := s.Temp("lost-")
	if err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.compared, l.DiffID)
	s.mu.Unlock()
	s.dropTree(l, dir)
	return removeAll(dir)
}

func (s *Store) recompress(ctx context.Context, l Layer, d ocispec.Descriptor, c Compression) error {
	in, _, err := s.openStored(ctx, d.Digest)
	if err != nil {
		return err
	}
	defer in.Close()
	src, _, err := decompressor(payload(in, d))
	if err != nil {
		return err
	}
	defer src.Close()
	out, err := s.newBlobFile(c)
	if err != nil {
		return err
	}
	defer out.close()
	diff := sha256.New()
	if _, err := io.CopyBuffer(io.MultiWriter(diff, out), src, make([]byte, copyBuffer)); err != nil {
		return err
	}
	if sum := digest.NewDigest(digest.SHA256, diff); sum != l.DiffID {
		return fmt.Errorf("blob %s holds %s", d.Digest, sum)
	}
	return s.finishBlob(ctx, l, out)
}

// OpenBlob opens a stored or promised blob for reading and returns its size;
// a promised one is fetched and verified first. The reader verifies as well:
// at the end it returns an error instead of io.EOF if the blob is damaged. An
// unknown blob is an error that wraps fs.ErrNotExist.
func (s *Store) OpenBlob(ctx context.Context, dgst digest.Digest) (io.ReadCloser, int64, error) {
	if err := checkDigest(dgst); err != nil {
		return nil, 0, fmt.Errorf("open blob: %w", err)
	}
	r, size, err := s.openStored(ctx, dgst)
	if err == nil {
		return r, size, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("open blob: %w", err)
	}
	again := s.remake(ctx, dgst)
	if again == nil {
		return s.openStored(ctx, dgst)
	}
	s.mu.Lock()
	l, promised := s.promised[dgst]
	s.mu.Unlock()
	if !promised {
		return nil, 0, fmt.Errorf("open blob %s: %w", dgst, again)
	}
	if err := s.obtain(ctx, l, need{blob: dgst}); err != nil {
		if again != errNotMade {
			err = errors.Join(again, err)
		}
		return nil, 0, fmt.Errorf("open blob: %w", err)
	}
	return s.openStored(ctx, dgst)
}

func (s *Store) openStored(ctx context.Context, dgst digest.Digest) (io.ReadCloser, int64, error) {
	path := s.blobPath(dgst)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && s.revive(ctx, dgst) {
		f, err = os.Open(path)
	}
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	s.used(path, info)
	v := newVerifier(ctx, f, dgst, info.Size())
	return &blobReader{Reader: v, file: f, damaged: func() {
		if sameFile(f, path) { // else somebody made it again meanwhile
			s.damaged(ctx, dgst)
		}
	}}, info.Size(), nil
}

// blobReader has its file replaced or removed if that turns out to be damaged.
type blobReader struct {
	io.Reader
	file    *os.File
	damaged func()
}

func (b *blobReader) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, errMismatch) {
		b.damaged()
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return n, err
}

func (b *blobReader) Close() error { return b.file.Close() }

// PutBlob stores a small blob, such as a manifest or config.
func (s *Store) PutBlob(ctx context.Context, mediaType string, data []byte) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	path := s.blobPath(d.Digest)
	old, err := os.ReadFile(path)
	if err == nil && bytes.Equal(old, data) {
		s.touch(path)
		return d, nil
	}
	if err == nil {
		s.repaired("blob %s", d.Digest)
	}
	if err := s.putFile(path, data); err != nil {
		return d, fmt.Errorf("store blob %s: %w", d.Digest, err)
	}
	return d, nil
}

// ReadBlob returns a small stored blob, verified. One that is absent or
// damaged is restored from its second copy. If there is none, the error wraps
// fs.ErrNotExist, and what is damaged is removed. Promises are not fetched.
func (s *Store) ReadBlob(ctx context.Context, dgst digest.Digest) ([]byte, error) {
	if err := checkDigest(dgst); err != nil {
		return nil, fmt.Errorf("read blob: %w", err)
	}
	data, err := s.readSmall(dgst)
	if err == nil && digest.FromBytes(data) == dgst {
		return data, nil
	}
	if kept := s.restore(ctx, dgst); kept != nil {
		return kept, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read blob: %w", err)
	}
	s.damaged(ctx, dgst)
	return nil, fmt.Errorf("read blob %s: %w (removed): %w", dgst, errMismatch, fs.ErrNotExist)
}

func (s *Store) readSmall(d digest.Digest) ([]byte, error) {
	f, err := os.Open(s.blobPath(d))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > maxSmallBlob {
		return nil, fmt.Errorf("%s: %d bytes are too many for a manifest or config", d, info.Size())
	}
	s.used(f.Name(), info)
	return io.ReadAll(f)
}

const maxSmallBlob = 64 << 20

func (s *Store) blobPath(d digest.Digest) string {
	return filepath.Join(s.dir, "blobs", "sha256", hexOf(d))
}

// storedBlobs lists the blobs of l that are here and as long as they should
// be. A damaged list is an empty one.
func (s *Store) storedBlobs(l Layer) []storedBlob {
	return slices.DeleteFunc(s.readBlobs(l), func(b storedBlob) bool { return !s.hasBlob(b.Descriptor) })
}

func (s *Store) readBlobs(l Layer) []storedBlob {
	data, err := ReadFile(filepath.Join(s.layerDir(l), "blobs"))
	if err != nil {
		return nil
	}
	var list []storedBlob
	err = json.Unmarshal(data, &list)
	valid := slices.DeleteFunc(list, func(b storedBlob) bool { return !b.valid() })
	if err != nil || len(valid) < len(list) {
		s.repaired("blob list of layer %s", l.DiffID)
	}
	return valid
}

// finishBlob finishes a blob of l and puts it where it belongs.
func (s *Store) finishBlob(ctx context.Context, l Layer, f *blobFile) error {
	b, err := f.finish()
	if err == nil {
		err = s.putLayerBlob(ctx, l, f.file.Name(), b)
	}
	f.put = err == nil
	if err == nil && f.parity != nil {
		err = s.putParity(b.Descriptor.Digest, f.parity)
	}
	return err
}

// putLayerBlob moves a finished file to its place, or removes it if there is one already, and notes it as a blob of l.
func (s *Store) putLayerBlob(ctx context.Context, l Layer, file string, b storedBlob) error {
	if !s.hasBlob(b.Descriptor) { // one that is there may have reached the disk already, where this one has not
		s.stamp(file)
		if err := os.Rename(file, s.blobPath(b.Descriptor.Digest)); err != nil {
			return err
		}
	} else if err := os.Remove(file); err != nil {
		return err
	}
	if err := s.noteBlob(ctx, l, b); err != nil {
		return err
	}
	return s.noteTwin(ctx, l, b.Descriptor)
}

// noteTwin notes an eStargz blob of l for the layer that images name for it,
// so that such an image can be read again. What is only promised may say what
// it likes.
func (s *Store) noteTwin(ctx context.Context, l Layer, d ocispec.Descriptor) error {
	twin := Layer{digest.Digest(d.Annotations[AnnotationDiffID])}
	if twin.DiffID == "" {
		return nil
	}
	if err := checkDigest(twin.DiffID); err != nil {
		return err
	}
	if !slices.ContainsFunc(s.storedBlobs(l), func(b storedBlob) bool { return b.Descriptor.Digest == d.Digest }) {
		return nil
	}
	d.Annotations = ManifestAnnotations(d)
	return s.noteBlob(ctx, twin, storedBlob{Algorithm: EStargz, Descriptor: d})
}

// hasBlob says whether the blob d is here and right.
func (s *Store) hasBlob(d ocispec.Descriptor) bool {
	info, err := os.Lstat(s.blobPath(d.Digest))
	if err != nil || !s.sound(d.Digest, info) {
		return false
	}
	if info.Size() != d.Size { // it may have been mended
		info, err = os.Lstat(s.blobPath(d.Digest))
	}
	return err == nil && info.Size() == d.Size
}

// noteBlob notes a stored blob as one of l.
func (s *Store) noteBlob(ctx context.Context, l Layer, b storedBlob) error {
	unlock, err := s.Lock(ctx, "blobs "+l.DiffID.String())
	if err != nil {
		return err
	}
	defer unlock()
	list := s.readBlobs(l)
	same := func(o storedBlob) bool { return o.Descriptor.Digest == b.Descriptor.Digest }
	if i := slices.IndexFunc(list, same); i >= 0 && (list[i].Level == b.Level || b.Level == 0) {
		return nil
	} else if i >= 0 {
		list = slices.Delete(list, i, i+1)
	}
	data, err := json.Marshal(append(list, b))
	if err != nil {
		return err
	}
	return s.putFile(filepath.Join(s.layerDir(l), "blobs"), data)
}

// blobFile is a blob while it is written: compressed, hashed, counted.
type blobFile struct {
	file *os.File
	c    Compression
	z    io.WriteCloser
	hash hash.Hash
	size int64
	sent int64 // bytes on their way to the disk
	done bool  // all is written
	put  bool  // it is where it belongs

	parity *parity // nil for none
}

// writeBehind is how many bytes of a blob wait to be written to the disk at most. The end of a build, which waits for
// all of them, need not begin with gigabytes then.
const writeBehind = 8 << 20

func (s *Store) newBlobFile(c Compression) (*blobFile, error) {
	c, err := c.normal()
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(s.tmp, "blob-")
	if err != nil {
		return nil, err
	}
	b := &blobFile{file: f, c: c, hash: sha256.New()}
	if b.z, err = s.compressor(c, writerFunc(b.write)); err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, err
	}
	return b, nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (b *blobFile) write(p []byte) (int, error) {
	b.hash.Write(p)
	if b.parity != nil {
		b.parity.Write(p)
	}
	b.size += int64(len(p))
	n, err := b.file.Write(p)
	if b.size-b.sent >= writeBehind && err == nil {
		// Only a hint: it waits for nothing.
		_ = unix.SyncFileRange(int(b.file.Fd()), b.sent, b.size-b.sent, unix.SYNC_FILE_RANGE_WRITE)
		b.sent = b.size
	}
	return n, err
}

// Write takes uncompressed bytes.
func (b *blobFile) Write(p []byte) (int, error) { return b.z.Write(p) }

func (b *blobFile) finish() (storedBlob, error) {
	b.done = true
	if err := errors.Join(b.z.Close(), b.file.Chmod(0o644), b.file.Close()); err != nil {
		return storedBlob{}, err
	}
	d := ocispec.Descriptor{
		MediaType: mediaType(b.c.Algorithm),
		Digest:    digest.NewDigest(digest.SHA256, b.hash),
		Size:      b.size,
	}
	if z, ok := b.z.(*seekable); ok {
		d.Annotations = z.annotations()
	}
	return storedBlob{b.c.Algorithm, b.c.Level, d}, nil
}

// close gives up a blob that was put nowhere; it ends the compressor's goroutines.
func (b *blobFile) close() {
	if !b.done {
		b.done = true
		_ = b.z.Close()
		_ = b.file.Close()
	}
	if !b.put {
		_ = os.Remove(b.file.Name())
	}
}

var errMismatch = errors.New("content does not match its digest")

// verifier passes bytes on and returns an error instead of io.EOF if they are
// not those that were promised.
type verifier struct {
	ctx  context.Context
	r    io.Reader
	want digest.Digest
	name string // in errors
	left int64
	hash hash.Hash
	err  error
}

func newVerifier(ctx context.Context, r io.Reader, want digest.Digest, size int64) *verifier {
	name := want.String()
	if from, ok := r.(interface{ Ref() string }); ok {
		name = from.Ref()
	}
	return &verifier{ctx: ctx, r: r, want: want, name: name, left: size, hash: sha256.New()}
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if v.ctx.Err() != nil {
		return 0, context.Cause(v.ctx)
	}
	n, err := v.r.Read(p)
	if int64(n) > v.left {
		v.err = fmt.Errorf("%s: %w: longer than it should be", v.name, errMismatch)
		return 0, v.err
	}
	v.hash.Write(p[:n])
	v.left -= int64(n)
	if err == io.EOF || err == nil && n > 0 && v.left == 0 { // who knows the size may not read on
		end := v.atEnd()
		if end != io.EOF {
			n = 0 // nobody gets all of what is wrong
		}
		if err == io.EOF || end != io.EOF {
			err = end
		}
	}
	v.err = err
	return n, err
}

func (v *verifier) atEnd() error {
	if v.left > 0 {
		return fmt.Errorf("%s: %w: %d bytes are missing", v.name, errMismatch, v.left)
	}
	if digest.NewDigest(digest.SHA256, v.hash) != v.want {
		return fmt.Errorf("%s: %w", v.name, errMismatch)
	}
	return io.EOF
}
