package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"filo/builder"
	"filo/builder/export"
	"filo/builder/source"
)

// buildRecord is what is kept of a build that ended. What it printed is not: that may hold what nobody wants on a disk.
type buildRecord struct {
	ID         string       `json:"ref"`
	Name       string       `json:"name"`
	Status     string       `json:"status"` // Completed, Error or Canceled
	Begin      time.Time    `json:"created_at"`
	End        time.Time    `json:"completed_at"`
	Steps      int          `json:"total_steps"` // of stages that ended
	Cached     int          `json:"cached_steps"`
	Context    string       `json:"context"`
	Dockerfile string       `json:"dockerfile,omitempty"`
	Target     string       `json:"target,omitempty"`
	Platforms  []string     `json:"platforms,omitempty"`
	Error      string       `json:"error,omitempty"`
	Images     []madeImage  `json:"images,omitempty"`
	Vertices   []vertexTime `json:"vertices,omitempty"`
}

// madeImage is an output of a build.
type madeImage struct {
	Type   string        `json:"type"`
	Digest digest.Digest `json:"digest,omitempty"` // none for files
	Names  []string      `json:"names,omitempty"`
}

// vertexTime says how a line of progress ended.
type vertexTime struct {
	Name    string  `json:"name"`
	State   string  `json:"state"`
	Seconds float64 `json:"seconds"`
	Error   string  `json:"error,omitempty"`
}

// keptBuilds is how many records stay; BuildKit keeps as many.
const keptBuilds = 50

func madeImages(all []export.Exported) (out []madeImage) {
	for _, x := range all {
		out = append(out, madeImage{x.Type, x.Descriptor.Digest, x.Names})
	}
	return out
}

// journal keeps what became of the build. That it cannot is told and fails nothing.
func (j *job) journal(ctx context.Context, ref string, built error) {
	r := buildRecord{
		ID: j.id, Name: j.buildName(ref), Status: "Completed", Begin: j.begin.UTC(), End: j.now().UTC(),
		Context: source.Anonymous(ref), Dockerfile: j.origin.file, Target: j.req.Target, Images: j.made,
	}
	if j.req.Root != "" {
		r.Context = j.req.Root
	}
	for _, p := range j.req.Platforms {
		r.Platforms = append(r.Platforms, platforms.Format(p))
	}
	if err := canceled(ctx, built); err != nil {
		r.Status, r.Error = "Error", err.Error()
		if ctx.Err() != nil {
			r.Status = "Canceled"
		}
	}
	r.Steps, r.Cached = j.display.Counts(isStep)
	for _, s := range j.display.Steps() {
		v := vertexTime{Name: s.Name, State: stateWords[s.State], Seconds: s.Took.Seconds()}
		if s.Err != nil {
			v.Error = s.Err.Error()
		}
		r.Vertices = append(r.Vertices, v)
	}
	if err := j.keep(r); err != nil {
		fmt.Fprintf(j.stderr, "WARNING: keep a record of the build: %v\n", err)
	}
}

// stateWords say how a vertex ended.
var stateWords = map[builder.State]string{
	builder.Started: "stopped", builder.Done: "done", builder.Cached: "cached", builder.Failed: "error", builder.Canceled: "canceled",
}

// buildName is what the build argument BUILDKIT_BUILD_NAME says, else what is built.
func (j *job) buildName(ref string) string {
	if n := j.req.Args["BUILDKIT_BUILD_NAME"]; n != "" {
		return n
	}
	name := j.title()
	switch {
	case name != "":
	case j.req.Root != "":
		name = filepath.Base(j.req.Root)
	default:
		name = source.Anonymous(ref)
	}
	if j.req.Target != "" {
		name += " (" + j.req.Target + ")"
	}
	return name
}

// keep writes a record and removes those that are too many.
func (s *state) keep(r buildRecord) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tmp := filepath.Join(s.store.TempDir(), r.file())
	err = errors.Join(os.MkdirAll(s.builds(), 0o755), os.WriteFile(tmp, data, 0o600))
	if err == nil {
		err = os.Rename(tmp, filepath.Join(s.builds(), r.file()))
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	return s.forgetOld()
}

// forgetOld removes the records that are too many, those first that were written first: to read them all takes longer than
// many a build.
func (s *state) forgetOld() error {
	list, err := os.ReadDir(s.builds())
	if err != nil || len(list) <= keptBuilds {
		return err
	}
	var all []fs.FileInfo
	for _, d := range list {
		if info, err := d.Info(); err == nil { // else another process removed it
			all = append(all, info)
		}
	}
	slices.SortFunc(all, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	for _, old := range all[min(len(all), keptBuilds):] {
		err = errors.Join(err, s.forgetBuild(old.Name()))
	}
	return err
}

// builds is where the records of builds are.
func (s *state) builds() string { return filepath.Join(s.store.Dir(), "builds") }

// file is the name of the file of r.
func (r buildRecord) file() string { return r.ID + ".json" }

// forgetBuild removes the file of a record; that another process did already is no error.
func (s *state) forgetBuild(file string) error {
	if err := os.Remove(filepath.Join(s.builds(), file)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// readBuilds returns the records, newest first. One that is damaged is removed: nobody can make it again.
func (s *state) readBuilds() ([]buildRecord, error) {
	list, err := os.ReadDir(s.builds())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all := []buildRecord{}
	for _, d := range list {
		id, ok := strings.CutSuffix(d.Name(), ".json")
		data, err := os.ReadFile(filepath.Join(s.builds(), d.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // another process removed it
		}
		if err != nil {
			return nil, err
		}
		var r buildRecord
		if !ok || json.Unmarshal(data, &r) != nil || r.ID != id {
			if err := os.Remove(filepath.Join(s.builds(), d.Name())); err != nil {
				return nil, err
			}
			continue
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b buildRecord) int { return b.Begin.Compare(a.Begin) })
	return all, nil
}

// findBuild returns the record with an ID that begins with id; "" is the last build.
func (s *state) findBuild(id string) (buildRecord, error) {
	all, err := s.readBuilds()
	if err != nil {
		return buildRecord{}, err
	}
	found := slices.DeleteFunc(all, func(r buildRecord) bool { return !strings.HasPrefix(r.ID, id) })
	switch {
	case len(found) == 0 && id == "":
		return buildRecord{}, errors.New("there is no record of any build")
	case len(found) == 0:
		return buildRecord{}, fmt.Errorf("no build %s is known (`filo history ls` lists them)", id)
	case len(found) > 1 && id != "":
		return buildRecord{}, fmt.Errorf("%d builds begin with %s", len(found), id)
	}
	return found[0], nil
}

// historyCommands are those of `filo history` that are about builds, not about an image.
func (a *app) historyCommands() []*cobra.Command {
	return []*cobra.Command{a.historyLs(), a.historyInspect(), a.historyRm()}
}

func (a *app) historyLs() *cobra.Command {
	var as string
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the last builds",
		Long:  fmt.Sprintf("List the last builds, up to %d, whatever became of them. A build that was killed left no record.", keptBuilds),
		Args:  exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := format(as)
			if err != nil {
				return &usageError{cmd.CommandPath(), err}
			}
			return a.with(func(s *state) error {
				all, err := s.readBuilds()
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(a.stdout, all)
				}
				w := tabwriter.NewWriter(a.stdout, 0, 0, 3, ' ', 0)
				fmt.Fprintln(w, "BUILD ID\tNAME\tSTATUS\tCACHED\tCREATED\tDURATION")
				for _, r := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\t%d of %d\t%s\t%s\n", r.ID, oneLine(r.Name), r.Status, r.Cached, r.Steps, a.ago(&r.Begin), r.duration())
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().StringVar(&as, "format", "table", "table or json")
	return cmd
}

func (r buildRecord) duration() string { return fmt.Sprintf("%.1fs", r.End.Sub(r.Begin).Seconds()) }

func (a *app) historyInspect() *cobra.Command {
	var as string
	cmd := &cobra.Command{
		Use:   "inspect [ID]",
		Short: "Show what a build did, by default the last one",
		Args:  between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			asJSON, err := format(as)
			if err != nil {
				return &usageError{cmd.CommandPath(), err}
			}
			return a.with(func(s *state) error {
				r, err := s.findBuild(strings.Join(args, ""))
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(a.stdout, r)
				}
				return a.printBuild(r)
			})
		},
	}
	cmd.Flags().StringVar(&as, "format", "table", "table or json")
	return cmd
}

func (a *app) printBuild(r buildRecord) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 3, ' ', 0)
	for _, f := range []struct{ name, value string }{
		{"build", r.ID}, {"name", r.Name}, {"context", r.Context}, {"dockerfile", r.Dockerfile}, {"target", r.Target},
		{"platforms", strings.Join(r.Platforms, ", ")}, {"begun", r.Begin.Format(time.RFC3339)}, {"duration", r.duration()},
		{"cached", fmt.Sprintf("%d of %d", r.Cached, r.Steps)}, {"status", r.Status}, {"error", r.Error},
	} {
		if f.value != "" {
			fmt.Fprintf(w, "%s\t%s\n", f.name, oneLine(f.value))
		}
	}
	for _, m := range r.Images {
		fmt.Fprintf(w, "output\t%s %s\n", m.Type, strings.TrimSpace(oneLine(m.Digest.String()+" "+strings.Join(m.Names, " "))))
	}
	fmt.Fprintf(w, "\nTIME\tSTATE\tWHAT\n")
	for _, v := range r.Vertices {
		fmt.Fprintf(w, "%.1fs\t%s\t%s\n", v.Seconds, v.State, oneLine(v.Name))
	}
	return w.Flush()
}

func (a *app) historyRm() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "rm [--all | ID...]",
		Short: "Forget builds",
		Long:  "Forget builds. What they made stays: images, layers and cache.",
		Args:  between(0, -1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return &usageError{cmd.CommandPath(), errors.New("want --all or IDs of builds")}
			}
			return a.with(func(s *state) error {
				if all {
					return s.forgetBuilds()
				}
				for _, id := range args {
					r, err := s.findBuild(id)
					if err != nil {
						return err
					}
					if err := s.forgetBuild(r.file()); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all of them")
	return cmd
}

// forgetBuilds removes all records.
func (s *state) forgetBuilds() error {
	all, err := s.readBuilds()
	for _, r := range all {
		err = errors.Join(err, s.forgetBuild(r.file()))
	}
	return err
}
