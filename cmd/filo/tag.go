package main

import (
	"github.com/spf13/cobra"

	"filo/builder/image"
)

// tag is `filo tag`.
func (a *app) tag() *cobra.Command {
	return &cobra.Command{
		Use:     "tag IMAGE NAME…",
		Short:   "Give an image of the local store more names",
		Example: "  filo tag hello registry.example/me/hello:1",
		Args:    between(2, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(s *state) error {
				n, err := s.find(args[0])
				if err != nil {
					return err
				}
				for _, name := range args[1:] {
					if err := image.Tag(cmd.Context(), s.store, name, n.Descriptor); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}
