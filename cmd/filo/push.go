package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"filo/builder/export"
	"filo/builder/image"
)

// push is `filo push`.
func (a *app) push() *cobra.Command {
	insecure := false
	cmd := &cobra.Command{
		Use:     "push [flags] IMAGE [NAME]",
		Short:   "Push an image of the local store to a registry",
		Long:    "Push an image of the local store to the registry that its name, or NAME, says.",
		Example: "  filo push registry.example/me/hello:1\n  filo push hello registry.example/me/hello:1",
		Args:    between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			push := func(s *state) error { return a.runPush(cmd.Context(), s, args[0], args[len(args)-1], insecure) }
			err := a.with(push)
			if errors.Is(err, image.ErrDamaged) && cmd.Context().Err() == nil {
				err = a.within(push) // where trees can be read, blobs can be made of them
			}
			return canceled(cmd.Context(), err)
		},
	}
	cmd.Flags().BoolVar(&insecure, "insecure", false, "allow plain http and unknown certificates")
	return cmd
}

func (a *app) runPush(ctx context.Context, s *state, from, to string, insecure bool) error {
	n, err := s.find(from)
	if err != nil {
		return err
	}
	o := export.Output{Type: "registry", Attrs: map[string]string{"registry.insecure": fmt.Sprint(insecure)}}
	say := func(text string) { fmt.Fprintln(a.stderr, text) }
	x, err := export.Write(ctx, a.newExporter(s, say), o, export.Result{Descriptor: &n.Descriptor, Names: []string{to}})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.stdout, x.Descriptor.Digest)
	return err
}
