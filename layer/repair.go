package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
)

// Of an image that is not built again nothing may be lost to a changed byte either. What nothing else can be made from,
// its manifests, configs, indexes and statements, is small, and is kept twice: copies/ has it again, from when the image
// is named. A blob that filo compressed comes out the same from another blob of its layer, or from its tree; one that has
// neither, or one that was fetched, is mended by its parity, see parity.go.

// Keep is [Store.Durable] for an image that is about to be named. There is a second copy of its documents then.
func (s *Store) Keep(ctx context.Context, documents, layers []digest.Digest) error {
	var files []string
	for _, d := range documents {
		if err := s.keepTwice(ctx, d); err != nil {
			return fmt.Errorf("keep blob %s: %w", d, err)
		}
		files = append(files, s.blobPath(d), s.copyPath(d))
	}
	for _, d := range layers {
		files = append(files, s.blobPath(d), s.parityPath(d))
	}
	return s.settle(ctx, files...)
}

func (s *Store) copyPath(d digest.Digest) string { return filepath.Join(s.dir, copies, hexOf(d)) }

// spares are the files that a blob is restored from.
func (s *Store) spares(d digest.Digest) []string { return []string{s.copyPath(d), s.parityPath(d)} }

// copies is the directory of second copies.
const copies = "copies"

// keepTwice writes the second copy of a blob unless it is there and right.
func (s *Store) keepTwice(ctx context.Context, d digest.Digest) error {
	data, err := s.ReadBlob(ctx, d)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // images may be stored in part
	}
	if err != nil {
		return err
	}
	was, err := os.ReadFile(s.copyPath(d))
	if err == nil && bytes.Equal(was, data) {
		return nil
	}
	if err == nil {
		s.repaired("copy of blob %s", d)
	}
	return s.putFile(s.copyPath(d), data)
}

// secondCopy returns what copies/ has of a blob, nil if that is missing or damaged.
func (s *Store) secondCopy(d digest.Digest) []byte {
	data, err := os.ReadFile(s.copyPath(d))
	if err != nil || digest.FromBytes(data) != d {
		return nil
	}
	return data
}

// restore puts the second copy of a blob in its place, and returns what is in it; nil if there is none. Where it cannot be
// put, as on a full disk, the next one tries again.
func (s *Store) restore(ctx context.Context, d digest.Digest) []byte {
	kept := s.secondCopy(d)
	if kept == nil {
		return nil
	}
	s.repaired("blob %s", d)
	if s.putFile(s.blobPath(d), kept) == nil {
		_ = s.settle(ctx, s.blobPath(d)) // the copy stays where it is, should that be lost
	}
	return kept
}

// ErrDamaged is the error at the end of a stored blob that is not what it should be. Who opens it again gets the right
// one, if that can be had.
var ErrDamaged = errors.New("blob was damaged")

// damaged restores a blob that turned out not to be what it should, or removes it.
func (s *Store) damaged(ctx context.Context, d digest.Digest) {
	if !s.revive(ctx, d) && os.Remove(s.blobPath(d)) == nil {
		s.repaired("blob %s", d)
	}
}

// revive makes a blob right that is lost or damaged, from its second copy or by its parity, and says whether it could.
func (s *Store) revive(ctx context.Context, d digest.Digest) bool {
	if s.restore(ctx, d) != nil {
		return true
	}
	if !s.mendBlob(ctx, d) {
		return false
	}
	s.repaired("blob %s", d)
	return true
}

// Ensure sees that a blob is here and right, as far as that shows without reading it: one that is promised is fetched,
// one that is damaged mended, one that is lost made again. If it can be had from nowhere, the error wraps fs.ErrNotExist.
func (s *Store) Ensure(ctx context.Context, d digest.Digest) error {
	if s.Ready(d) {
		return nil
	}
	if info, err := os.Lstat(s.blobPath(d)); err == nil && s.sound(d, info) { // else it is mended or removed
		if s.blobMark() == 0 { // else it has just been stamped
			s.used(s.blobPath(d), info)
		}
		return nil
	}
	r, _, err := s.OpenBlob(ctx, d)
	if err != nil {
		return err
	}
	return r.Close()
}

// Ready says whether the blob d is here and known to hold what it should, so that [Store.Ensure] has nothing to do.
func (s *Store) Ready(d digest.Digest) bool {
	info, err := os.Lstat(s.blobPath(d))
	if err != nil || !s.stamped(info) {
		return false
	}
	s.stamp(s.blobPath(d))
	return true
}

// errNotMade says that a blob is not here, and never was made here.
var errNotMade = fmt.Errorf("blob is not in the store: %w", fs.ErrNotExist)

// remake makes a lost blob of a layer again.
func (s *Store) remake(ctx context.Context, d digest.Digest) error {
	l, c, ok := s.maker(d)
	if !ok {
		return errNotMade
	}
	unlock, err := s.Lock(ctx, "blob "+l.DiffID.String())
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Lstat(s.blobPath(d)); err == nil {
		return nil
	}
	if err = s.blobFromAny(ctx, l, c); err == nil {
		_, err = os.Lstat(s.blobPath(d)) // another version of filo may have made other bytes
	}
	switch {
	case err == nil:
		s.repaired("blob %s", d)
		return nil
	case ctx.Err() != nil || noRoom(err):
		return fmt.Errorf("make blob %s again: %w", d, err)
	}
	return fmt.Errorf("%w: make blob %s again: %v", fs.ErrNotExist, d, err) // whatever the reason, such as a file that is another user's
}

// maker finds out of which layer filo made a blob, and how.
func (s *Store) maker(d digest.Digest) (Layer, Compression, bool) {
	s.mu.Lock()
	l, promised := s.promised[d]
	s.mu.Unlock()
	if promised {
		c, ok := s.madeAs(l, d)
		return l, c, ok
	}
	all, err := os.ReadDir(filepath.Join(s.dir, "layers"))
	if err != nil {
		return Layer{}, Compression{}, false
	}
	for _, dir := range all {
		l := Layer{digest.NewDigestFromEncoded(digest.SHA256, dir.Name())}
		if c, ok := s.madeAs(l, d); ok {
			return l, c, true
		}
	}
	return Layer{}, Compression{}, false
}

// madeAs says how filo compressed the blob d of l, if it did.
func (s *Store) madeAs(l Layer, d digest.Digest) (Compression, bool) {
	for _, b := range s.readBlobs(l) {
		if b.Descriptor.Digest == d && (b.Level > 0 || b.Algorithm == Uncompressed) {
			return Compression{Algorithm: b.Algorithm, Level: b.Level}, true
		}
	}
	return Compression{}, false
}
