package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/spf13/cobra"

	"filo/builder/image"
)

// rmi is `filo rmi`.
func (a *app) rmi() *cobra.Command {
	return &cobra.Command{
		Use:     "rmi IMAGE…",
		Short:   "Remove images from the local store",
		Long:    "Remove images from the local store: by name, or by ID all names of an image. What only they used stays on disk\nuntil `filo prune`.",
		Example: "  filo rmi hello registry.example/me/hello:1",
		Args:    between(1, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.with(func(s *state) error {
				for _, name := range args {
					if err := a.remove(cmd.Context(), s, name); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

func (a *app) remove(ctx context.Context, s *state, name string) error {
	d, err := image.Untag(ctx, s.store, name)
	if err == nil {
		fmt.Fprintf(a.stdout, "removed %s (%s)\n", name, d.Digest)
		return nil
	}
	n, found, idErr := s.findID(name)
	switch {
	case idErr != nil:
		return idErr
	case !found && errors.Is(err, fs.ErrNotExist):
		_, err = s.find(name)
		return err
	case !found:
		return err
	}
	gone, err := image.Remove(ctx, s.store, n.Descriptor.Digest)
	for _, g := range gone {
		fmt.Fprintf(a.stdout, "removed %s (%s)\n", g.Name, g.Descriptor.Digest)
	}
	return err
}
