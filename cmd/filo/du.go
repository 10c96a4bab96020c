package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"filo/layer"
)

// duKinds are the lines of `filo du`.
var duKinds = []struct {
	kind layer.Kind
	name string
}{
	{layer.KindLayer, "layers"}, {layer.KindBlob, "blobs"}, {layer.KindMount, "cache mounts"}, {layer.KindSource, "sources"},
	{layer.KindRecord, "records"}, {layer.KindTemp, "unfinished"},
}

// du is `filo du`.
func (a *app) du() *cobra.Command {
	var verbose bool
	var filters []string
	cmd := &cobra.Command{
		Use:     "du [flags]",
		Aliases: []string{"df"},
		Short:   "Show what takes space in the state directory",
		Long:    "Show what takes space in the state directory, and how much of it `filo prune --all` would free.",
		Example: "  filo du\n  filo du --verbose --filter type=layer,inuse=false",
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := parseFilters(filters)
			if err != nil {
				return &usageError{cmd.CommandPath(), err}
			}
			s, err := a.open(true)
			if err != nil {
				return err
			}
			defer s.store.Close()
			used, err := s.lastUses()
			if err != nil {
				return err
			}
			all, err := s.store.Items(cmd.Context(), a.now(), used)
			if err != nil {
				return err
			}
			return a.showUse(matching(all, f, a), verbose)
		},
	}
	cmd.Flags().BoolVar(&verbose, "verbose", false, "list all single things as well")
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "count only what matches, see filo prune")
	return cmd
}

func matching(all []layer.Item, f *filter, a *app) (out []layer.Item) {
	for _, it := range all {
		if f.match(it) && (f.until == nil || a.now().Sub(it.Used) >= *f.until) {
			out = append(out, it)
		}
	}
	return out
}

func (a *app) showUse(all []layer.Item, verbose bool) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	if verbose {
		printItems(w, all, a.now())
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "KIND\tITEMS\tSIZE\tRECLAIMABLE\n")
	var size, reclaimable int64
	for _, k := range duKinds {
		var items int
		var bytes, free int64
		for _, it := range all {
			if it.Kind != k.kind {
				continue
			}
			items, bytes = items+1, bytes+it.Bytes
			if !it.InUse {
				free += it.Bytes
			}
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", k.name, items, units.HumanSize(float64(bytes)), units.HumanSize(float64(free)))
		size, reclaimable = size+bytes, reclaimable+free
	}
	fmt.Fprintf(w, "Total:\t\t%s\t\nReclaimable:\t\t%s\t\n", units.HumanSize(float64(size)), units.HumanSize(float64(reclaimable)))
	return w.Flush()
}
