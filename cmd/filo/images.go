package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"filo/builder/image"
)

// images is `filo images`.
func (a *app) images() *cobra.Command {
	var as string
	cmd := &cobra.Command{
		Use:     "images [flags]",
		Aliases: []string{"ls"},
		Short:   "List the images of the local store",
		Example: "  filo images\n  filo images --format json | jq -r '.[].name'",
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := format(as)
			if err != nil {
				return &usageError{cmd.CommandPath(), err}
			}
			return a.with(func(s *state) error { return a.listImages(cmd.Context(), s, asJSON) })
		},
	}
	cmd.Flags().StringVar(&as, "format", "table", "table or json")
	return cmd
}

// imageRow is an image in the list.
type imageRow struct {
	Name      string        `json:"name"`
	Digest    digest.Digest `json:"digest"`
	ID        digest.Digest `json:"id"` // of the config
	Created   *time.Time    `json:"created,omitempty"`
	Size      int64         `json:"size"`
	Platforms []string      `json:"platforms"`
}

func (a *app) listImages(ctx context.Context, s *state, asJSON bool) error {
	all, err := image.List(s.store)
	if err != nil {
		return err
	}
	rows := []imageRow{}
	for _, n := range all {
		r, err := s.row(ctx, n)
		if err != nil {
			a.warnOf(n, err)
			continue
		}
		rows = append(rows, r)
	}
	if asJSON {
		return printJSON(a.stdout, rows)
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NAME\tID\tDIGEST\tPLATFORMS\tCREATED\tSIZE")
	for _, r := range rows {
		name := strings.TrimPrefix(strings.TrimPrefix(r.Name, "docker.io/library/"), "docker.io/")
		if name == "" {
			name = "<none>"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", name, short(r.ID), short(r.Digest), strings.Join(r.Platforms, ","), a.ago(r.Created), units.HumanSize(float64(r.Size)))
	}
	return w.Flush()
}

// warnOf says why an image cannot be listed, and what helps.
func (a *app) warnOf(n image.Named, err error) {
	if !errors.Is(err, image.ErrDamaged) { // that has the name
		err = fmt.Errorf("%s: %w", n.Name, err)
	}
	fmt.Fprintf(a.stderr, "WARNING: %v\n", err)
	if h := hint(err, nil); h != "" {
		fmt.Fprintf(a.stderr, "hint: %s\n", h)
	}
}

// row describes an image of the store; of several platforms, ID and time are the first one's.
func (s *state) row(ctx context.Context, n image.Named) (imageRow, error) {
	g, err := image.Walk(ctx, s.store, n.Descriptor)
	if err != nil {
		return imageRow{}, err
	}
	r := imageRow{Name: n.Name, Digest: n.Descriptor.Digest, Platforms: []string{}}
	for _, m := range g.Images {
		if m.Attestation {
			continue
		}
		p, err := s.read(ctx, picture{Member: m})
		if err != nil {
			return r, err
		}
		r.Size += p.size()
		r.Platforms = append(r.Platforms, platforms.Format(image.Platform(p.Config)))
		if r.ID == "" {
			r.ID, r.Created = m.Config.Digest, p.Config.Created
		}
	}
	return r, nil
}
