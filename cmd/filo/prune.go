package main

import (
	"context"
	"errors"
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
	var keep string
	cmd := &cobra.Command{
		Use:   "prune [flags]",
		Short: "Remove what no image and no recent build needs",
		Long: `Remove layers, cache mounts and cache records that no image of the local store needs and that were not used for some
time. Nothing is removed while another filo works on the state directory.`,
		Example: `  filo prune                        # not used for a week
  filo prune --unused-for 24h
  filo prune --keep-storage 20GB    # what was used longest ago, until 20 GB are left
  filo prune --all                  # all but the images`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			bound, err := storage(keep)
			if err != nil {
				return &usageError{cmd.CommandPath(), err}
			}
			if keep != "" && (all || cmd.Flags().Changed("unused-for")) {
				return &usageError{cmd.CommandPath(), errors.New("--keep-storage goes with neither --all nor --unused-for")}
			}
			if all {
				unused = 0
			}
			s, err := a.open(true)
			if err != nil {
				return err
			}
			defer s.store.Close()
			before := a.now().Add(-unused)
			if keep != "" {
				if before, err = s.cutoff(cmd.Context(), bound); err != nil {
					return err
				}
			}
			return a.runPrune(cmd.Context(), s, before)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "however recently it was used")
	cmd.Flags().DurationVar(&unused, "unused-for", 7*24*time.Hour, "remove what was not used for this `time`")
	cmd.Flags().StringVar(&keep, "keep-storage", "", "remove what was used longest ago until this `size` is left, like 20GB")
	return cmd
}

// storage reads the value of --keep-storage.
func storage(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := units.FromHumanSize(s)
	if err != nil {
		return 0, fmt.Errorf("--keep-storage: %w", err)
	}
	return n, nil
}

// cutoff returns the time before which things must have been used last to be removed, so that bound bytes are left.
func (s *state) cutoff(ctx context.Context, bound int64) (time.Time, error) {
	used := map[digest.Digest]time.Time{}
	err := s.cache.Layers(func(_ cache.Key, diffID digest.Digest, at time.Time) bool {
		if at.After(used[diffID]) {
			used[diffID] = at
		}
		return true
	})
	if err != nil {
		return time.Time{}, err
	}
	return s.store.Cutoff(ctx, bound, used)
}

// runPrune removes what was not used since before.
func (a *app) runPrune(ctx context.Context, s *state, before time.Time) error {
	p, records, err := a.removeUnused(ctx, s, before)
	if err != nil {
		return err
	}
	if p.Busy {
		return fmt.Errorf("prune: another filo works on %s; try again later", s.store.Dir())
	}
	fmt.Fprintf(a.stdout, "removed %s, %s, %s and %s: %s\n", count(p.Layers, "layer"), count(p.Blobs, "blob"), count(p.Mounts, "cache mount"),
		count(records, "cache record"), units.HumanSize(float64(p.Bytes)))
	return nil
}

// removeUnused removes what was not used since before, unless another filo works on the state directory.
func (a *app) removeUnused(ctx context.Context, s *state, before time.Time) (layer.Pruned, int, error) {
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
		return layer.Pruned{}, 0, err
	}
	p, err := s.store.Prune(ctx, layer.PruneOptions{Keep: keep, Before: before})
	if err != nil || p.Busy {
		return p, 0, err
	}
	for _, k := range old { // a record without its layer is a miss, so an interruption here does no harm
		if err := s.cache.Remove(k); err != nil {
			return p, 0, err
		}
	}
	return p, len(old), nil
}
