package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer"
)

// Graph is all that a manifest or an index refers to.
type Graph struct {
	Documents []ocispec.Descriptor // manifests and indexes, each after all that it refers to; the root is last
	Blobs     []ocispec.Descriptor // configs and layers, each once
	Images    []Member             // the manifests among the documents
}

// Root is what was walked from.
func (g *Graph) Root() ocispec.Descriptor { return g.Documents[len(g.Documents)-1] }

// Member is one manifest of a [Graph].
type Member struct {
	Descriptor  ocispec.Descriptor // as its index has it, with platform and annotations
	Config      ocispec.Descriptor
	Layers      []ocispec.Descriptor
	DiffIDs     []digest.Digest // of the layers; empty if the manifest is no image
	Attestation bool            // it speaks about another image
}

// Walk lists what belongs to a manifest or an index whose documents and configs are in the store. If one of an image
// that has a name is not, the error is ErrDamaged.
func Walk(ctx context.Context, s *layer.Store, root ocispec.Descriptor) (*Graph, error) {
	w := &walk{r: &reader{store: s, ref: root.Digest.String()}, g: &Graph{}, seen: map[digest.Digest]bool{}}
	if err := w.visit(ctx, root, 4); err != nil {
		return nil, Damaged(root, err)
	}
	return w.g, nil
}

// ErrDamaged is what is wrong with an image of the local store of which something is gone, and can be had from nowhere.
var ErrDamaged = errors.New("the image was damaged and is lost")

// Damaged is err, which says that something of an image is not to be had, as one about the image if that has a name.
func Damaged(root ocispec.Descriptor, err error) error {
	name := nameOf(root)
	if name == "" || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("%s: %w: %v", name, ErrDamaged, err) // not that there is no such image
}

type walk struct {
	r    *reader
	g    *Graph
	seen map[digest.Digest]bool
}

func (w *walk) visit(ctx context.Context, d ocispec.Descriptor, depth int) error {
	if w.seen[d.Digest] {
		return nil
	}
	w.seen[d.Digest] = true
	if depth == 0 {
		return fmt.Errorf("%s: indexes are nested too deep", w.r.ref)
	}
	doc, err := w.r.document(ctx, d)
	if err != nil {
		return err
	}
	d.MediaType, d.Size = doc.descriptor.MediaType, doc.descriptor.Size
	if doc.index() {
		for _, m := range *doc.Manifests {
			if err := w.visit(ctx, m, depth-1); err != nil {
				return err
			}
		}
	} else if err := w.member(ctx, d, doc); err != nil {
		return err
	}
	w.g.Documents = append(w.g.Documents, d)
	return nil
}

func (w *walk) member(ctx context.Context, d ocispec.Descriptor, doc *document) error {
	m := Member{Descriptor: d, Config: *doc.Config, Layers: doc.Layers, Attestation: attestation(d)}
	data, err := w.r.blob(ctx, m.Config)
	if err != nil {
		return fmt.Errorf("%s: config %s: %w", w.r.ref, m.Config.Digest, err)
	}
	var c ocispec.Image
	if json.Unmarshal(data, &c) == nil && len(c.RootFS.DiffIDs) == len(m.Layers) && !m.Attestation {
		m.DiffIDs = c.RootFS.DiffIDs
	}
	for _, b := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if !w.seen[b.Digest] {
			w.seen[b.Digest] = true
			w.g.Blobs = append(w.g.Blobs, b)
		}
	}
	w.g.Images = append(w.g.Images, m)
	return nil
}
