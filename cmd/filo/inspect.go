package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"filo/builder/attest"
	"filo/builder/image"
)

// inspection is what `filo inspect` prints of an image.
type inspection struct {
	Name     string          `json:"name,omitempty"`
	Digest   digest.Digest   `json:"digest"`             // what the name stands for: a manifest or an index
	Platform string          `json:"platform,omitempty"` // of the manifest and the config below
	Manifest json.RawMessage `json:"manifest"`
	Config   json.RawMessage `json:"config"`

	Attestations []json.RawMessage `json:"attestations,omitempty"` // what is stated about it
}

// inspect is `filo inspect`.
func (a *app) inspect() *cobra.Command {
	var platform string
	var stated bool
	cmd := &cobra.Command{
		Use:     "inspect [flags] IMAGE…",
		Short:   "Print manifest and config of images of the local store",
		Example: "  filo inspect hello\n  filo inspect hello | jq '.[].config.config.Env'\n  filo inspect --attestations hello | jq '.[].attestations[].predicate'",
		Args:    between(1, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(s *state) error {
				var all []inspection
				for _, name := range args {
					p, err := s.picture(cmd.Context(), name, platform)
					if err != nil {
						return err
					}
					i := inspection{p.Name, p.Root.Digest, p.platform(), p.Manifest, p.config, nil}
					if stated {
						i.Attestations, err = s.attestations(cmd.Context(), p)
					}
					if err != nil {
						return err
					}
					all = append(all, i)
				}
				return printJSON(a.stdout, all)
			})
		},
	}
	cmd.Flags().StringVar(&platform, "platform", "", "of an image for several platforms, show this one")
	cmd.Flags().BoolVar(&stated, "attestations", false, "print what is stated about the image as well: its provenance, its SBOM")
	return cmd
}

// attestations returns the statements about an image, as far as the store has them.
func (s *state) attestations(ctx context.Context, p picture) ([]json.RawMessage, error) {
	g, err := image.Walk(ctx, s.store, p.Root)
	if err != nil {
		return nil, err
	}
	var all []json.RawMessage
	for _, m := range g.Images {
		if m.Descriptor.Annotations[attest.AnnotationDigest] != p.Member.Descriptor.Digest.String() {
			continue
		}
		for _, l := range m.Layers {
			if l.MediaType != attest.MediaType {
				continue
			}
			data, err := s.store.ReadBlob(ctx, l.Digest)
			if err == nil && !json.Valid(data) {
				err = errors.New("not JSON")
			}
			if err != nil {
				return nil, fmt.Errorf("statement %s: %w", l.Digest, err)
			}
			all = append(all, data)
		}
	}
	return all, nil
}
