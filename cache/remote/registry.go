package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"time"

	"github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer"
	"filo/layer/registry"
)

// registryPlace keeps a cache under a reference of a registry.
type registryPlace struct {
	client   *registry.Client
	ref      string
	platform ocispec.Platform
	fresh    bool // read from the registry itself, not a mirror
	wrapping

	mu      sync.Mutex
	written digest.Digest // the manifest that was pushed last
	refused string        // the version that a write found replaced
}

// newRegistryPlace returns the place of s. One that is written to must be read fresh: see [place.write].
func newRegistryPlace(o Options, s Spec, fresh bool) (*registryPlace, error) {
	ref, err := registry.Normalize(s.attrs["ref"])
	if err != nil {
		return nil, err
	}
	client := o.Registry
	if s.insecure {
		if client, err = client.Trusting(ref); err != nil {
			return nil, err
		}
	}
	return &registryPlace{
		client: client, ref: ref, platform: o.Platform, fresh: fresh,
		wrapping: wrapping{s.imageManifest, s.ociTypes},
	}, nil
}

// read implements place. A reference to an image gives what type=inline put into it.
func (p *registryPlace) read(ctx context.Context) (*index, string, error) {
	get := p.client.Latest
	if !p.fresh {
		get = func(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
			return p.client.Manifest(ctx, ref, "")
		}
	}
	d, data, err := get(ctx, p.ref)
	if registry.Is(err, registry.NotFound) {
		x := newIndex()
		x.missing = true
		return x, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	m, err := parseDocument(data)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", p.ref, err)
	}
	config, layers := m.cacheConfig()
	if config.Digest == "" {
		x, err := p.readImage(ctx, m)
		return x, d.Digest.String(), err
	}
	p.know(append(layers, config))
	text, err := p.small(ctx, config)
	if err != nil {
		return nil, "", err
	}
	x, err := parseIndex(text)
	return x, d.Digest.String(), err
}

// know tells the client that the repository holds what its manifest lists.
func (p *registryPlace) know(blobs []ocispec.Descriptor) {
	for _, d := range blobs {
		p.client.Know(p.ref, d.Digest)
	}
}

// small fetches a blob that is held in memory, and verifies it.
func (p *registryPlace) small(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if d.Size > maxIndex {
		return nil, fmt.Errorf("%s: %d bytes are too many for an index", p.ref, d.Size)
	}
	r, err := p.open(ctx, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxIndex))
	if err != nil {
		return nil, err
	}
	if got := d.Digest.Algorithm().FromBytes(data); got != d.Digest {
		return nil, fmt.Errorf("%s: blob has digest %s, not %s", p.ref, got, d.Digest)
	}
	return data, nil
}

func (p *registryPlace) open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	return p.client.Blob(ctx, p.ref, d)
}

func (p *registryPlace) put(ctx context.Context, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) error {
	return p.client.PushBlob(ctx, p.ref, d, nil, open)
}

func (p *registryPlace) doubt(d digest.Digest) { p.client.Doubt(p.ref, d) }

// write implements place. Registries have no conditional writes: it looks first, since the index may have been read
// when a long build began, and whether what it wrote lasts is asked with kept.
func (p *registryPlace) write(ctx context.Context, x *index, version string) error {
	config, manifest, err := p.wrap(x)
	if err != nil {
		return err
	}
	err = p.put(ctx, config.Descriptor, func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(config.data)), nil
	})
	if err != nil {
		return err
	}
	if stale, err := p.stale(ctx, version); err != nil || stale {
		return errors.Join(err, errStale)
	}
	if err := p.client.PushManifest(ctx, p.ref, manifest.Descriptor, manifest.data); err != nil {
		return err
	}
	p.mu.Lock()
	p.written = manifest.Digest
	p.mu.Unlock()
	return nil
}

// stale reports whether the reference names something else than the version that was read. A registry that says so
// of what it has just sent has two names for it, and is not asked about it again.
func (p *registryPlace) stale(ctx context.Context, version string) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refused == version && version != "" {
		return false, nil
	}
	d, err := p.client.Current(ctx, p.ref)
	if registry.Is(err, registry.NotFound) {
		return version != "", nil
	}
	if err != nil || d.Digest == "" || d.Digest.String() == version {
		return false, err
	}
	p.refused = version
	return true, nil
}

func (p *registryPlace) kept(ctx context.Context) (bool, error) {
	if err := pause(ctx, 1); err != nil {
		return false, err
	}
	d, err := p.client.Current(ctx, p.ref)
	p.mu.Lock()
	defer p.mu.Unlock()
	return d.Digest == p.written, err
}

// wrapping is in which form an index is a manifest: an image manifest or an index, with OCI's or Docker's types.
type wrapping struct{ imageManifest, oci bool }

// document is a small blob.
type document struct {
	ocispec.Descriptor
	data []byte
}

func newDocument(mediaType string, data []byte) document {
	return document{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, data}
}

// wrap returns the index as a config and the manifest that holds it and the layers.
func (w wrapping) wrap(x *index) (config, manifest document, err error) {
	data, err := x.marshal()
	if err != nil {
		return config, manifest, err
	}
	config = newDocument(cacheimporttypes.CacheConfigMediaTypeV0, data)
	layers := []ocispec.Descriptor{}
	for _, e := range x.blobs() {
		d := e.blob
		if !w.oci {
			d.MediaType = dockerType(d.MediaType)
		}
		d.Annotations = map[string]string{annotationDiffID: e.diffID.String()}
		maps.Copy(d.Annotations, layer.BlobAnnotations(e.blob))
		d.Annotations[annotationCreated] = utc(e.created).Format(time.RFC3339)
		layers = append(layers, d)
	}
	version := specs.Versioned{SchemaVersion: 2}
	if w.imageManifest {
		m := ocispec.Manifest{Versioned: version, MediaType: ocispec.MediaTypeImageManifest, Config: config.Descriptor, Layers: layers}
		data, err = json.Marshal(m)
		return config, newDocument(m.MediaType, data), err
	}
	m := ocispec.Index{Versioned: version, MediaType: ocispec.MediaTypeImageIndex, Manifests: append(layers, config.Descriptor)}
	if !w.oci {
		m.MediaType = "application/vnd.docker.distribution.manifest.list.v2+json"
	}
	data, err = json.Marshal(m)
	return config, newDocument(m.MediaType, data), err
}

// manifest is an image manifest or an index, whichever.
type manifest struct {
	Config    ocispec.Descriptor   `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

func parseDocument(data []byte) (*manifest, error) {
	var m manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	for _, list := range [][]ocispec.Descriptor{{m.Config}, m.Layers, m.Manifests} {
		for _, d := range list {
			if d.Digest != "" && d.Digest.Validate() != nil {
				return nil, errors.New("read manifest: it has a malformed digest")
			}
		}
	}
	return &m, nil
}

// cacheConfig returns the config of a cache and its layers; an empty one if m is something else.
func (m *manifest) cacheConfig() (config ocispec.Descriptor, layers []ocispec.Descriptor) {
	if m.Config.MediaType == cacheimporttypes.CacheConfigMediaTypeV0 {
		return m.Config, m.Layers
	}
	for _, d := range m.Manifests {
		if d.MediaType == cacheimporttypes.CacheConfigMediaTypeV0 {
			config = d
			continue
		}
		layers = append(layers, d)
	}
	if config.Digest == "" {
		layers = nil
	}
	return config, layers
}
