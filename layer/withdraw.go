package layer

import (
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
