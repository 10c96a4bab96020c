package layer

import (
	"context"
	"iter"
)

// Difference returns the first path at which two layers have not the same files, "" if they have. Modification times
// do not count.
func (s *Store) Difference(ctx context.Context, a, b Layer) (string, error) {
	if a == b {
		return "", nil
	}
	x, err := s.index(ctx, a)
	if err != nil {
		return "", err
	}
	y, err := s.index(ctx, b)
	if err != nil {
		return "", err
	}
	next, stop := iter.Pull(y.all())
	defer stop()
	for e := range x.all() {
		f, ok := next()
		f.ModTime = e.ModTime
		if !ok || e.Path != f.Path || !e.Same(f) {
			return e.Path, nil
		}
	}
	if f, ok := next(); ok {
		return f.Path, nil
	}
	return "", nil
}
