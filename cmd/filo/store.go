package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/image"
)

// picture is an image of the store as the commands show it: one platform of it.
type picture struct {
	Name     string
	Root     ocispec.Descriptor // what the name stands for
	Member   image.Member
	Manifest json.RawMessage
	Config   dockerspec.DockerOCIImage
	config   json.RawMessage
}

// find returns what a name, or the beginning of a digest, stands for in the store.
func (s *state) find(name string) (image.Named, error) {
	d, err := image.Lookup(s.store, name)
	if err == nil {
		return image.Named{Name: name, Descriptor: d}, nil
	}
	if n, ok, idErr := s.findID(name); ok || idErr != nil {
		return n, idErr
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("no image %s in the local store (`filo images` lists them)%w", name, silently{fs.ErrNotExist})
	}
	return image.Named{}, err
}

// minID is the length from which the beginning of a digest names an image.
const minID = 4

// findID finds an image by the beginning of its manifest's or config's digest.
func (s *state) findID(id string) (image.Named, bool, error) {
	hex := strings.TrimPrefix(id, "sha256:")
	if len(hex) < minID || strings.Trim(hex, "0123456789abcdef") != "" {
		return image.Named{}, false, nil
	}
	all, err := image.List(s.store)
	if err != nil {
		return image.Named{}, false, err
	}
	var found image.Named
	for _, n := range all {
		match := strings.HasPrefix(n.Descriptor.Digest.Encoded(), hex)
		if g, err := image.Walk(context.Background(), s.store, n.Descriptor); err == nil {
			for _, m := range g.Images {
				match = match || strings.HasPrefix(m.Config.Digest.Encoded(), hex)
			}
		}
		if match && found.Descriptor.Digest != "" && found.Descriptor.Digest != n.Descriptor.Digest {
			return image.Named{}, false, fmt.Errorf("%s: several images begin so", id)
		}
		if match {
			found = n
		}
	}
	return found, found.Descriptor.Digest != "", nil
}

// picture reads an image of the store, for a platform: the one that fits best, or the only one.
func (s *state) picture(ctx context.Context, name, platform string) (picture, error) {
	n, err := s.find(name)
	if err != nil {
		return picture{}, err
	}
	g, err := image.Walk(ctx, s.store, n.Descriptor)
	if err != nil {
		return picture{}, err
	}
	p := platforms.DefaultSpec()
	if platform != "" {
		if p, err = platforms.Parse(platform); err != nil {
			return picture{}, err
		}
	}
	m, err := member(g, p, platform != "")
	if err != nil {
		return picture{}, fmt.Errorf("%s: %w", name, err)
	}
	return s.read(ctx, picture{Name: n.Name, Root: n.Descriptor, Member: m})
}

// member picks the image for a platform. Without strict the first one does as well.
func member(g *image.Graph, p ocispec.Platform, strict bool) (image.Member, error) {
	match := platforms.Only(platforms.Normalize(p))
	var images []image.Member
	for _, m := range g.Images {
		if m.Attestation {
			continue
		}
		if m.Descriptor.Platform != nil && match.Match(*m.Descriptor.Platform) {
			return m, nil
		}
		images = append(images, m)
	}
	if len(images) == 0 || strict && (len(images) > 1 || images[0].Descriptor.Platform != nil) {
		return image.Member{}, fmt.Errorf("nothing for platform %s", platforms.Format(p))
	}
	return images[0], nil
}

// read reads manifest and config of p's member.
func (s *state) read(ctx context.Context, p picture) (picture, error) {
	manifest, err := s.store.ReadBlob(ctx, p.Member.Descriptor.Digest)
	if err != nil {
		return p, err
	}
	config, err := s.store.ReadBlob(ctx, p.Member.Config.Digest)
	if err != nil {
		return p, err
	}
	p.Manifest, p.config = manifest, config
	return p, json.Unmarshal(config, &p.Config)
}

// size is the size of the layers, compressed as they are stored.
func (p picture) size() int64 {
	var n int64
	for _, l := range p.Member.Layers {
		n += l.Size
	}
	return n
}

// ago says how long a time is past.
func (a *app) ago(t *time.Time) string {
	if t == nil || t.Unix() <= 0 {
		return "-"
	}
	return units.HumanDuration(a.now().Sub(*t)) + " ago"
}

// short is a digest as people say it.
func short(d digest.Digest) string {
	if h := d.Encoded(); len(h) > 12 {
		return h[:12]
	}
	return d.String()
}

// printJSON prints v for programs.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// format is the value of --format.
func format(s string) (asJSON bool, err error) {
	switch s {
	case "table", "":
		return false, nil
	case "json":
		return true, nil
	}
	return false, fmt.Errorf("--format %q: must be table or json", s)
}
