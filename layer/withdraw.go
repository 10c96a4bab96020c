package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Withdraw takes a promise back: the blob can't be had after all. What is
// stored of l stays; whether l can still be had is what Has says then.
func (s *Store) Withdraw(l Layer, blob digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := slices.DeleteFunc(slices.Clone(s.promises[l.DiffID]), func(p promise) bool { return p.desc.Digest == blob })
	if s.promises[l.DiffID] = left; len(left) == 0 {
		delete(s.promises, l.DiffID)
	}
	if s.promised[blob] == l {
		delete(s.promised, blob)
	}
}

// Stream opens a blob like OpenBlob, but of a promised one the bytes only pass
// through: nothing is stored. It is for those who send a blob on and never
// look into it.
func (s *Store) Stream(ctx context.Context, dgst digest.Digest) (io.ReadCloser, error) {
	if err := checkDigest(dgst); err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	r, _, err := s.openStored(ctx, dgst)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	again := s.remake(ctx, dgst)
	if again == nil {
		r, _, err := s.openStored(ctx, dgst)
		return r, err
	}
	failed := again
	s.mu.Lock()
	l := s.promised[dgst]
	s.mu.Unlock()
	for _, p := range s.promisesOf(l) {
		if p.desc.Digest != dgst {
			continue
		}
		body, err := p.fetch(ctx)
		if err == nil {
			return passing{newVerifier(ctx, body, dgst, p.desc.Size), body}, nil
		}
		failed = err
		if again != errNotMade {
			failed = errors.Join(again, err)
		}
	}
	return nil, fmt.Errorf("open blob: %w", failed)
}

// passing is a blob on its way through.
type passing struct {
	io.Reader
	io.Closer
}
