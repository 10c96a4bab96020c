package layer

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Use is what things of one kind take in the state directory.
type Use struct {
	Kind        string // "layers", "blobs", "cache mounts", "sources", "records", "unfinished"
	Items       int
	Bytes       int64 // on disk
	Reclaimable int64 // of these, what no image of index.json needs
}

// Usage says what takes how much of the state directory. What other processes do meanwhile may or may not be counted.
func (s *Store) Usage(ctx context.Context) ([]Use, error) {
	needed, err := s.needed(ctx)
	if err != nil {
		return nil, fmt.Errorf("measure store: %w", err)
	}
	var out []Use
	for _, k := range []struct {
		kind string
		dirs []string
		keep map[string]bool
	}{
		{"layers", []string{"layers"}, needed.layers},
		{"blobs", []string{"blobs/sha256"}, needed.blobs},
		{"cache mounts", []string{"mounts"}, nil},
		{"sources", []string{"sources"}, nil},
		{"records", []string{"steps", "files"}, nil},
		{"unfinished", []string{"tmp"}, nil},
	} {
		u := Use{Kind: k.kind}
		for _, dir := range k.dirs {
			if err := u.add(ctx, filepath.Join(s.dir, dir), k.keep); err != nil {
				return nil, fmt.Errorf("measure store: %w", err)
			}
		}
		out = append(out, u)
	}
	return out, nil
}

// add counts what is in dir. Nothing of a name in keep can be reclaimed.
func (u *Use) add(ctx context.Context, dir string, keep map[string]bool) error {
	list, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil
	}
	for _, d := range list {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		size := diskUse(filepath.Join(dir, d.Name()))
		u.Items++
		u.Bytes += size
		if !keep[d.Name()] {
			u.Reclaimable += size
		}
	}
	return err
}

// needed marks what the images of index.json need.
func (s *Store) needed(ctx context.Context) (*pruning, error) {
	p := &pruning{s: s, ctx: ctx, layers: map[string]bool{}, blobs: map[string]bool{}}
	if err := p.markTagged(); err != nil {
		return nil, err
	}
	for hex := range p.layers {
		for _, b := range s.readBlobs(Layer{DiffID: digest.NewDigestFromEncoded(digest.SHA256, hex)}) {
			p.blobs[hexOf(b.Descriptor.Digest)] = true
		}
	}
	return p, nil
}

// Cutoff returns a time such that what was used later takes at most bound bytes; images of index.json count whenever they
// were used. used tells of layers whose use the store does not see, such as those of cache records.
func (s *Store) Cutoff(ctx context.Context, bound int64, used map[digest.Digest]time.Time) (time.Time, error) {
	needed, err := s.needed(ctx)
	if err != nil {
		return time.Time{}, fmt.Errorf("measure store: %w", err)
	}
	var all []aged
	for dir, keep := range map[string]map[string]bool{"layers": needed.layers, "blobs/sha256": needed.blobs, "mounts": nil} {
		list, err := os.ReadDir(filepath.Join(s.dir, dir))
		if err != nil && !os.IsNotExist(err) {
			return time.Time{}, fmt.Errorf("measure store: %w", err)
		}
		for _, d := range list {
			info, err := d.Info()
			if err != nil {
				continue // gone meanwhile
			}
			size := diskUse(filepath.Join(s.dir, dir, d.Name()))
			if keep[d.Name()] {
				bound -= size
				continue
			}
			at := info.ModTime()
			if t := used[digest.NewDigestFromEncoded(digest.SHA256, d.Name())]; dir == "layers" && t.After(at) {
				at = t
			}
			all = append(all, aged{at, size})
		}
	}
	slices.SortFunc(all, func(a, b aged) int { return b.used.Compare(a.used) })
	for _, a := range all {
		if bound -= a.size; bound < 0 {
			return a.used, nil
		}
	}
	return time.Time{}, nil
}

// aged is something in the store, when it was used last and what removing it frees.
type aged struct {
	used time.Time
	size int64
}
