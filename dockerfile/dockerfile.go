// Package dockerfile turns the text of a Dockerfile into stages, and a stage into steps with everything resolved:
// words expanded, defaults filled in, the image config known after each one. An image config depends on the base's
// config, the instructions and the arguments, never on what a RUN wrote, so all of it is known before anything runs.
//
// The package is pure: it reads no files, environment, clock or network and starts nothing. It runs no step, fetches
// no base and looks up no user; it says what a step would need.
//
// Start at [Parse]. dockerfile.go holds the whole file and [File.Plan] (which stages, in which order), stage.go one
// stage and [Stage.Steps], step.go the types that the builder works with. Of the instructions, run.go has RUN and
// its mounts, copy.go COPY and ADD, config.go those that only change the config. env.go has variables and arguments,
// expand.go their expansion in words, names.go what a name in FROM or --from means, epoch.go SOURCE_DATE_EPOCH,
// check.go the build checks, outline.go what a file asks of its caller, error.go errors with their place in the file,
// suggest.go what was probably meant.
package dockerfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/util/suggest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Args is what the caller says about a build, apart from the text.
type Args struct {
	Name           string            // file name, for errors
	Build          map[string]string // build arguments by name
	BuildPlatform  ocispec.Platform  // where the build runs
	TargetPlatform ocispec.Platform  // what is built for
	Target         string            // the stage to build, which TARGETSTAGE tells and which takes Labels; "" is the last
	Contexts       []string          // names of additional build contexts: each replaces the stage or image of that name
	Labels         map[string]string // added to the target stage's final config
	Epoch          *int64            // SOURCE_DATE_EPOCH in seconds; wins over the one in Build
	Ignore         []string          // patterns of the main context's ignore file, for the check CopyIgnoredFile only
}

// File is a parsed Dockerfile. It does not change once it is made.
type File struct {
	Name     string
	Stages   []*Stage
	Warnings []Warning // what concerns the file as a whole and FROM lines; see [Step] for the rest
	Notes    []string  // remarks that are no build checks, such as a build argument that nothing declares
	Epoch    *int64    // SOURCE_DATE_EPOCH in seconds; nil if unset or not yet known
	// EpochFrom is set if SOURCE_DATE_EPOCH names where the time comes from: the zero Ref is the main build context,
	// a stage is one whose only step is an ADD of one URL. Parse again with Args.Epoch once the time is known.
	EpochFrom *Ref

	args     Args
	lines    []string
	escape   rune
	global   *env            // what FROM lines may use: predefined arguments and those above the first FROM
	declared map[string]bool // arguments declared above the first FROM
	outline  []Argument      // the same, with what the outline tells of them
	check    linter.Config
	contexts map[string]string // normalised name of a context, to the name the caller uses
	ignore   *ignore
}

// Parse reads a Dockerfile and validates it as a whole: syntax, instructions, flags, stage names, base names, and
// the links between stages. What is wrong with it comes back as [*Error].
func Parse(r io.Reader, args Args) (*File, error) {
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", args.Name, err)
	}
	f := &File{Name: args.Name, args: args, lines: strings.Split(string(text), "\n")}
	if err := f.parse(text); err != nil {
		err = f.at(err, nil)
		var e *Error
		if errors.As(err, &e) {
			e.Warnings = f.Warnings
		}
		return nil, err
	}
	return f, nil
}

func (f *File) parse(text []byte) error {
	if len(text) == 0 {
		return fmt.Errorf("the Dockerfile is empty")
	}
	if err := f.readArgs(); err != nil {
		return err
	}
	if err := f.readDirectives(text); err != nil {
		return err
	}
	tree, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return err
	}
	f.escape = tree.EscapeToken
	lint := f.linter(&f.Warnings)
	for _, w := range tree.Warnings {
		if w.URL == linter.RuleNoEmptyContinuation.URL {
			lint.Run(&linter.RuleNoEmptyContinuation, []parser.Range{*w.Location}, linter.RuleNoEmptyContinuation.Format())
		}
	}
	stages, metaArgs, err := instructions.Parse(tree.AST, lint)
	if err != nil {
		return err
	}
	if len(stages) == 0 {
		return fmt.Errorf("the Dockerfile has no FROM")
	}
	checkStageNames(stages, lint)
	checkCasing(stages, lint)
	if err := f.readGlobals(stages, metaArgs, lint); err != nil {
		return err
	}
	if err := f.link(stages, tree.AST.Children, lint); err != nil {
		return err
	}
	f.note(metaArgs, stages)
	return f.readEpoch()
}

// readArgs takes over what the caller said, in the form that the rest needs.
func (f *File) readArgs() error {
	build := make(map[string]string, len(f.args.Build))
	for k, v := range f.args.Build {
		build[k] = v
	}
	if f.args.Epoch != nil {
		build[epochArg] = strconv.FormatInt(*f.args.Epoch, 10)
	} else if v, ok := build[epochArg]; ok && v == "" {
		delete(build, epochArg)
	}
	f.args.Build = build
	f.contexts = make(map[string]string, len(f.args.Contexts))
	for _, name := range f.args.Contexts {
		f.contexts[normalContext(name)] = name
	}
	var err error
	f.ignore, err = newIgnore(f.args.Ignore)
	return err
}

// readGlobals works out what FROM lines may use.
func (f *File) readGlobals(stages []instructions.Stage, metaArgs []instructions.ArgCommand, lint *linter.Linter) error {
	target := f.args.Target
	if target == "" {
		target = stages[len(stages)-1].Name
	}
	predefined := predefinedArgs(f.args, target)
	f.checkDefaultBases(stages, predefined, metaArgs, lint)
	global, outline, err := f.globalArgs(predefined, metaArgs, f.args.Build)
	if err != nil {
		return err
	}
	f.global, f.outline = global, outline
	f.declared = make(map[string]bool)
	for _, a := range outline {
		f.declared[a.Name] = true
	}
	return nil
}

// link makes the stages and ties them to each other.
func (f *File) link(stages []instructions.Stage, nodes []*parser.Node, lint *linter.Linter) error {
	byStage := nodesByStage(nodes)
	for i, st := range stages {
		s := &Stage{
			file: f, Name: st.Name, Index: i, from: st.Location, Description: st.DocComment, nodes: byStage[i],
			Written: Written{st.BaseName, st.Platform},
		}
		s.Line, _ = lines(st.Location)
		if err := s.resolveBase(st, lint.WithMergedConfigFromComments(st.Comments)); err != nil {
			return f.at(err, st.Location)
		}
		f.Stages = append(f.Stages, s)
	}
	for i, s := range f.Stages {
		if err := s.resolveNeeds(stages[i].Commands); err != nil {
			return err
		}
	}
	return f.refuseCycles()
}

// nodesByStage returns the syntax trees of each stage's instructions, its FROM left out.
func nodesByStage(nodes []*parser.Node) [][]*parser.Node {
	var out [][]*parser.Node
	for _, n := range nodes {
		switch {
		case strings.EqualFold(n.Value, "from"):
			out = append(out, nil)
		case len(out) > 0:
			out[len(out)-1] = append(out[len(out)-1], n)
		}
	}
	return out
}

// Plan returns the stages that target needs and target itself, each after those it needs, in the order of the file.
// An empty target is the last stage; names are compared without regard to case, numbers are not accepted.
// What in these stages can be seen to be wrong without their bases is an error.
func (f *File) Plan(target string) ([]*Stage, error) {
	last, err := f.target(target)
	if err != nil {
		return nil, err
	}
	needed := make([]bool, len(f.Stages))
	queue := []*Stage{last}
	for len(queue) > 0 {
		s := queue[0]
		queue = queue[1:]
		if needed[s.Index] {
			continue
		}
		needed[s.Index] = true
		if err := s.refuseForward(); err != nil {
			return nil, err
		}
		queue = append(queue, s.Needs...)
	}
	var plan []*Stage
	for i, s := range f.Stages {
		if !needed[i] {
			continue
		}
		if err := s.validate(); err != nil {
			return nil, err
		}
		plan = append(plan, s)
	}
	return plan, nil
}

// target finds the stage that --target names.
func (f *File) target(name string) (*Stage, error) {
	if name == "" {
		return f.Stages[len(f.Stages)-1], nil
	}
	if s := f.stage(name); s != nil {
		return s, nil
	}
	var names []string
	for _, s := range f.Stages {
		if s.Name != "" {
			names = append(names, s.Name)
		}
	}
	err := suggest.WrapError(fmt.Errorf("target stage %q could not be found", name), name, names, true)
	return nil, &Error{File: f.Name, Err: err}
}

// stage returns the last stage of that name, nil if there is none.
func (f *File) stage(name string) *Stage {
	for i := len(f.Stages) - 1; i >= 0; i-- {
		if s := f.Stages[i]; s.Name != "" && strings.EqualFold(s.Name, name) {
			return s
		}
	}
	return nil
}

// refuseCycles looks at all stages, needed or not: a circle is a mistake wherever it stands.
func (f *File) refuseCycles() error {
	const (
		open = iota + 1
		done
	)
	state := make([]int, len(f.Stages))
	var path []need
	var visit func(s *Stage) error
	visit = func(s *Stage) error {
		state[s.Index] = open
		for _, n := range s.needs {
			path = append(path, n)
			switch state[n.stage.Index] {
			case open:
				return f.cycle(n.stage, path)
			case 0:
				if err := visit(n.stage); err != nil {
					return err
				}
			}
			path = path[:len(path)-1]
		}
		state[s.Index] = done
		return nil
	}
	for _, s := range f.Stages {
		if state[s.Index] != 0 {
			continue
		}
		if err := visit(s); err != nil {
			return err
		}
	}
	return nil
}

// cycle names every line of the circle that path ends in.
func (f *File) cycle(s *Stage, path []need) error {
	start := len(path) - 1
	for start > 0 && path[start].by != s {
		start--
	}
	e := &Error{File: f.Name, Source: f.lines, Err: fmt.Errorf("circular dependency detected on stage: %s", s.label())}
	for _, n := range path[start:] {
		e.Ranges = append(e.Ranges, ranges(n.where)...)
	}
	e.Ranges = mergeRanges(e.Ranges)
	e.Hint = "a stage can only use stages above it that do not need it themselves"
	return e
}
