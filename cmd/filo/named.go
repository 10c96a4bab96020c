package main

import (
	"context"
	"fmt"
	"strings"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder"
	"filo/builder/image"
	"filo/builder/source"
)

// readNamed opens what --build-context names.
func (j *job) readNamed(ctx context.Context, o source.Options) error {
	j.req.Named = map[string]builder.Named{}
	o.Stdin = nil // one source may read it, and that is the main context
	for _, spec := range j.flags.what.contexts {
		name, value, _ := strings.Cut(spec, "=")
		n, err := j.openNamed(ctx, name, value, o)
		if err != nil {
			return fmt.Errorf("--build-context %s: %w", name, err)
		}
		j.req.Named[name] = n
	}
	return nil
}

func (j *job) openNamed(ctx context.Context, name, value string, o source.Options) (builder.Named, error) {
	scheme, rest, ok := strings.Cut(value, "://")
	switch {
	case ok && scheme == "docker-image":
		return j.imageContext(value, rest), nil
	case ok && scheme == "oci-layout":
		return j.layoutContext(value, rest)
	case strings.HasPrefix(value, "target:"):
		return j.targetContext(name, value)
	}
	src, err := source.Open(ctx, value, o)
	if err != nil {
		return builder.Named{}, err
	}
	j.closers = append(j.closers, src.Close)
	if src.Dockerfile != nil {
		return builder.Named{}, fmt.Errorf("%s is neither a directory nor an archive", value)
	}
	fsys := src.FS
	if src.Local {
		patterns, _, err := readIgnore(fsys, "")
		if err != nil {
			return builder.Named{}, err
		}
		if fsys, err = source.Ignore(fsys, patterns); err != nil {
			return builder.Named{}, err
		}
	}
	j.origin.opened(name, value, src)
	return builder.Named{FS: fsys, Root: src.Root, Modified: src.Modified, Text: value}, nil
}

// imageContext is an image of the store or a registry.
func (j *job) imageContext(text, ref string) builder.Named {
	mode := image.PullCurrent
	if j.req.Pull {
		mode = image.PullAlways
	}
	return builder.Named{Text: text, Image: func(ctx context.Context, p ocispec.Platform) (*image.Image, error) {
		if ref == "scratch" {
			return &image.Image{Config: dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: p}}}, nil
		}
		return image.Pull(ctx, j.store, j.registry, ref, p, mode)
	}}
}
