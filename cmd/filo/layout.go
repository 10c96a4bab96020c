package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder"
	"filo/builder/image"
	"filo/layer"
)

// layoutContext is an image of an OCI layout: DIR[:TAG][@DIGEST]. Manifests and configs are taken into the store at
// once, layers when somebody needs them.
func (j *job) layoutContext(text, rest string) (builder.Named, error) {
	dir, want, err := parseLayout(rest)
	if err != nil {
		return builder.Named{}, err
	}
	root, err := os.OpenRoot(dir) // whatever the layout's digests say, nothing outside of it is read
	if err != nil {
		return builder.Named{}, err
	}
	j.closers = append(j.closers, root.Close)
	l := &ociLayout{root: root, store: j.store, name: dir}
	d, err := l.choose(want)
	if err != nil {
		return builder.Named{}, err
	}
	return builder.Named{Text: text, Image: func(ctx context.Context, p ocispec.Platform) (*image.Image, error) {
		if err := l.take(ctx, d, layoutDepth); err != nil {
			return nil, err
		}
		return image.Read(ctx, j.store, d, p)
	}}, nil
}

// layoutDepth bounds indexes within indexes.
const layoutDepth = 4

// parseLayout splits DIR[:TAG][@DIGEST].
func parseLayout(s string) (dir, want string, err error) {
	dir, want, byDigest := strings.Cut(s, "@")
	if byDigest {
		if _, err := digest.Parse(want); err != nil {
			return "", "", fmt.Errorf("oci-layout://%s: %w", s, err)
		}
	}
	if i := strings.LastIndexByte(dir, ':'); i > strings.LastIndexByte(dir, '/') {
		if !byDigest {
			want = dir[i+1:]
		}
		dir = dir[:i]
	}
	if dir == "" {
		return "", "", fmt.Errorf("oci-layout://%s: no directory", s)
	}
	return dir, want, nil
}

// ociLayout is a layout outside of the store.
type ociLayout struct {
	root  *os.Root
	store *layer.Store
	name  string
}

// choose finds the image by tag or digest, or the only one.
func (l *ociLayout) choose(want string) (ocispec.Descriptor, error) {
	data, err := l.root.ReadFile("index.json")
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: not an OCI layout: %w", l.name, err)
	}
	var idx ocispec.Index
	if err := json.Unmarshal(data, &idx); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s/index.json: %w", l.name, err)
	}
	var found []ocispec.Descriptor
	for _, d := range idx.Manifests {
		switch want {
		case d.Digest.String():
			return d, nil
		case "", d.Annotations[ocispec.AnnotationRefName], d.Annotations[image.AnnotationName]:
			found = append(found, d)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return ocispec.Descriptor{}, fmt.Errorf("%s holds %d images: name one with :TAG or @DIGEST", l.name, len(found))
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s holds no image %s", l.name, want)
}

// take puts a manifest or index with all that it names into the store; layers are promised.
func (l *ociLayout) take(ctx context.Context, d ocispec.Descriptor, depth int) error {
	if depth == 0 {
		return fmt.Errorf("%s: indexes are nested too deep", l.name)
	}
	data, err := l.put(ctx, d)
	if err != nil {
		return err
	}
	var doc struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return fmt.Errorf("%s: manifest %s: %w", l.name, d.Digest, err)
	}
	if doc.Config != nil {
		if _, err := l.put(ctx, *doc.Config); err != nil {
			return err
		}
		return l.promise(ctx, d)
	}
	for _, m := range doc.Manifests {
		if err := l.take(ctx, m, depth-1); err != nil && !errors.Is(err, fs.ErrNotExist) { // a layout may hold some platforms only
			return err
		}
	}
	return nil
}

// documentLimit bounds a manifest or config: it is held in memory.
const documentLimit = 8 << 20

// put copies a small blob into the store and returns it.
func (l *ociLayout) put(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	f, err := l.open(d.Digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, documentLimit+1))
	if err != nil {
		return nil, err
	}
	if len(data) > documentLimit || digest.FromBytes(data) != d.Digest {
		return nil, fmt.Errorf("%s: blob %s is damaged", l.name, d.Digest)
	}
	_, err = l.store.PutBlob(ctx, d.MediaType, data)
	return data, err
}

func (l *ociLayout) open(d digest.Digest) (*os.File, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("%s: digest %q: %w", l.name, string(d), err)
	}
	f, err := l.root.Open("blobs/" + d.Algorithm().String() + "/" + d.Encoded())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.name, err)
	}
	return f, nil
}

// promise tells the store where the layers of a manifest are.
func (l *ociLayout) promise(ctx context.Context, d ocispec.Descriptor) error {
	g, err := image.Walk(ctx, l.store, d)
	if err != nil {
		return err
	}
	for _, m := range g.Images {
		for i, diffID := range m.DiffIDs {
			if i >= len(m.Layers) {
				break
			}
			blob := m.Layers[i]
			blob.Annotations = layer.ManifestAnnotations(blob)
			l.store.Promise(layer.Layer{DiffID: diffID}, blob, func(context.Context) (io.ReadCloser, error) { return l.open(blob.Digest) })
		}
	}
	return nil
}
