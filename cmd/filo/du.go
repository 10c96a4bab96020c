package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// du is `filo du`.
func (a *app) du() *cobra.Command {
	return &cobra.Command{
		Use:     "du",
		Aliases: []string{"df"},
		Short:   "Show what takes space in the state directory",
		Long:    "Show what takes space in the state directory, and how much of it `filo prune --all` would free.",
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.open(true)
			if err != nil {
				return err
			}
			defer s.store.Close()
			all, err := s.store.Usage(cmd.Context())
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintf(w, "KIND\tITEMS\tSIZE\tRECLAIMABLE\n")
			var size, reclaimable int64
			for _, u := range all {
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", u.Kind, u.Items, units.HumanSize(float64(u.Bytes)), units.HumanSize(float64(u.Reclaimable)))
				size, reclaimable = size+u.Bytes, reclaimable+u.Reclaimable
			}
			fmt.Fprintf(w, "Total:\t\t%s\t\nReclaimable:\t\t%s\t\n", units.HumanSize(float64(size)), units.HumanSize(float64(reclaimable)))
			return w.Flush()
		},
	}
}
