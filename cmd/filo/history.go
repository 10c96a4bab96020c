package main

import (
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

// history is `filo history`.
func (a *app) history() *cobra.Command {
	var as, platform string
	var whole bool
	cmd := &cobra.Command{
		Use:     "history [flags] IMAGE",
		Short:   "Show what each instruction added to an image, or what the last builds did",
		Long:    "Show what each instruction added to an image. With a command, show what the last builds did: of an image called ls,\nsay ls:latest.",
		Example: "  filo history hello\n  filo history --no-trunc hello\n  filo history --format json hello\n  filo history ls\n  filo history inspect",
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			asJSON, err := format(as)
			if err != nil {
				return &usageError{cmd.CommandPath(), err}
			}
			return a.with(func(s *state) error {
				p, err := s.picture(cmd.Context(), args[0], platform)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(a.stdout, p.history())
				}
				return a.printHistory(p.history(), whole)
			})
		},
	}
	cmd.AddCommand(a.historyCommands()...)
	cmd.Flags().StringVar(&as, "format", "table", "table or json")
	cmd.Flags().BoolVar(&whole, "no-trunc", false, "do not shorten")
	cmd.Flags().StringVar(&platform, "platform", "", "of an image for several platforms, show this one")
	return cmd
}

// historyRow is an instruction and the layer it made.
type historyRow struct {
	Created   *time.Time    `json:"created,omitempty"`
	CreatedBy string        `json:"created_by"`
	Layer     digest.Digest `json:"layer,omitempty"` // of the compressed blob
	DiffID    digest.Digest `json:"diff_id,omitempty"`
	Size      int64         `json:"size"`
	Comment   string        `json:"comment,omitempty"`
}

// history pairs the entries of the config's history with the layers, newest first.
func (p picture) history() []historyRow {
	rows := []historyRow{}
	next := 0
	for _, h := range p.Config.History {
		r := historyRow{Created: h.Created, CreatedBy: h.CreatedBy, Comment: h.Comment}
		if !h.EmptyLayer && next < len(p.Member.Layers) {
			p.layer(&r, next)
			next++
		}
		rows = append([]historyRow{r}, rows...)
	}
	for ; next < len(p.Member.Layers); next++ { // an image may have less history than layers
		r := historyRow{Comment: "no history"}
		p.layer(&r, next)
		rows = append([]historyRow{r}, rows...)
	}
	return rows
}

func (p picture) layer(r *historyRow, i int) {
	r.Layer, r.Size = p.Member.Layers[i].Digest, p.Member.Layers[i].Size
	if i < len(p.Config.RootFS.DiffIDs) {
		r.DiffID = p.Config.RootFS.DiffIDs[i]
	}
}

func (p picture) platform() string { return platforms.Format(image.Platform(p.Config)) }

func (a *app) printHistory(rows []historyRow, whole bool) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "LAYER\tCREATED\tCREATED BY\tSIZE\tCOMMENT")
	for _, r := range rows {
		layer, by := "-", oneLine(r.CreatedBy)
		if r.Layer != "" {
			layer = short(r.Layer)
		}
		if whole && r.Layer != "" {
			layer = r.Layer.String()
		}
		if c := []rune(by); !whole && len(c) > 45 {
			by = string(c[:44]) + "…"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", layer, a.ago(r.Created), by, units.HumanSize(float64(r.Size)), oneLine(r.Comment))
	}
	return w.Flush()
}

// oneLine keeps a foreign text from moving the cursor.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}
