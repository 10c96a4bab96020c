package image

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer"
	"filo/layer/registry"
	"filo/layer/registry/reference"
)

// AnnotationName is the annotation by which an entry of an index.json carries a full image name.
const AnnotationName = "io.containerd.image.name"

// Named is an image of the local store. Name is empty for one that was stored without.
type Named struct {
	Name       string
	Descriptor ocispec.Descriptor
}

// Tag makes a name stand for a manifest or index of the store. What it stood for before keeps no name from
// it. An empty name only keeps the image.
func Tag(ctx context.Context, s *layer.Store, name string, d ocispec.Descriptor) error {
	if name == "" {
		if err := durable(ctx, s, d); err != nil {
			return err
		}
		return s.ChangeNames(ctx, func(idx *ocispec.Index) error {
			if !slices.ContainsFunc(idx.Manifests, func(o ocispec.Descriptor) bool { return o.Digest == d.Digest }) {
				idx.Manifests = append(idx.Manifests, d)
			}
			return nil
		})
	}
	full, tag, err := taggable(name)
	if err != nil {
		return err
	}
	d.Annotations = maps.Clone(d.Annotations)
	if d.Annotations == nil {
		d.Annotations = map[string]string{}
	}
	d.Annotations[AnnotationName] = full
	d.Annotations[ocispec.AnnotationRefName] = tag
	return enter(ctx, s, d)
}

// Pin adds the name REPOSITORY@DIGEST for a manifest or index of the store, which no later build moves.
func Pin(ctx context.Context, s *layer.Store, repository string, d ocispec.Descriptor) error {
	repo, err := registry.Repository(repository)
	if err != nil {
		return err
	}
	full := repo + "@" + d.Digest.String()
	d.Annotations = maps.Clone(d.Annotations)
	if d.Annotations == nil {
		d.Annotations = map[string]string{}
	}
	d.Annotations[AnnotationName] = full
	delete(d.Annotations, ocispec.AnnotationRefName)
	return enter(ctx, s, d)
}

// enter adds a named entry in place of the one that has the name, and of a nameless one for the same image.
func enter(ctx context.Context, s *layer.Store, d ocispec.Descriptor) error {
	if err := durable(ctx, s, d); err != nil {
		return err
	}
	return s.ChangeNames(ctx, func(idx *ocispec.Index) error {
		idx.Manifests = slices.DeleteFunc(idx.Manifests, func(o ocispec.Descriptor) bool { return nameOf(o) == "" && o.Digest == d.Digest })
		i := slices.IndexFunc(idx.Manifests, func(o ocispec.Descriptor) bool { return nameOf(o) == nameOf(d) })
		if i < 0 {
			idx.Manifests = append(idx.Manifests, d)
			return nil
		}
		idx.Manifests[i] = d // where it was: a build that changes nothing writes nothing
		return nil
	})
}

// durable sees that no power cut takes what an image needs, and no changed byte what nothing else can be made from.
func durable(ctx context.Context, s *layer.Store, d ocispec.Descriptor) error {
	g, err := Walk(ctx, s, d)
	if err != nil {
		return err
	}
	documents, layers := digests(g.Documents), []digest.Digest(nil)
	for _, m := range g.Images {
		documents = append(documents, m.Config.Digest)
		for _, l := range m.Layers {
			if m.Attestation && l.Size <= maxConfig {
				documents = append(documents, l.Digest) // a statement
			} else {
				layers = append(layers, l.Digest)
			}
		}
	}
	return s.Keep(ctx, documents, layers)
}

func digests(list []ocispec.Descriptor) []digest.Digest {
	out := make([]digest.Digest, len(list))
	for i, d := range list {
		out[i] = d.Digest
	}
	return out
}

// taggable returns the full form of a name that an image can be given, and its tag.
func taggable(name string) (full, tag string, err error) {
	full, err = registry.Normalize(name)
	if err != nil {
		return "", "", err
	}
	n, err := reference.ParseFull(full)
	if err != nil {
		return "", "", err
	}
	if n.Digest != "" {
		return "", "", fmt.Errorf("invalid name %q: a digest cannot be chosen", name)
	}
	return full, n.Tag, nil
}

// Lookup returns what a name of the local store stands for. A name with a digest needs that digest. If there
// is none the error is fs.ErrNotExist.
func Lookup(s *layer.Store, name string) (ocispec.Descriptor, error) {
	full, err := registry.Normalize(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	want := pinned(full)
	all, err := List(s)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	repo, _ := registry.Repository(full)
	for _, n := range all {
		if n.Name == "" {
			continue
		}
		if want == "" && n.Name == full {
			return n.Descriptor, nil
		}
		if have, _ := registry.Repository(n.Name); want != "" && have == repo && n.Descriptor.Digest == want {
			return n.Descriptor, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s: %w", full, fs.ErrNotExist)
}

// List returns the images of the local store, by name.
func List(s *layer.Store) ([]Named, error) {
	idx, err := s.Names(context.Background())
	if err != nil {
		return nil, err
	}
	all := make([]Named, 0, len(idx.Manifests))
	for _, d := range idx.Manifests {
		if d.Digest.Validate() == nil {
			all = append(all, Named{Name: nameOf(d), Descriptor: d})
		}
	}
	slices.SortStableFunc(all, func(a, b Named) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// Untag takes a name from the local store and returns what it stood for; fs.ErrNotExist if nothing. The
// blobs stay until they are pruned.
func Untag(ctx context.Context, s *layer.Store, name string) (ocispec.Descriptor, error) {
	full, err := registry.Normalize(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	gone, err := remove(ctx, s, func(d ocispec.Descriptor) bool { return nameOf(d) == full })
	if err == nil && len(gone) == 0 {
		err = fmt.Errorf("%s: %w", full, fs.ErrNotExist)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return gone[0].Descriptor, nil
}

// Remove takes all names from the image with a digest and returns them; fs.ErrNotExist if there is no such
// image.
func Remove(ctx context.Context, s *layer.Store, d digest.Digest) ([]Named, error) {
	gone, err := remove(ctx, s, func(o ocispec.Descriptor) bool { return o.Digest == d })
	if err == nil && len(gone) == 0 {
		err = fmt.Errorf("%s: %w", d, fs.ErrNotExist)
	}
	return gone, err
}

func remove(ctx context.Context, s *layer.Store, which func(ocispec.Descriptor) bool) ([]Named, error) {
	var gone []Named
	err := s.ChangeNames(ctx, func(idx *ocispec.Index) error {
		idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
			if !which(d) {
				return false
			}
			gone = append(gone, Named{Name: nameOf(d), Descriptor: d})
			return true
		})
		return nil
	})
	return gone, err
}

// nameOf is the name that an entry of index.json carries.
func nameOf(d ocispec.Descriptor) string {
	return d.Annotations[AnnotationName]
}
