package main

import (
	"encoding/json"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

// inspection is what `filo inspect` prints of an image.
type inspection struct {
	Name     string          `json:"name,omitempty"`
	Digest   digest.Digest   `json:"digest"`             // what the name stands for: a manifest or an index
	Platform string          `json:"platform,omitempty"` // of the manifest and the config below
	Manifest json.RawMessage `json:"manifest"`
	Config   json.RawMessage `json:"config"`
}

// inspect is `filo inspect`.
func (a *app) inspect() *cobra.Command {
	var platform string
	cmd := &cobra.Command{
		Use:     "inspect [flags] IMAGE…",
		Short:   "Print manifest and config of images of the local store",
		Example: "  filo inspect hello\n  filo inspect hello | jq '.[].config.config.Env'",
		Args:    between(1, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(s *state) error {
				var all []inspection
				for _, name := range args {
					p, err := s.picture(cmd.Context(), name, platform)
					if err != nil {
						return err
					}
					all = append(all, inspection{p.Name, p.Root.Digest, p.platform(), p.Manifest, p.config})
				}
				return printJSON(a.stdout, all)
			})
		},
	}
	cmd.Flags().StringVar(&platform, "platform", "", "of an image for several platforms, show this one")
	return cmd
}
