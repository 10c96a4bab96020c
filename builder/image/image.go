// Package image reads base images and writes built ones: configs, manifests and indexes.
//
// A base is read no further than its config; its layers are promised to the store, which fetches the ones
// that somebody needs. A built image is a config and layers; writing it makes the blobs that are missing and
// puts manifest and config into the store. Names of local images are kept in the index.json of the store,
// which any OCI tool can read. It never runs or unpacks anything and sends nothing anywhere.
//
// Beside the layout it keeps, below sources/ of the store:
//
//	sources/images/<sha256 of the reference>  JSON: what a reference last resolved to
//	sources/blobs/<digest>                    the repositories that hold a blob, one a line
//
// Start at [Write]. image.go writes, pull.go reads a base from a registry or the store, choose.go finds the
// manifest of a platform, names.go keeps the names, origin.go remembers where things came from, graph.go
// walks all that a manifest or an index refers to.
package image

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"runtime"
	"slices"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"filo/layer"
)

// Image is a config and the layers that belong to it.
type Image struct {
	Config      dockerspec.DockerOCIImage
	Layers      []layer.Layer
	Name        string            // of a base: its full reference; empty for a built image
	Digest      digest.Digest     // of a base: its manifest, or the index it was chosen from, as the reference resolved
	Annotations map[string]string // of the manifest
	Cache       []byte            // of a built image: cache records to hold in the config (type=inline); nil for none

	WrongPlatform bool  // of a base: a single image of another platform than asked for
	Stale         error // of a base: why the registry could not be asked, so that what was found last is used
}

// WriteOptions says how an image is written.
type WriteOptions struct {
	Compression layer.Compression
	Force       bool              // also layers that have a blob of another compression
	DockerTypes bool              // Docker's media types instead of OCI's
	Annotations map[string]string // of the manifest, over those of the image
}

// Docker's media types.
const (
	dockerManifest  = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig    = dockerspec.DockerOCIImageMediaType
	dockerLayer     = "application/vnd.docker.image.rootfs.diff.tar"
	dockerLayerGzip = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	dockerLayerZstd = "application/vnd.docker.image.rootfs.diff.tar.zstd"
)

// Write makes the blobs of an image that are missing, several at a time, and puts its config and manifest
// into the store. The descriptor returned carries the platform. The same image always gives the same bytes.
func Write(ctx context.Context, s *layer.Store, img *Image, o WriteOptions) (ocispec.Descriptor, error) {
	if img.Config.OS == "" || img.Config.Architecture == "" {
		return ocispec.Descriptor{}, fmt.Errorf("write image: config has no platform")
	}
	layers, diffIDs, err := blobs(ctx, s, img.Layers, o)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err := json.Marshal(struct {
		dockerspec.DockerOCIImage
		Cache []byte `json:"moby.buildkit.cache.v0,omitempty"`
	}{complete(img, diffIDs), img.Cache})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write image: %w", err)
	}
	m := ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Layers:      layers,
		Annotations: merged(img.Annotations, o.Annotations),
	}
	configType := ocispec.MediaTypeImageConfig
	if o.DockerTypes {
		m.MediaType, configType = dockerManifest, dockerConfig
	}
	if m.Config, err = s.PutBlob(ctx, configType, config); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write image config: %w", err)
	}
	d, err := put(ctx, s, m.MediaType, m)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write image manifest: %w", err)
	}
	p := Platform(img.Config)
	d.Platform = &p
	return d, nil
}

// WriteIndex puts an index of the given manifests into the store, in their order; their platforms and
// annotations stand in it. Equal entries are written once. It is a Docker manifest list if the manifests are
// Docker's.
func WriteIndex(ctx context.Context, s *layer.Store, manifests []ocispec.Descriptor, annotations map[string]string) (ocispec.Descriptor, error) {
	idx := ocispec.Index{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageIndex,
		Manifests:   []ocispec.Descriptor{},
		Annotations: annotations,
	}
	for _, d := range manifests {
		if d.MediaType == dockerManifest {
			idx.MediaType = dockerIndex
		}
		if !slices.ContainsFunc(idx.Manifests, func(o ocispec.Descriptor) bool { return same(o, d) }) {
			idx.Manifests = append(idx.Manifests, d)
		}
	}
	d, err := put(ctx, s, idx.MediaType, idx)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write image index: %w", err)
	}
	return d, nil
}

// Platform is the platform that a config states.
func Platform(c dockerspec.DockerOCIImage) ocispec.Platform {
	return ocispec.Platform{
		Architecture: c.Architecture,
		OS:           c.OS,
		OSVersion:    c.OSVersion,
		OSFeatures:   slices.Clone(c.OSFeatures),
		Variant:      c.Variant,
	}
}

func same(a, b ocispec.Descriptor) bool {
	pa, pb := ocispec.Platform{}, ocispec.Platform{}
	if a.Platform != nil {
		pa = *a.Platform
	}
	if b.Platform != nil {
		pb = *b.Platform
	}
	return a.Digest == b.Digest && pa.OS == pb.OS && pa.Architecture == pb.Architecture &&
		pa.Variant == pb.Variant && pa.OSVersion == pb.OSVersion && slices.Equal(pa.OSFeatures, pb.OSFeatures)
}

// blobs returns the descriptors of layers, making what is missing, and the diff IDs that belong to the blobs.
func blobs(ctx context.Context, s *layer.Store, layers []layer.Layer, o WriteOptions) ([]ocispec.Descriptor, []digest.Digest, error) {
	out := make([]ocispec.Descriptor, len(layers))
	diffIDs := make([]digest.Digest, len(layers))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, l := range layers {
		g.Go(func() error {
			d, err := s.Blob(ctx, l, o.Compression, o.Force)
			if err != nil {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
			}
			t, err := layerType(d.MediaType, o.DockerTypes)
			if err != nil {
				return err
			}
			diffIDs[i] = l.DiffID
			if own := d.Annotations[layer.AnnotationDiffID]; own != "" {
				diffIDs[i] = digest.Digest(own)
			}
			out[i] = ocispec.Descriptor{MediaType: t, Digest: d.Digest, Size: d.Size}
			if !o.DockerTypes {
				out[i].Annotations = layer.ManifestAnnotations(d)
			}
			return nil
		})
	}
	err := g.Wait()
	return out, diffIDs, err
}

// layerType returns the OCI or Docker twin of a layer's media type. Non-distributable types become ordinary
// ones: the layer is in the image like any other.
func layerType(t string, docker bool) (string, error) {
	var twins [2]string
	switch t {
	case ocispec.MediaTypeImageLayer, dockerLayer,
		"application/vnd.oci.image.layer.nondistributable.v1.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar":
		twins = [2]string{ocispec.MediaTypeImageLayer, dockerLayer}
	case ocispec.MediaTypeImageLayerGzip, dockerLayerGzip,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		twins = [2]string{ocispec.MediaTypeImageLayerGzip, dockerLayerGzip}
	case ocispec.MediaTypeImageLayerZstd, dockerLayerZstd, "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd":
		twins = [2]string{ocispec.MediaTypeImageLayerZstd, dockerLayerZstd}
	default:
		return "", fmt.Errorf("unsupported layer media type %q", t)
	}
	if docker {
		return twins[1], nil
	}
	return twins[0], nil
}

// complete returns the config with rootfs and history made to fit the layers. Nothing in it is null: strict
// readers refuse an image without layers otherwise.
func complete(img *Image, diffIDs []digest.Digest) dockerspec.DockerOCIImage {
	c := img.Config
	c.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}
	c.History = fit(c.History, len(img.Layers))
	return c
}

// fit makes the number of history entries with a layer equal to the number of layers, which tools rely on
// and bases in the wild get wrong: surplus entries, the oldest first, are marked empty, missing ones added
// before the first, where the nameless layers of a base lie.
func fit(history []ocispec.History, layers int) []ocispec.History {
	full := 0
	for _, h := range history {
		if !h.EmptyLayer {
			full++
		}
	}
	if full == layers {
		return history
	}
	history = slices.Clone(history)
	for i := range history {
		if full > layers && !history[i].EmptyLayer {
			history[i].EmptyLayer = true
			full--
		}
	}
	if full < layers {
		history = append(make([]ocispec.History, layers-full), history...)
	}
	return history
}

func merged(a, b map[string]string) map[string]string {
	if len(a) == 0 && len(b) == 0 {
		return nil
	}
	m := maps.Clone(a)
	if m == nil {
		m = map[string]string{}
	}
	maps.Copy(m, b)
	return m
}

// put stores a manifest or an index.
func put(ctx context.Context, s *layer.Store, mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return s.PutBlob(ctx, mediaType, data)
}
