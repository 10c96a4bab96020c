package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer"
	"filo/layer/registry"
)

// errNoPlatform is the answer of an index that has nothing for the platform asked for.
var errNoPlatform = errors.New("no match for platform in manifest")

// maxConfig bounds a foreign config: it is read into memory.
const maxConfig = 8 << 20

// reader finds the documents of one reference: in the store if they are there, else in the registry, and
// keeps what it fetched.
type reader struct {
	store  *layer.Store
	client *registry.Client // nil: only the store
	ref    string
}

// document is a manifest or an index, whichever it is.
type document struct {
	MediaType    string                `json:"mediaType"`
	SchemaVer    int                   `json:"schemaVersion"`
	ArtifactType string                `json:"artifactType"`
	Config       *ocispec.Descriptor   `json:"config"`
	Layers       []ocispec.Descriptor  `json:"layers"`
	Manifests    *[]ocispec.Descriptor `json:"manifests"`
	Annotations  map[string]string     `json:"annotations"`
	FSLayers     []json.RawMessage     `json:"fsLayers"` // of schema 1

	descriptor ocispec.Descriptor
}

// document reads and checks the manifest or index of a digest.
func (r *reader) document(ctx context.Context, d ocispec.Descriptor) (*document, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%s: digest %q: %w", r.ref, string(d.Digest), err)
	}
	data, err := r.store.ReadBlob(ctx, d.Digest)
	if errors.Is(err, fs.ErrNotExist) && r.client != nil {
		d, data, err = r.client.Manifest(ctx, r.ref, d.Digest)
		if err == nil {
			err = r.keep(ctx, d.MediaType, d.Digest, data)
		}
	}
	if err != nil {
		return nil, err
	}
	doc := document{descriptor: d}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("%s: manifest %s: %w", r.ref, d.Digest, err)
	}
	doc.descriptor.Size = int64(len(data))
	return &doc, doc.check(r.ref)
}

// keep stores a fetched document under the digest it was verified with.
func (r *reader) keep(ctx context.Context, mediaType string, want digest.Digest, data []byte) error {
	d, err := r.store.PutBlob(ctx, mediaType, data)
	if err == nil && d.Digest != want {
		err = fmt.Errorf("%s: digest %s: only sha256 is supported", r.ref, want)
	}
	return err
}

// check refuses what is neither an image nor an index and settles which of both it is.
func (d *document) check(ref string) error {
	if d.SchemaVer == 1 || d.FSLayers != nil || strings.HasPrefix(d.descriptor.MediaType, "application/vnd.docker.distribution.manifest.v1+") {
		return fmt.Errorf("%s: the image has a schema 1 manifest, a format retired in 2017; push it again with a current tool", ref)
	}
	if d.SchemaVer != 2 {
		return fmt.Errorf("%s: manifest %s: unknown schema version %d", ref, d.descriptor.Digest, d.SchemaVer)
	}
	// One document read as a manifest by one tool and as an index by another is an attack (CVE-2021-41190).
	if (d.Config != nil) == (d.Manifests != nil) || d.Manifests != nil && d.Layers != nil {
		return fmt.Errorf("%s: manifest %s: neither an image nor an index", ref, d.descriptor.Digest)
	}
	if d.MediaType == "" {
		d.MediaType = d.descriptor.MediaType
	}
	if d.MediaType == "" || !strings.Contains(d.MediaType, "manifest") && !strings.Contains(d.MediaType, "index") {
		d.MediaType = ocispec.MediaTypeImageManifest
		if d.index() {
			d.MediaType = ocispec.MediaTypeImageIndex
		}
	}
	switch {
	case d.index() && d.MediaType != ocispec.MediaTypeImageIndex && d.MediaType != dockerIndex,
		!d.index() && d.MediaType != ocispec.MediaTypeImageManifest && d.MediaType != dockerManifest:
		return fmt.Errorf("%s: manifest %s: unsupported media type %q", ref, d.descriptor.Digest, d.MediaType)
	}
	d.descriptor.MediaType = d.MediaType
	return nil
}

func (d *document) index() bool { return d.Manifests != nil }

// choose returns the manifest for a platform that a document is or holds, and whether it is for another
// platform: a single image is taken for what it is.
func (r *reader) choose(ctx context.Context, doc *document, p ocispec.Platform) (*document, bool, error) {
	if doc.index() {
		m, err := r.pick(ctx, doc, p, 3)
		return m, false, err
	}
	config, err := r.config(ctx, doc)
	if err != nil {
		return nil, false, err
	}
	return doc, !platforms.Only(p).Match(platforms.Normalize(Platform(config))), nil
}

// pick finds the best match in an index. depth bounds indexes within indexes.
func (r *reader) pick(ctx context.Context, doc *document, p ocispec.Platform, depth int) (*document, error) {
	match := platforms.Only(p)
	var fit, untold, nested []ocispec.Descriptor
	var has []string
	for _, d := range *doc.Manifests {
		switch {
		case attestation(d):
		case d.MediaType == ocispec.MediaTypeImageIndex || d.MediaType == dockerIndex:
			nested = append(nested, d)
		case d.Platform == nil:
			untold = append(untold, d)
		case match.Match(*d.Platform):
			fit = append(fit, d)
		default:
			has = append(has, platforms.Format(*d.Platform))
		}
	}
	slices.SortStableFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case match.Less(*a.Platform, *b.Platform):
			return -1
		case match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	if len(fit) > 0 {
		return r.manifest(ctx, fit[0])
	}
	for _, d := range untold {
		m, err := r.manifest(ctx, d)
		if err != nil {
			return nil, err
		}
		if config, err := r.config(ctx, m); err == nil && match.Match(platforms.Normalize(Platform(config))) {
			return m, nil
		}
	}
	for _, d := range nested {
		if depth == 0 {
			break
		}
		inner, err := r.document(ctx, d)
		if err != nil {
			return nil, err
		}
		if !inner.index() {
			continue
		}
		if m, err := r.pick(ctx, inner, p, depth-1); !errors.Is(err, errNoPlatform) {
			return m, err
		}
	}
	return nil, fmt.Errorf("%s: %w: want %s, there is %s", r.ref, errNoPlatform, platforms.Format(p), listed(has))
}

func listed(has []string) string {
	if len(has) == 0 {
		return "none"
	}
	return strings.Join(has, ", ")
}

// attestation reports whether an index entry is not an image but speaks about one.
func attestation(d ocispec.Descriptor) bool {
	if d.Annotations["vnd.docker.reference.type"] != "" {
		return true
	}
	return d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown"
}

func (r *reader) manifest(ctx context.Context, d ocispec.Descriptor) (*document, error) {
	m, err := r.document(ctx, d)
	if err != nil {
		return nil, err
	}
	if m.index() {
		return nil, fmt.Errorf("%s: manifest %s: an index stands where an image should", r.ref, d.Digest)
	}
	return m, nil
}

// config reads the config of a manifest.
func (r *reader) config(ctx context.Context, m *document) (dockerspec.DockerOCIImage, error) {
	var c dockerspec.DockerOCIImage
	switch m.Config.MediaType {
	case ocispec.MediaTypeImageConfig, dockerConfig, "application/octet-stream":
	default:
		return c, fmt.Errorf("%s: not an image: its config is %q", r.ref, m.Config.MediaType)
	}
	data, err := r.blob(ctx, *m.Config)
	if err != nil {
		return c, fmt.Errorf("%s: config %s: %w", r.ref, m.Config.Digest, err)
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("%s: config %s: %w", r.ref, m.Config.Digest, err)
	}
	return c, nil
}

// blob reads a small blob, verified.
func (r *reader) blob(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, err
	}
	data, err := r.store.ReadBlob(ctx, d.Digest)
	if !errors.Is(err, fs.ErrNotExist) || r.client == nil {
		return data, err
	}
	if d.Size > maxConfig {
		return nil, fmt.Errorf("%d bytes are too many", d.Size)
	}
	body, err := r.client.Blob(ctx, r.ref, d)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if data, err = io.ReadAll(io.LimitReader(body, maxConfig+1)); err != nil {
		return nil, err
	}
	if got := d.Digest.Algorithm().FromBytes(data); got != d.Digest {
		return nil, fmt.Errorf("got digest %s", got)
	}
	return data, r.keep(ctx, d.MediaType, d.Digest, data)
}
