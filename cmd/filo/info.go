package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/containerd/platforms"
	"github.com/spf13/cobra"

	"filo/builder/image"
	"filo/builder/sandbox"
)

// info is `filo info`.
func (a *app) info() *cobra.Command {
	return &cobra.Command{
		Use:   "info",
		Short: "Show how steps are isolated here, and why, and where the state is",
		Args:  exactly(0),
		RunE: func(*cobra.Command, []string) error {
			s, err := a.open(true)
			if err != nil {
				return err
			}
			defer s.store.Close()
			all, err := image.List(s.store)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintf(w, "version\t%s\n", version())
			fmt.Fprintf(w, "platform\t%s\n", platforms.Format(platforms.DefaultSpec()))
			fmt.Fprintf(w, "isolation\t%s\n", s.ground.Name)
			if s.ground.Reason != "" {
				fmt.Fprintf(w, "because\t%s\n", s.ground.Reason)
			}
			if s.ground.Name == "chroot" {
				fmt.Fprintf(w, "limits\t%s\n", sandbox.ChrootLimits)
			}
			fmt.Fprintf(w, "storage\t%s\n", s.storing())
			if s.storing().Merges() {
				fmt.Fprintf(w, "links\thard links change under all their names; an overlay parts those of layers below by a write\n")
			}
			if s.ground.SingleID {
				fmt.Fprintf(w, "user ids\tone only: owners of files are kept in the image, not on disk\n")
			}
			fmt.Fprintf(w, "state\t%s\n", s.store.Dir())
			fmt.Fprintf(w, "images\t%d\n", len(all))
			return w.Flush()
		},
	}
}
