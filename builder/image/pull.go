package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer"
	"filo/layer/registry"
)

// PullMode says where a base is looked for.
type PullMode int

// The ways to look for a base.
const (
	PullCurrent PullMode = iota // a local image of that name, else what the registry has now
	PullAlways                  // what the registry has now
)

// Pull reads a base image for a platform and promises its layers to the store. Fetched are only manifest
// and config, and only those that the store does not hold: a reference by digest is asked for once ever.
// If the registry cannot be reached, what the reference resolved to last is used and Image.Stale says so.
func Pull(ctx context.Context, s *layer.Store, c *registry.Client, ref string, p ocispec.Platform, mode PullMode) (*Image, error) {
	full, err := registry.Normalize(ref)
	if err != nil {
		return nil, err
	}
	var local *Image
	if mode != PullAlways {
		local, err = Load(ctx, s, c, full, p)
		if errors.Is(err, ErrDamaged) && mode == PullCurrent {
			local, err = reload(ctx, s, c, full, p, err)
		}
		if err == nil && !local.WrongPlatform {
			return local, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoPlatform) {
			return nil, err
		}
	}
	img, err := pull(ctx, s, c, full, p)
	if err != nil && local != nil {
		return local, nil
	}
	return img, err
}

func pull(ctx context.Context, s *layer.Store, c *registry.Client, full string, p ocispec.Platform) (*Image, error) {
	d, stale, err := find(ctx, s, c, full)
	if err != nil {
		return nil, err
	}
	r := &reader{store: s, client: c, ref: full}
	img, err := r.image(ctx, d, p)
	if err != nil {
		return nil, err
	}
	img.Stale = stale
	if stale == nil {
		if err := remember(ctx, s, full, d); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// find says what a reference stands for: now, or, with the reason, when it was last asked.
func find(ctx context.Context, s *layer.Store, c *registry.Client, full string) (ocispec.Descriptor, error, error) {
	if d := pinned(full); d != "" {
		return ocispec.Descriptor{Digest: d}, nil, nil
	}
	d, err := c.Resolve(ctx, full)
	if err == nil {
		return d, nil, nil
	}
	if !registry.Is(err, registry.Unreachable) && !registry.Is(err, registry.TooMany) {
		return d, nil, err
	}
	was, lastErr := last(s, full)
	if lastErr != nil {
		return d, nil, err
	}
	return was, err, nil
}

// Load reads an image that the store has under a name and promises its layers, as far as they are not here
// but known to be somewhere. c may be nil. If there is none the error is fs.ErrNotExist, if it
// is not whole ErrDamaged.
func Load(ctx context.Context, s *layer.Store, c *registry.Client, name string, p ocispec.Platform) (*Image, error) {
	d, err := Lookup(s, name)
	if err != nil {
		return nil, err
	}
	full, err := registry.Normalize(name)
	if err != nil {
		return nil, err
	}
	r := &reader{store: s, ref: full}
	img, err := r.image(ctx, d, p)
	if err != nil {
		return nil, Damaged(d, err)
	}
	return img, Restore(ctx, s, c, d)
}

// reload reads an image that the store has a name for, and no more all that it names, from the registry that the name
// says: what has the digest is the same. If that does not have it, the error is lost.
func reload(ctx context.Context, s *layer.Store, c *registry.Client, full string, p ocispec.Platform, lost error) (*Image, error) {
	d, err := Lookup(s, full)
	if err != nil || c == nil {
		return nil, lost
	}
	r := &reader{store: s, client: c, ref: full}
	img, err := r.image(ctx, d, p)
	if err != nil {
		return nil, lost
	}
	return img, nil
}

// Read reads the image of a manifest or index that is in the store, whatever its name. Its layers must be in
// the store or promised before they are used.
func Read(ctx context.Context, s *layer.Store, d ocispec.Descriptor, p ocispec.Platform) (*Image, error) {
	r := &reader{store: s, ref: d.Digest.String()}
	return r.image(ctx, d, p)
}

// image reads manifest and config and, if there is a client, promises the layers from it.
func (r *reader) image(ctx context.Context, d ocispec.Descriptor, p ocispec.Platform) (*Image, error) {
	doc, err := r.document(ctx, d)
	if err != nil {
		return nil, err
	}
	m, wrong, err := r.choose(ctx, doc, p)
	if err != nil {
		return nil, err
	}
	config, err := r.config(ctx, m)
	if err != nil {
		return nil, err
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("%s: the config names %d layers, the manifest %d", r.ref, len(config.RootFS.DiffIDs), len(m.Layers))
	}
	img := &Image{Config: config, Name: r.ref, Digest: d.Digest, WrongPlatform: wrong, Annotations: m.Annotations}
	for i, l := range m.Layers {
		layer, err := r.promise(ctx, l, config.RootFS.DiffIDs[i])
		if err != nil {
			return nil, fmt.Errorf("%s: layer %d: %w", r.ref, i+1, err)
		}
		img.Layers = append(img.Layers, layer)
	}
	return img, nil
}

func (r *reader) promise(ctx context.Context, d ocispec.Descriptor, diffID digest.Digest) (layer.Layer, error) {
	l := layer.Layer{DiffID: diffID}
	if err := diffID.Validate(); err != nil {
		return l, fmt.Errorf("diff ID %q: %w", string(diffID), err)
	}
	if err := d.Digest.Validate(); err != nil {
		return l, fmt.Errorf("digest %q: %w", string(d.Digest), err)
	}
	t, err := layerType(d.MediaType, false)
	if err != nil {
		return l, err
	}
	plain := ocispec.Descriptor{MediaType: t, Digest: d.Digest, Size: d.Size, Annotations: layer.ManifestAnnotations(d)}
	if r.client == nil {
		r.store.PromiseStored(ctx, l, plain)
		return l, nil
	}
	client, ref := r.client, r.ref
	r.store.Promise(l, plain, func(ctx context.Context) (io.ReadCloser, error) {
		return client.Blob(ctx, ref, plain)
	})
	return l, addOrigin(ctx, r.store, d.Digest, ref)
}
