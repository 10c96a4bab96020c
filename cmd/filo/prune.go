package main

import (
	"context"
	"fmt"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"filo/cache"
	"filo/layer"
)

// prune is `filo prune`.
func (a *app) prune() *cobra.Command {
	var all bool
	var unused time.Duration
	cmd := &cobra.Command{
		Use:   "prune [flags]",
		Short: "Remove what no image and no recent build needs",
		Long: `Remove layers and cache records that no image of the local store needs and that were not used for some time.
Nothing is removed while another filo works on the state directory.`,
		Example: "  filo prune                    # not used for a week\n  filo prune --unused-for 24h\n  filo prune --all              # all but the images",
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if all {
				unused = 0
			}
			s, err := a.open(true)
			if err != nil {
				return err
			}
			defer s.store.Close()
			return a.runPrune(cmd.Context(), s, unused)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "however recently it was used")
	cmd.Flags().DurationVar(&unused, "unused-for", 7*24*time.Hour, "remove what was not used for this `time`")
	return cmd
}

func (a *app) runPrune(ctx context.Context, s *state, unused time.Duration) error {
	before := a.now().Add(-unused)
	var keep []digest.Digest
	var old []cache.Key
	err := s.cache.Layers(func(k cache.Key, diffID digest.Digest, used time.Time) bool {
		if used.After(before) {
			keep = append(keep, diffID)
		} else {
			old = append(old, k)
		}
		return true
	})
	if err != nil {
		return err
	}
	p, err := s.store.Prune(ctx, layer.PruneOptions{Keep: keep, MinAge: unused})
	if err != nil {
		return err
	}
	if p.Busy {
		return fmt.Errorf("prune: another filo works on %s; try again later", s.store.Dir())
	}
	for _, k := range old { // a record without its layer is a miss, so an interruption here does no harm
		if err := s.cache.Remove(k); err != nil {
			return err
		}
	}
	fmt.Fprintf(a.stdout, "removed %s, %s and %s: %s\n", count(p.Layers, "layer"), count(p.Blobs, "blob"), count(len(old), "cache record"), units.HumanSize(float64(p.Bytes)))
	return nil
}
