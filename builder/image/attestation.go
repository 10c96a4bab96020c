package image

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/attest"
	"filo/layer"
)

// Said is a statement that is encoded, with the type of its predicate.
type Said struct {
	Predicate string
	Data      []byte
}

// WriteAttestation puts statements about a manifest into the store, and a manifest that holds them. The descriptor
// returned is for an index that has the target as well: readers of images skip it, as its platform is none. With
// artifact the manifest is an OCI artifact with a subject, without it is shaped like an image, as older tools have it.
func WriteAttestation(ctx context.Context, s *layer.Store, target ocispec.Descriptor, statements []Said, artifact bool) (ocispec.Descriptor, error) {
	fail := func(err error) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("write attestation: %w", err)
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Layers:    []ocispec.Descriptor{},
	}
	for _, st := range statements {
		d, err := s.PutBlob(ctx, attest.MediaType, st.Data)
		if err != nil {
			return fail(err)
		}
		d.Annotations = map[string]string{attest.AnnotationPredicate: st.Predicate}
		m.Layers = append(m.Layers, d)
	}
	mediaType, config, err := attestationConfig(m.Layers, artifact)
	if err != nil {
		return fail(err)
	}
	if m.Config, err = s.PutBlob(ctx, mediaType, config); err != nil {
		return fail(err)
	}
	if artifact {
		m.Config.Data = config
		m.ArtifactType = attest.ArtifactType
		m.Subject = &ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}
	}
	d, err := put(ctx, s, m.MediaType, m)
	if err != nil {
		return fail(err)
	}
	d.Platform = &ocispec.Platform{Architecture: "unknown", OS: "unknown"}
	d.Annotations = map[string]string{attest.AnnotationType: attest.TypeManifest, attest.AnnotationDigest: target.Digest.String()}
	return d, nil
}

// attestationConfig is the empty config of an artifact, or that of an image whose layers are the statements.
func attestationConfig(layers []ocispec.Descriptor, artifact bool) (mediaType string, data []byte, err error) {
	if artifact {
		return ocispec.MediaTypeEmptyJSON, []byte("{}"), nil
	}
	c := ocispec.Image{
		Platform: ocispec.Platform{Architecture: "unknown", OS: "unknown"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}},
	}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, l.Digest)
	}
	data, err = json.Marshal(c)
	return ocispec.MediaTypeImageConfig, data, err
}
