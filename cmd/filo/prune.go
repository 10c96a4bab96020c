package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"filo/cache"
	"filo/layer"
)

// pruneFlags are those of `filo prune`.
type pruneFlags struct {
	all, verbose   bool
	unused         time.Duration
	filters        []string
	keep, max, min string
}

func (f *pruneFlags) register(fs *pflag.FlagSet) {
	fs.BoolVarP(&f.all, "all", "a", false, "however recently it was used")
	fs.DurationVar(&f.unused, "unused-for", 7*24*time.Hour, "remove what was not used for this `time`")
	fs.StringArrayVar(&f.filters, "filter", nil, "remove only what matches: type=layer, until=24h, id=…, inuse=…; = may be != or ~= (a regular expression); may be repeated, all have to match")
	fs.StringVar(&f.keep, "keep-storage", "", "remove what was used longest ago until this `size` is left, like 20GB")
	fs.StringVar(&f.keep, "reserved-space", "", "the same `size`, as docker buildx calls it")
	fs.StringVar(&f.max, "max-used-space", "", "remove what was used longest ago until at most this `size` is left, whatever --keep-storage says")
	fs.StringVar(&f.min, "min-free-space", "", "remove what was used longest ago until the disk has this `size` free, but not below --keep-storage")
	fs.BoolVar(&f.verbose, "verbose", false, "list what was removed")
	fs.BoolP("force", "f", false, "do not ask (filo never does)")
}

// prune is `filo prune`.
func (a *app) prune() *cobra.Command {
	f := &pruneFlags{}
	cmd := &cobra.Command{
		Use:   "prune [flags]",
		Short: "Remove what no image and no recent build needs",
		Long: `Remove layers, blobs, cache mounts, downloads and cache records that no image of the local store needs and that were not
used for some time. Nothing is removed while another filo works on the state directory.

Types are layer, blob, cachemount, source and record, or as docker buildx calls them: regular (layers and blobs),
exec.cachemount, source.local and source.git.checkout (sources), internal (records).`,
		Example: `  filo prune                        # not used for a week
  filo prune --unused-for 24h
  filo prune --keep-storage 20GB    # what was used longest ago, until 20 GB are left
  filo prune --filter type=exec.cachemount --filter until=48h
  filo prune --all                  # all but the images`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			sel, err := f.selection(cmd.Flags(), a.now())
			if err != nil {
				return &usageError{cmd.CommandPath(), err}
			}
			s, err := a.open(true)
			if err != nil {
				return err
			}
			defer s.store.Close()
			return a.runPrune(cmd.Context(), s, sel, f.verbose)
		},
	}
	f.register(cmd.Flags())
	return cmd
}

// storage reads a size; "" is 0.
func storage(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := units.FromHumanSize(s)
	if err != nil {
		return 0, fmt.Errorf("--keep-storage, FILO_KEEP_STORAGE: %w", err)
	}
	return n, nil
}

// selection says what is to be removed of what no image needs.
type selection struct {
	before         *time.Time // last used not after this; nil is any time
	match          func(layer.Item) bool
	keep, max, min *int64 // bytes; nil sets no bound
}

// selection reads the flags.
func (f *pruneFlags) selection(fs *pflag.FlagSet, now time.Time) (selection, error) {
	filter, err := parseFilters(f.filters)
	if err != nil {
		return selection{}, err
	}
	sel := selection{match: filter.match}
	for _, b := range []struct {
		flag, text string
		to         **int64
	}{{"keep-storage", f.keep, &sel.keep}, {"max-used-space", f.max, &sel.max}, {"min-free-space", f.min, &sel.min}} {
		if b.text == "" {
			continue
		}
		n, err := units.FromHumanSize(b.text)
		if err != nil {
			return selection{}, fmt.Errorf("--%s: %w", b.flag, err)
		}
		*b.to = &n
	}
	bounded := sel.keep != nil || sel.max != nil || sel.min != nil
	if bounded && (f.all || fs.Changed("unused-for")) {
		return selection{}, errors.New("--keep-storage and other sizes go with neither --all nor --unused-for; --filter until=24h goes with them")
	}
	if f.all && fs.Changed("unused-for") {
		return selection{}, errors.New("--all goes not with --unused-for")
	}
	if !bounded && !f.all && filter.until == nil {
		filter.until = &f.unused
	}
	if filter.until != nil {
		before := now.Add(-*filter.until)
		sel.before = &before
	}
	return sel, nil
}

// choose returns what of all is to be removed, what was used longest ago first. free is how much the disk has left.
func (s selection) choose(all []layer.Item, free int64) []layer.Item {
	var total int64
	var out []layer.Item
	for _, it := range all {
		total += it.Bytes
		if !it.InUse && it.Kind != layer.KindTemp && s.match(it) && (s.before == nil || !it.Used.After(*s.before)) {
			out = append(out, it)
		}
	}
	slices.SortStableFunc(out, func(a, b layer.Item) int { return a.Used.Compare(b.Used) })
	if bound, ok := s.bound(total, free); ok {
		n := 0
		for ; n < len(out) && total > bound; n++ {
			total -= out[n].Bytes
		}
		out = out[:n]
	}
	return out
}

// bound is how many bytes may stay, if anything bounds them.
func (s selection) bound(total, free int64) (int64, bool) {
	bound, ok := int64(0), false
	if s.min != nil {
		bound, ok = total-max(0, *s.min-free), true
	}
	if s.keep != nil {
		bound, ok = max(bound, *s.keep), true
	}
	if s.max != nil && (!ok || *s.max < bound) {
		bound, ok = *s.max, true
	}
	return bound, ok
}

// lastUses tells when layers were used by cache records.
func (s *state) lastUses() (map[digest.Digest]time.Time, error) {
	used := map[digest.Digest]time.Time{}
	err := s.cache.Layers(func(_ cache.Key, diffID digest.Digest, at time.Time) bool {
		if at.After(used[diffID]) {
			used[diffID] = at
		}
		return true
	})
	return used, err
}

// runPrune removes what sel selects, and says so.
func (a *app) runPrune(ctx context.Context, s *state, sel selection, verbose bool) error {
	p, err := a.removeSelected(ctx, s, sel)
	if err != nil {
		return err
	}
	if p.Busy {
		return fmt.Errorf("prune: another filo works on %s; try again later", s.store.Dir())
	}
	if verbose {
		printItems(a.stdout, p.Removed, a.now())
	}
	fmt.Fprintf(a.stdout, "removed %s, %s, %s, %s and %s: %s\n", count(p.Count(layer.KindLayer), "layer"), count(p.Count(layer.KindBlob), "blob"),
		count(p.Count(layer.KindMount), "cache mount"), count(p.Count(layer.KindSource), "download"), count(p.Count(layer.KindRecord), "cache record"),
		units.HumanSize(float64(p.Bytes)))
	return nil
}

// printItems lists items, one a line.
func printItems(w io.Writer, all []layer.Item, now time.Time) {
	for _, it := range all {
		use := ""
		if it.InUse {
			use = "\tin use"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s ago%s\n", it.Kind, it.ID, units.HumanSize(float64(it.Bytes)), units.HumanDuration(now.Sub(it.Used)), use)
	}
}

// removeSelected removes what sel selects, unless another filo works on the state directory.
func (a *app) removeSelected(ctx context.Context, s *state, sel selection) (layer.Pruned, error) {
	used, err := s.lastUses()
	if err != nil {
		return layer.Pruned{}, err
	}
	free, err := s.store.Free()
	if err != nil {
		return layer.Pruned{}, err
	}
	return s.store.Prune(ctx, layer.PruneOptions{
		Now: a.now(), Used: used, Choose: func(all []layer.Item) []layer.Item { return sel.choose(all, free) },
	})
}
