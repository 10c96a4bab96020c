package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer"
	"filo/layer/registry"
	"filo/layer/registry/reference"
)

// resolved is the record of what a reference stood for.
type resolved struct {
	Reference  string             `json:"reference"`
	Descriptor ocispec.Descriptor `json:"descriptor"`
}

// pinned returns the digest of a full reference, if it has one.
func pinned(full string) digest.Digest {
	n, err := reference.ParseFull(full)
	if err != nil {
		return ""
	}
	return n.Digest
}

func resolvedFile(s *layer.Store, full string) string {
	return filepath.Join(s.Dir(), "sources", "images", digest.FromString(full).Encoded())
}

// remember records what a reference resolved to.
func remember(ctx context.Context, s *layer.Store, full string, d ocispec.Descriptor) error {
	if was, err := last(s, full); err == nil && was.Digest == d.Digest {
		return nil
	}
	d = ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
	data, err := json.Marshal(resolved{full, d})
	if err != nil {
		return err
	}
	return replace(s, resolvedFile(s, full), data)
}

// last returns what a reference resolved to when its registry last answered; fs.ErrNotExist if never. A
// damaged record counts as none.
func last(s *layer.Store, full string) (ocispec.Descriptor, error) {
	data, err := os.ReadFile(resolvedFile(s, full))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var r resolved
	if json.Unmarshal(data, &r) != nil || r.Reference != full || r.Descriptor.Digest.Validate() != nil {
		return ocispec.Descriptor{}, fs.ErrNotExist
	}
	return r.Descriptor, nil
}

// maxOrigins is how many repositories are remembered for a blob: candidates for a mount, tried in turn.
const maxOrigins = 4

func originFile(s *layer.Store, d digest.Digest) string {
	return filepath.Join(s.Dir(), "sources", "blobs", d.Algorithm().String()+"-"+d.Encoded())
}

// Origins returns the repositories that are known to hold a blob, the latest first.
func Origins(s *layer.Store, d digest.Digest) []string {
	if d.Validate() != nil {
		return nil
	}
	data, err := layer.ReadFile(originFile(s, d))
	if err != nil {
		return nil
	}
	var repos []string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if repo, err := registry.Repository(line); err == nil && repo == line {
			repos = append(repos, line)
		}
	}
	return repos
}

// AddOrigin remembers that the repository of a reference holds a blob, since it was pulled from there or
// pushed to it.
func AddOrigin(ctx context.Context, s *layer.Store, d digest.Digest, ref string) error {
	return addOrigin(ctx, s, d, ref)
}

func addOrigin(_ context.Context, s *layer.Store, d digest.Digest, ref string) error {
	repo, err := registry.Repository(ref)
	if err != nil {
		return err
	}
	known, _ := layer.ReadFile(originFile(s, d))
	if slices.Contains(strings.Split(string(known), "\n"), repo) {
		return nil
	}
	repos := append([]string{repo}, Origins(s, d)...)
	repos = repos[:min(len(repos), maxOrigins)]
	return replace(s, originFile(s, d), []byte(strings.Join(repos, "\n")+"\n"))
}

// replace writes a file of the state directory by rename. Races are harmless: either content is true.
func replace(s *layer.Store, path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	dir, err := s.Temp("record")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "new")
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// Restore promises the layers of everything below a manifest or index again: promises end with the process
// that made them, names do not. c may be nil.
func Restore(ctx context.Context, s *layer.Store, c *registry.Client, d ocispec.Descriptor) error {
	if c == nil {
		return nil
	}
	g, err := Walk(ctx, s, d)
	if err != nil {
		return err
	}
	for _, m := range g.Images {
		for i, l := range m.Layers {
			origins := Origins(s, l.Digest)
			t, err := layerType(l.MediaType, false)
			if err != nil || len(origins) == 0 || i >= len(m.DiffIDs) {
				continue
			}
			plain := ocispec.Descriptor{MediaType: t, Digest: l.Digest, Size: l.Size, Annotations: layer.ManifestAnnotations(l)}
			s.Promise(layer.Layer{DiffID: m.DiffIDs[i]}, plain, func(ctx context.Context) (io.ReadCloser, error) {
				return fetch(ctx, c, origins, plain)
			})
		}
	}
	return nil
}

// fetch opens a blob from the first repository that still has it.
func fetch(ctx context.Context, c *registry.Client, origins []string, d ocispec.Descriptor) (io.ReadCloser, error) {
	var errs []error
	for _, repo := range origins {
		r, err := c.Blob(ctx, repo, d)
		if err == nil || ctx.Err() != nil {
			return r, err
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("fetch blob: %w", errors.Join(errs...))
}
