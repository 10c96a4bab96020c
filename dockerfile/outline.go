package dockerfile

import (
	"slices"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Argument is a build argument as a file declares it.
type Argument struct {
	Name        string
	Value       *string // default or given; nil for none
	Description string  // the comment above ARG that tells what it is for
	Line        int

	deps []string // arguments that the default uses
}

// Input is what a step asks its caller for: a secret, an agent, a cache.
type Input struct {
	ID       string
	Required bool
	Line     int
}

// Outline is what a target can be given.
type Outline struct {
	Name        string
	Description string
	Args        []Argument
	Secrets     []Input
	SSH         []Input
	Caches      []Input
}

func argument(kv instructions.KeyValuePairOptional, where []parser.Range, value *string) Argument {
	line, _ := lines(where)
	return Argument{Name: kv.Key, Value: value, Description: kv.DocComment, Line: line}
}

// Outline returns what the last stage of a plan, and those it needs, take from the caller. base is as for [File.Walk].
func (f *File) Outline(plan []*Stage, p ocispec.Platform, base func(*Stage) (Config, error)) (Outline, error) {
	last := plan[len(plan)-1]
	out := Outline{Name: last.Name, Description: last.Description}
	var stages [][]Step
	err := f.Walk(plan, p, base, func(_ *Stage, steps []Step) error {
		stages = append(stages, steps)
		return nil
	})
	if err != nil {
		return out, err
	}
	slices.Reverse(stages) // of arguments with one name the one nearest to the target counts
	used := map[string]bool{}
	for _, s := range plan {
		f.use(used, s.used...)
	}
	for _, steps := range stages {
		for _, st := range steps {
			f.use(used, st.inherited...)
			for _, a := range st.args {
				if !slices.ContainsFunc(out.Args, func(b Argument) bool { return a.Name == b.Name }) {
					out.Args = append(out.Args, a)
				}
			}
			if r, ok := st.Op.(*Run); ok {
				out.addMounts(r.Mounts, st.Start)
			}
		}
	}
	for i := len(f.outline) - 1; i >= 0; i-- {
		a := f.outline[i]
		if used[a.Name] && !slices.ContainsFunc(out.Args, func(b Argument) bool { return a.Name == b.Name }) {
			out.Args = append(out.Args, a)
		}
	}
	slices.SortStableFunc(out.Args, func(a, b Argument) int { return a.Line - b.Line })
	for _, list := range [][]Input{out.Secrets, out.SSH, out.Caches} {
		slices.SortStableFunc(list, func(a, b Input) int { return a.Line - b.Line })
	}
	return out, nil
}

// use marks global arguments and those that their defaults are made of.
func (f *File) use(used map[string]bool, names ...string) {
	for _, n := range names {
		if used[n] {
			continue
		}
		used[n] = true
		for _, a := range f.outline {
			if a.Name == n {
				f.use(used, a.deps...)
			}
		}
	}
}

func (o *Outline) addMounts(mounts []Mount, line int) {
	for _, m := range mounts {
		switch m.Type {
		case MountSecret:
			o.Secrets = addInput(o.Secrets, m, line)
		case MountSSH:
			o.SSH = addInput(o.SSH, m, line)
		case MountCache:
			o.Caches = addInput(o.Caches, m, line)
		}
	}
}

func addInput(list []Input, m Mount, line int) []Input {
	if slices.ContainsFunc(list, func(in Input) bool { return in.ID == m.ID }) {
		return list
	}
	return append(list, Input{ID: m.ID, Required: m.Required, Line: line})
}
