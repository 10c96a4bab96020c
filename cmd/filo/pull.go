package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"filo/builder/image"
)

// pull is `filo pull`.
func (a *app) pull() *cobra.Command {
	var platform string
	cmd := &cobra.Command{
		Use:     "pull [flags] NAME",
		Short:   "Fetch an image from a registry into the local store",
		Example: "  filo pull alpine:3\n  filo pull --platform linux/arm64 alpine",
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := platforms.DefaultSpec()
			if platform != "" {
				var err error
				if p, err = platforms.Parse(platform); err != nil {
					return &usageError{cmd.CommandPath(), fmt.Errorf("--platform: %w", err)}
				}
			}
			return a.with(func(s *state) error {
				return canceled(cmd.Context(), a.runPull(cmd.Context(), s, args[0], platforms.Normalize(p)))
			})
		},
	}
	cmd.Flags().StringVar(&platform, "platform", "", "platform to fetch (default this machine's)")
	return cmd
}

func (a *app) runPull(ctx context.Context, s *state, name string, p ocispec.Platform) error {
	img, err := image.Pull(ctx, s.store, s.registry, name, p, image.PullAlways)
	if err != nil {
		return err
	}
	if img.Stale != nil {
		return img.Stale
	}
	d, err := s.manifestOf(ctx, img)
	if err != nil {
		return err
	}
	g, err := image.Walk(ctx, s.store, d)
	if err != nil {
		return err
	}
	if err := s.fetch(ctx, g); err != nil {
		return err
	}
	if err := image.Tag(ctx, s.store, name, d); err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.stdout, d.Digest)
	return err
}

// fetch brings all blobs into the store, several at a time: what has a name is complete.
func (s *state) fetch(ctx context.Context, g *image.Graph) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for _, b := range g.Blobs {
		group.Go(func() error {
			if err := s.store.Ensure(ctx, b.Digest); err != nil {
				return fmt.Errorf("blob %s: %w", b.Digest, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// manifestOf returns the descriptor of the manifest that a pulled image was read from.
func (s *state) manifestOf(ctx context.Context, img *image.Image) (ocispec.Descriptor, error) {
	data, err := s.store.ReadBlob(ctx, img.Digest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var doc struct {
		MediaType string               `json:"mediaType"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return ocispec.Descriptor{}, err
	}
	if doc.Manifests == nil {
		if doc.MediaType == "" {
			doc.MediaType = ocispec.MediaTypeImageManifest
		}
		return ocispec.Descriptor{MediaType: doc.MediaType, Digest: img.Digest, Size: int64(len(data))}, nil
	}
	for _, d := range doc.Manifests { // only what was chosen has been fetched
		g, err := image.Walk(ctx, s.store, d)
		if err == nil && len(g.Images) == 1 && slices.Equal(g.Images[0].DiffIDs, img.Config.RootFS.DiffIDs) {
			return d, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s: no manifest of the index %s belongs to the image", img.Name, img.Digest)
}
