package dockerfile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/moby/buildkit/util/suggest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer/registry/reference"
)

// Written is what FROM says before expansion.
type Written struct{ Base, Platform string }

// Stage is a FROM and what follows it. It does not change once it is made, so its methods may run side by side.
type Stage struct {
	Name        string // as AS says it, in lower case; "" for none
	Index       int    // place in the file, from 0
	Base        Ref    // an earlier stage, or Name: a build context, an image as written, or "scratch"
	Platform    *ocispec.Platform
	Needs       []*Stage // the base stage and those that COPY --from and RUN --mount name, each once
	Line        int      // where FROM stands
	BaseText    string   // the reference in FROM after expansion
	Written     Written  // FROM before expansion
	Description string   // the comment above FROM that tells what the stage is for

	file     *File
	from     []parser.Range
	nodes    []*parser.Node
	needs    []need
	used     []string // variables that FROM uses
	context  bool     // Base is a build context
	replaced bool     // by a build context of the stage's own name: its instructions do not count
}

// need is one reason why a stage needs another.
type need struct {
	by, stage *Stage
	where     []parser.Range
	verb      string // "copy" or "mount"; "" for FROM
}

// resolveBase works out what the stage starts from.
func (s *Stage) resolveBase(st instructions.Stage, lint *linter.Linter) error {
	f := s.file
	word, err := f.lex().expand(st.BaseName, f.global)
	f.checkFromArgs(st.BaseName, word, st.Location, lint)
	if err != nil {
		return err
	}
	s.BaseText, s.used = word.Result, sortedKeys(word.Matched)
	if s.BaseText == "" {
		return fmt.Errorf("base name (%s) should not be blank", st.BaseName)
	}
	if st.Platform != "" {
		if err := s.resolvePlatform(st, lint); err != nil {
			return err
		}
	}
	if s.Name != "" {
		if c, ok := f.context(s.Name, s.Platform); ok {
			s.Base, s.context, s.replaced, s.nodes = Ref{Name: c}, true, true, nil
			return nil
		}
	}
	if b := f.stage(s.BaseText); b != nil { // only stages above are known by now
		s.Base, s.context = b.ref(), b.replaced
		return nil
	}
	if s.Base, err = f.image(s.BaseText, s.Platform); err != nil {
		return err
	}
	s.context = s.Base.Name != s.BaseText || f.contexts[normalContext(s.BaseText)] == s.BaseText
	return nil
}

func (s *Stage) resolvePlatform(st instructions.Stage, lint *linter.Linter) error {
	f := s.file
	word, err := f.lex().expand(st.Platform, f.global)
	f.checkFromArgs(st.Platform, word, st.Location, lint)
	checkPlatformFlag(st, word, f.global, lint)
	if err != nil {
		return fmt.Errorf("platform %s: %w", st.Platform, err)
	}
	s.used = append(s.used, sortedKeys(word.Matched)...)
	if word.Result == "" {
		return suggestAny(fmt.Errorf("empty platform value from expression %s", st.Platform), word, f.global)
	}
	p, err := platforms.Parse(word.Result)
	if err != nil {
		return suggestAny(fmt.Errorf("parse platform %s: %w", st.Platform, err), word, f.global)
	}
	s.Platform = &p
	return nil
}

// suggestAny adds the name that an unknown variable of a word was probably meant to be.
func suggestAny(err error, word shell.ProcessWordResult, vars *env) error {
	for _, k := range sortedKeys(word.Unmatched) {
		if ok, wrapped := suggest.WrapErrorMaybe(err, k, vars.Keys(), true); ok {
			return wrapped
		}
	}
	return err
}

// resolveNeeds finds the stages that this one takes files from, and checks what it takes from elsewhere.
func (s *Stage) resolveNeeds(cmds []instructions.Command) error {
	if s.Base.Stage != nil {
		s.addNeed(need{s, s.Base.Stage, s.from, ""})
		for _, n := range s.Base.Stage.nodes {
			if err := s.needsOfTrigger(n); err != nil {
				return err
			}
		}
	}
	if s.replaced {
		return nil
	}
	for _, c := range cmds {
		if err := s.needsOf(c); err != nil {
			return s.file.at(err, c.Location())
		}
		if ob, ok := c.(*instructions.OnbuildCommand); ok {
			if _, err := s.parseTrigger(ob.Expression, c.Location()); err != nil {
				s.file.Notes = append(s.file.Notes, err.Error())
			}
		}
	}
	return nil
}

func (s *Stage) needsOf(c instructions.Command) error {
	switch c := c.(type) {
	case *instructions.CopyCommand:
		if c.From == "" {
			return nil
		}
		ref, err := s.file.copyOrigin(c.From)
		if err != nil {
			return err
		}
		s.addNeed(need{s, ref.Stage, c.Location(), "copy"})
	case *instructions.RunCommand:
		for _, m := range instructions.GetMounts(c) {
			if m.From == "" {
				continue
			}
			ref, err := s.file.origin(m.From)
			if err != nil {
				return err
			}
			s.addNeed(need{s, ref.Stage, c.Location(), "mount"})
		}
	}
	return nil
}

// needsOfTrigger finds what an ONBUILD of the base stage makes this stage need. A trigger that is nothing is an error
// only once it is due, see [Stage.Steps].
func (s *Stage) needsOfTrigger(n *parser.Node) error {
	if !strings.EqualFold(n.Value, "onbuild") {
		return nil
	}
	cmd, err := parseNode(n, s.file.quiet())
	if err != nil {
		return err
	}
	ob, ok := cmd.(*instructions.OnbuildCommand)
	if !ok {
		return nil
	}
	node, err := s.parseTrigger(ob.Expression, s.from)
	if err != nil {
		return nil
	}
	if cmd, err = parseNode(node, s.file.quiet()); err != nil {
		return err
	}
	return s.file.at(s.needsOf(cmd), s.from)
}

func (s *Stage) addNeed(n need) {
	if n.stage == nil {
		return
	}
	s.needs = append(s.needs, n)
	if !slices.Contains(s.Needs, n.stage) {
		s.Needs = append(s.Needs, n.stage)
	}
}

// refuseForward reports a need that stands below this stage.
func (s *Stage) refuseForward() error {
	for _, n := range s.needs {
		if n.stage.Index > s.Index {
			return s.file.at(s.forward(n), n.where)
		}
	}
	return nil
}

func (s *Stage) forward(n need) error {
	return &Error{
		Err:  fmt.Errorf("cannot %s from stage %q, it needs to be defined before current stage %q", n.verb, n.stage.label(), s.label()),
		Hint: fmt.Sprintf("move the stage %q above the stage %q", n.stage.label(), s.label()),
	}
}

// label returns the stage's name, or one made of its number.
func (s *Stage) label() string {
	if s.Name != "" {
		return s.Name
	}
	return fmt.Sprintf("stage-%d", s.Index)
}

// Title returns the text that stands for the base in progress: "FROM docker.io/library/busybox:latest".
func (s *Stage) Title() string {
	switch {
	case s.replaced:
		return "FROM " + s.Base.Name
	case s.Base.Stage != nil, s.context, s.BaseText == scratch:
		return "FROM " + s.BaseText
	}
	named, err := reference.Parse(s.BaseText)
	if err != nil {
		return "FROM " + s.BaseText
	}
	return "FROM " + named.Tagged().String()
}

// Start returns the config before the first step, given the base's: the base's triggers are gone, PATH is set.
func (s *Stage) Start(base Config) Config {
	c := base
	c.OnBuild = nil
	if s.Base.Name == scratch || s.context && emptyConfig(base) {
		c.WorkingDir = "/"
	}
	if !slices.ContainsFunc(c.Env, func(kv string) bool { return strings.HasPrefix(kv, "PATH=") }) {
		c.Env = append(slices.Clone(c.Env), "PATH="+defaultPath)
	}
	if c.WorkingDir != "" && !strings.HasPrefix(c.WorkingDir, "/") {
		c.WorkingDir = joinDir("/", c.WorkingDir)
	}
	return c
}

func emptyConfig(c Config) bool {
	return len(c.Env) == 0 && len(c.Cmd) == 0 && len(c.Entrypoint) == 0 && c.WorkingDir == "" && c.User == "" &&
		len(c.Labels) == 0 && len(c.OnBuild) == 0
}

// End returns the stage's final config: that of the last step, or that of a stage without steps.
func (s *Stage) End(base Config, steps []Step) Config {
	if len(steps) > 0 {
		return steps[len(steps)-1].Config
	}
	return s.withLabels(s.Start(base))
}

// withLabels adds the caller's labels if this is the target.
func (s *Stage) withLabels(c Config) Config {
	target, err := s.file.target(s.file.args.Target)
	if err != nil || target != s || len(s.file.args.Labels) == 0 {
		return c
	}
	labels := make(map[string]string, len(c.Labels)+len(s.file.args.Labels))
	for k, v := range c.Labels {
		labels[k] = v
	}
	for k, v := range s.file.args.Labels {
		labels[k] = v
	}
	c.Labels = labels
	return c
}

// Steps returns the steps of the stage on a base with this config, the base's ONBUILD triggers first. For a base that
// is a stage, base is that stage's final config (see [Stage.End]); for scratch it is the zero Config. Operations of
// triggers may refer to stages that are not in Needs; they always stand above this one.
func (s *Stage) Steps(base Config, p ocispec.Platform) ([]Step, error) {
	if p.OS == "windows" {
		return nil, s.Locate(errors.New("images for windows are not supported"))
	}
	st := s.newState(base)
	var steps []Step
	add := func(n *parser.Node, trigger bool) error {
		step, err := st.step(n, trigger)
		steps = append(steps, step)
		return tellWarnings(err, steps)
	}
	for _, text := range base.OnBuild {
		if s.replaced {
			break
		}
		n, err := s.parseTrigger(text, s.from)
		if err != nil {
			return nil, tellWarnings(err, steps)
		}
		if err := add(n, true); err != nil {
			return nil, err
		}
	}
	for _, n := range s.nodes {
		if err := add(n, false); err != nil {
			return nil, err
		}
	}
	if n := len(steps); n > 0 {
		steps[n-1].Config = s.withLabels(steps[n-1].Config)
	}
	return steps, nil
}

// tellWarnings puts into err what the checks found in steps, of which the last one is wrong.
func tellWarnings(err error, steps []Step) error {
	var e *Error
	if errors.As(err, &e) {
		for _, st := range steps {
			e.Warnings = append(e.Warnings, st.Warnings...)
		}
	}
	return err
}

// parseTrigger parses the text of an ONBUILD; its place is where.
func (s *Stage) parseTrigger(text string, where []parser.Range) (*parser.Node, error) {
	start, end := lines(where)
	tree, err := parser.Parse(strings.NewReader(text))
	if err == nil && len(tree.AST.Children) != 1 {
		err = errors.New("an ONBUILD trigger is a single instruction")
	}
	var n *parser.Node
	if err == nil {
		n = tree.AST.Children[0]
		n.StartLine, n.EndLine = start, end
		_, err = parseNode(n, s.file.quiet())
	}
	if err != nil {
		return nil, &Error{
			File: s.file.Name, Ranges: ranges(where), Source: s.file.lines,
			Err: fmt.Errorf("ONBUILD trigger %.80q: %w", text, settle(err)),
		}
	}
	return n, nil
}

// parseNode parses one instruction that is no FROM.
func parseNode(n *parser.Node, lint *linter.Linter) (instructions.Command, error) {
	v, err := instructions.ParseInstructionWithLinter(n, lint)
	if err != nil {
		return nil, err
	}
	c, ok := v.(instructions.Command)
	if !ok {
		return nil, fmt.Errorf("%s cannot stand here", strings.ToUpper(n.Value))
	}
	return c, nil
}

// validate runs the instructions that hold no variables on an empty base, to find what is wrong in any case.
func (s *Stage) validate() error {
	// Deep enough that no sane relative path leaves it: the true directory is not known yet.
	var empty Config
	empty.WorkingDir = "/1/2/3/4/5/6/7/8"
	st := s.newState(empty)
	for _, n := range s.nodes {
		text := n.Original
		if strings.EqualFold(n.Value, "run") {
			text = strings.Join(n.Flags, " ")
		}
		if strings.Contains(text, "$") {
			continue
		}
		st.config = empty
		if _, err := st.step(n, false); err != nil {
			return err
		}
	}
	return nil
}

// state is what changes from step to step.
type state struct {
	stage    *Stage
	file     *File
	config   Config
	vars     *env // environment and arguments together, as words and commands see them
	size     int  // bytes of text made so far
	held     int  // entries of lists in the configs made so far
	lint     *linter.Linter
	warnings []Warning
	set      map[string][]parser.Range // where this stage set CMD, ENTRYPOINT, HEALTHCHECK
	trigger  bool
}

func (s *Stage) newState(base Config) *state {
	st := &state{stage: s, file: s.file, config: s.Start(base), vars: newEnv(), set: map[string][]parser.Range{}}
	for _, a := range base.Args {
		if a.Value != nil && exported(a.Name) {
			st.vars.set(a.Name, *a.Value)
		}
	}
	for _, kv := range st.config.Env {
		k, v, _ := strings.Cut(kv, "=")
		st.vars.set(k, v)
	}
	return st
}

// step resolves one instruction and takes its effect on the config. After an error the step holds the warnings.
func (st *state) step(n *parser.Node, trigger bool) (Step, error) {
	st.warnings, st.trigger = nil, trigger
	st.lint = st.file.linter(&st.warnings).WithMergedConfigFromComments(n.PrevComment)
	cmd, err := parseNode(n, st.file.quiet())
	if err != nil {
		return Step{}, st.file.at(err, n.Location())
	}
	step := Step{Text: upperFirst(cmd.(fmt.Stringer).String())}
	step.Start, step.End = lines(n.Location())
	err = st.do(cmd, &step)
	step.Warnings = st.warnings
	if err == nil {
		err = st.grow(len(step.Text) + len(step.History))
	}
	if err == nil && st.held > maxHeld {
		err = errors.New("the variables, labels or ports of this stage are too many")
	}
	if err != nil {
		return step, st.file.at(err, n.Location())
	}
	if trigger {
		step.Text = "ONBUILD " + step.Text
	}
	step.Config = st.config
	return step, nil
}

func (st *state) do(cmd instructions.Command, step *Step) error {
	froms, err := st.origins(cmd) // before expansion: from= is taken literally
	if err != nil {
		return err
	}
	if err := st.expandWords(cmd); err != nil {
		return err
	}
	switch c := cmd.(type) {
	case *instructions.RunCommand:
		return st.run(c, froms, step)
	case *instructions.CopyCommand:
		return st.copy(c, froms, step)
	case *instructions.AddCommand:
		return st.add(c, step)
	case *instructions.WorkdirCommand:
		st.workdir(c, step)
		return nil
	case *instructions.ArgCommand:
		return st.arg(c, step)
	}
	step.History, err = st.configure(cmd)
	return err
}

// origins returns what each --from of an instruction means; a stage must stand above.
func (st *state) origins(cmd instructions.Command) ([]Ref, error) {
	var out []Ref
	switch c := cmd.(type) {
	case *instructions.CopyCommand:
		if c.From == "" {
			return []Ref{{}}, nil
		}
		ref, err := st.file.copyOrigin(c.From)
		if err != nil {
			return nil, err
		}
		out = append(out, ref)
	case *instructions.RunCommand:
		for _, m := range instructions.GetMounts(c) {
			if m.From == "" {
				out = append(out, Ref{})
				continue
			}
			ref, err := st.file.origin(m.From)
			if err != nil {
				return nil, err
			}
			out = append(out, ref)
		}
	}
	for _, r := range out {
		if r.Stage != nil && r.Stage.Index >= st.stage.Index {
			return nil, st.stage.forward(need{stage: r.Stage, verb: "take files"})
		}
	}
	return out, nil
}

// expandWords expands variables in an instruction, all of them as they were before it. ARG sees to it by itself.
func (st *state) expandWords(cmd instructions.Command) error {
	if ex, ok := cmd.(instructions.SupportsSingleWordExpansion); ok {
		if _, isArg := cmd.(*instructions.ArgCommand); !isArg {
			lex := sync.OnceValue(st.file.lex) // large, and most RUN have no word for it
			if err := ex.Expand(func(w string) (string, error) { return st.expand(lex(), w, cmd.Location()) }); err != nil {
				return err
			}
		}
	}
	if ex, ok := cmd.(instructions.SupportsSingleWordExpansionRaw); ok {
		lex := newLexer('\\') // the escape directive does not reach into here-documents
		lex.SkipProcessQuotes = true
		return ex.ExpandRaw(func(w string) (string, error) { return st.expand(lex, w, cmd.Location()) })
	}
	return nil
}

func (st *state) expand(lex lexer, word string, where []parser.Range) (string, error) {
	res, err := lex.expand(word, st.vars)
	st.checkUnmatched(word, res.Unmatched, where)
	if err != nil {
		return "", err
	}
	return res.Result, st.grow(len(res.Result))
}

func (st *state) grow(n int) error {
	if st.size += n; st.size > maxStage {
		return fmt.Errorf("the variables of this stage make more than %d bytes of text", maxStage)
	}
	return nil
}

// title returns the text of an instruction with its variables filled in, as far as that works.
func (st *state) title(lex lexer, text string, vars shell.EnvGetter) string {
	res, err := lex.expand(text, vars)
	if err != nil || len(res.Result) > maxWord {
		return upperFirst(text)
	}
	return upperFirst(res.Result)
}

func upperFirst(text string) string {
	first, rest, ok := strings.Cut(text, " ")
	if !ok {
		return strings.ToUpper(first)
	}
	return strings.ToUpper(first) + " " + rest
}
