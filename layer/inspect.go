package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// ErrUnsound says that an unpacked layer turned out to be damaged when it was in use already. What was made with it
// counts for nothing. The layer is unpacked again when it is next asked for.
var ErrUnsound = errors.New("unpacked layer was damaged")

// Inspection is the comparison of unpacked layers with what they should be, which goes on while they are used: it takes
// two microseconds a file, and images have up to a million.
type Inspection struct {
	layers []Layer
	of     []*comparison // of layers, and not known to have ended well when it began
}

func newInspection(layers []Layer, found []*comparison) (in Inspection) {
	for i, c := range found {
		if c != nil {
			in.layers, in.of = append(in.layers, layers[i]), append(in.of, c)
		}
	}
	return in
}

// Wait waits for the end. A damaged layer is an error that wraps [ErrUnsound].
func (in Inspection) Wait(ctx context.Context) error {
	for i, c := range in.of {
		err := c.wait(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrUnsound, in.layers[i].DiffID, err)
		}
	}
	return nil
}

// Passed says whether it has ended and no layer is damaged.
func (in Inspection) Passed() bool {
	for _, c := range in.of {
		if !c.over() || c.err != nil {
			return false
		}
	}
	return true
}

// comparison is that of a tree with its index.
type comparison struct {
	done chan struct{}
	err  error // to be read when done is closed
}

// wholeTree has ended well.
var wholeTree = func() *comparison {
	c := &comparison{done: make(chan struct{})}
	close(c.done)
	return c
}()

func (c *comparison) over() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *comparison) failed() bool { return c.over() && c.err != nil }

func (c *comparison) wait(ctx context.Context) error {
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// comparison returns the last one of the tree of l; nil if there was none.
func (s *Store) comparison(l Layer) *comparison {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.compared[l.DiffID]
}

// inspect begins to compare the tree of l with its index, unless that goes on or was done. It returns nil if there is no
// tree that was made since the last boot.
func (s *Store) inspect(l Layer) *comparison {
	if c := s.comparison(l); c != nil {
		return c
	}
	made, err := s.readOrigin(l)
	if err != nil || made != s.treeOrigin() || made.Boot == "" {
		return nil
	}
	if _, err := os.Lstat(s.treePath(l)); err != nil { // before anybody mounts it
		return nil
	}
	x := s.cachedIndex(l)
	if x == nil {
		if x, err = s.loadIndex(l); err != nil {
			return nil
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.compared[l.DiffID]; c != nil {
		return c
	}
	c := &comparison{done: make(chan struct{})}
	s.compared[l.DiffID] = c
	s.behind.Go(func() {
		defer close(c.done)
		if c.err = (&treeCheck{dir: s.treePath(l), x: x, plain: made.Plain}).run(s.ctx); c.err == nil {
			s.touch(s.layerDir(l))
		}
	})
	return c
}
