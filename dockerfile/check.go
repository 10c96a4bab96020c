package dockerfile

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/moby/buildkit/util/suggest"
	"github.com/moby/patternmatcher"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer/registry/reference"
)

// Severity says what a warning does to a build.
type Severity string

// A warning is an error where the file or the caller asks for it with error=true.
const (
	SeverityWarning Severity = "warning"
	SeverityError   Severity = "error"
)

// Warning is what a build check found.
type Warning struct {
	Rule     string // name of the check: "StageNameCasing"
	Message  string // what is wrong here
	Detail   string // what the check is about
	URL      string // where to read more; "" for nowhere
	Severity Severity
	Ranges   []Range
}

// readDirectives reads the parser directives check and syntax, or the build arguments that replace them.
// (escape is the parser's business.)
func (f *File) readDirectives(text []byte) error {
	options, _, where, _ := parser.ParseDirective("check", text)
	if given, ok := f.args.Build[checkArg]; ok {
		options, where = given, nil
	}
	config, err := linter.ParseLintOptions(options)
	if err != nil {
		return f.at(fmt.Errorf("parse check options: %w", err), where)
	}
	f.check = *config
	f.noteRules(append(slices.Clone(config.SkipRules), config.ExperimentalRules...))
	syntax, _, _, _ := parser.DetectSyntax(text)
	if given := f.args.Build["BUILDKIT_SYNTAX"]; given != "" {
		syntax = given
	}
	if syntax != "" && !builtIn().MatchString(syntax) {
		f.Notes = append(f.Notes, fmt.Sprintf("syntax %s is not known here: the built-in one is used", syntax))
	}
	return nil
}

var builtIn = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^(dockerfile\.v0|(docker\.io/)?docker/dockerfile(-upstream)?([:@].*)?)$`)
})

// FailOnWarnings says whether a warning stops the build.
func (f *File) FailOnWarnings() bool { return f.check.ReturnAsError }

// Violation returns the error that warnings are where they stop the build, else nil.
func (f *File) Violation(found []Warning) error {
	if !f.check.ReturnAsError || len(found) == 0 {
		return nil
	}
	rules := map[string]bool{}
	for _, w := range found {
		rules[w.Rule] = true
	}
	err := fmt.Errorf("lint violation found for rules: %s", strings.Join(sortedKeys(rules), ", "))
	return f.place(err, found[0].Ranges)
}

// linter returns BuildKit's linter with this file's options; what it finds is appended to found.
func (f *File) linter(found *[]Warning) *linter.Linter {
	config := f.check
	severity := SeverityWarning
	if config.ReturnAsError {
		severity = SeverityError
	}
	config.Warn = func(rule, detail, url, message string, where []parser.Range) {
		*found = append(*found, Warning{rule, message, detail, url, severity, ranges(where)})
	}
	return linter.New(&config)
}

// quiet returns a linter that finds nothing, for a second look at an instruction.
func (f *File) quiet() *linter.Linter { return linter.New(&linter.Config{}) }

// Walk computes the steps of stages, each after those it needs, without running anything. base returns the config of
// a base that is no stage. visit sees every stage with its steps and final config.
func (f *File) Walk(stages []*Stage, p ocispec.Platform, base func(*Stage) (Config, error), visit func(*Stage, []Step) error) error {
	final := make(map[*Stage]Config, len(stages))
	for _, s := range stages {
		var start Config
		var err error
		switch {
		case s.Base.Stage != nil:
			start = final[s.Base.Stage]
		case s.Base.Name != scratch:
			if start, err = base(s); err != nil {
				return s.Locate(err)
			}
		}
		steps, err := s.Steps(start, p)
		if err != nil {
			return err
		}
		final[s] = s.End(start, steps)
		if err := visit(s, steps); err != nil {
			return err
		}
	}
	return nil
}

// Check returns everything that the build checks find in the file and in these stages, by line; also with an error, which
// then is about something else.
func (f *File) Check(stages []*Stage, p ocispec.Platform, base func(*Stage) (Config, error)) ([]Warning, error) {
	found := slices.Clone(f.Warnings)
	err := f.Walk(stages, p, base, func(_ *Stage, steps []Step) error {
		for _, st := range steps {
			found = append(found, st.Warnings...)
		}
		return nil
	})
	var e *Error
	if errors.As(err, &e) {
		found = append(found, e.Warnings...)
	}
	slices.SortStableFunc(found, func(a, b Warning) int { return firstLine(a) - firstLine(b) })
	return found, err
}

func firstLine(w Warning) int {
	if len(w.Ranges) == 0 {
		return 0
	}
	return w.Ranges[0].Start
}

// CheckPlatform tells whether the base image is for another platform than asked for.
func (s *Stage) CheckPlatform(want, got ocispec.Platform) []Warning {
	if want.OS == got.OS && want.Architecture == got.Architecture {
		return nil
	}
	var found []Warning
	msg := linter.RuleInvalidBaseImagePlatform.Format(s.BaseText,
		platforms.FormatAll(platforms.Normalize(want)), platforms.FormatAll(platforms.Normalize(got)))
	s.file.linter(&found).Run(&linter.RuleInvalidBaseImagePlatform, s.from, msg)
	return found
}

func checkStageNames(stages []instructions.Stage, lint *linter.Linter) {
	seen := map[string]bool{}
	for _, s := range stages {
		if s.Name == "" {
			continue
		}
		if s.Name == "context" || s.Name == scratch {
			lint.Run(&linter.RuleReservedStageName, s.Location, linter.RuleReservedStageName.Format(s.Name))
		}
		if seen[s.Name] {
			lint.Run(&linter.RuleDuplicateStageName, s.Location, linter.RuleDuplicateStageName.Format(s.Name))
		}
		seen[s.Name] = true
	}
}

// checkCasing reports instructions that are not written as most of the file is: all lower case, or all upper case.
func checkCasing(stages []instructions.Stage, lint *linter.Linter) {
	type word struct {
		text  string
		where []parser.Range
	}
	var words []word
	for _, s := range stages {
		words = append(words, word{s.OrigCmd, s.Location})
		for _, c := range s.Commands {
			words = append(words, word{c.Name(), c.Location()})
		}
	}
	balance := 0
	for _, w := range words {
		switch w.text {
		case strings.ToLower(w.text):
			balance--
		case strings.ToUpper(w.text):
			balance++
		}
	}
	want, name := strings.ToUpper, "uppercase"
	if balance < 0 {
		want, name = strings.ToLower, "lowercase"
	}
	for _, w := range words {
		if want(w.text) != w.text {
			lint.Run(&linter.RuleConsistentInstructionCasing, w.where, linter.RuleConsistentInstructionCasing.Format(w.text, name))
		}
	}
}

// checkDefaultBases reports bases that are no image names unless build arguments are given.
func (f *File) checkDefaultBases(stages []instructions.Stage, predefined *env, metaArgs []instructions.ArgCommand, lint *linter.Linter) {
	vars, _, err := f.globalArgs(predefined, metaArgs, nil)
	if err != nil {
		return // the same error comes again, where it counts
	}
	for _, s := range stages {
		word, err := f.lex().expand(s.BaseName, vars)
		if err != nil {
			return
		}
		if _, err := reference.Parse(word.Result); err != nil {
			lint.Run(&linter.RuleInvalidDefaultArgInFrom, s.Location, linter.RuleInvalidDefaultArgInFrom.Format(s.BaseName))
		}
	}
}

// checkFromArgs reports variables in FROM that nothing declares.
func (f *File) checkFromArgs(text string, word shell.ProcessWordResult, where []parser.Range, lint *linter.Linter) {
	names := slices.Clone(f.global.Keys())
	for _, k := range sortedKeys(f.declared) {
		if _, ok := f.global.Get(k); !ok {
			names = append(names, k)
		}
	}
	for _, k := range bare(text, word.Unmatched) {
		if slices.Contains(names, k) {
			continue
		}
		near, _ := suggest.Search(k, names, true)
		lint.Run(&linter.RuleUndefinedArgInFrom, where, linter.RuleUndefinedArgInFrom.Format(k, near))
	}
}

// checkPlatformFlag reports a --platform in FROM that is the default anyway, or a constant.
func checkPlatformFlag(st instructions.Stage, word shell.ProcessWordResult, vars *env, lint *linter.Linter) {
	const target = "TARGETPLATFORM"
	if _, ok := word.Matched[target]; ok && len(word.Matched) == 1 && len(word.Unmatched) == 0 {
		if v, _ := vars.Get(target); v == word.Result {
			lint.Run(&linter.RuleRedundantTargetPlatform, st.Location, linter.RuleRedundantTargetPlatform.Format(st.Platform))
		}
	}
	if len(word.Matched) > 0 || len(word.Unmatched) > 0 {
		return
	}
	p, err := platforms.Parse(word.Result)
	if err != nil || strings.Contains(st.Name, p.OS) || strings.Contains(st.Name, p.Architecture) {
		return
	}
	lint.Run(&linter.RuleFromPlatformFlagConstDisallowed, st.Location, linter.RuleFromPlatformFlagConstDisallowed.Format(word.Result))
}

// checkUnmatched reports variables that are neither set nor declared.
func (st *state) checkUnmatched(word string, unmatched map[string]struct{}, where []parser.Range) {
	for _, k := range bare(word, unmatched) {
		declared := slices.ContainsFunc(st.config.Args, func(a Arg) bool { return a.Name == k })
		if declared || !exported(k) {
			continue
		}
		near, _ := suggest.Search(k, st.vars.Keys(), true)
		st.lint.Run(&linter.RuleUndefinedVar, where, linter.RuleUndefinedVar.Format(k, near))
	}
}

var variable = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`\$(?:(\w+)|\{(\w+)(:?[-+?])?)`)
})

// bare returns which of the unmatched variables of a word stand anywhere in it without a default or an alternative,
// in the order of their names. Where they have one, not being set is nothing to warn of (BuildKit does).
func bare(word string, unmatched map[string]struct{}) []string {
	const most = 100 // nobody reads more, and looking for near names takes time
	used := map[string]bool{}
	for _, m := range variable().FindAllStringSubmatch(word, -1) {
		name := m[1] + m[2]
		if _, ok := unmatched[name]; ok && m[3] == "" {
			used[name] = true
		}
	}
	names := sortedKeys(used)
	return names[:min(len(names), most)]
}

func (st *state) checkKeyValue(c instructions.Command, kv instructions.KeyValuePair) {
	if kv.NoDelim {
		where := c.Location()
		st.lint.Run(&linter.RuleLegacyKeyValueFormat, where, linter.RuleLegacyKeyValueFormat.Format(c.Name()))
	}
}

var (
	secretWord = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`(?i)(^|_)(apikey|auth|credentials?|key|password|pword|passwd|secret|token)(_|$)`)
	})
	publicWord = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`(?i)(^|_)(public|file|version)(_|$)`)
	})
)

// checkSecretName reports variables that look as if they held a secret: they end up in the image or its history.
func checkSecretName(instruction, name string, where []parser.Range, lint *linter.Linter) {
	if secretWord().MatchString(name) && !publicWord().MatchString(name) {
		lint.Run(&linter.RuleSecretsUsedInArgOrEnv, where, linter.RuleSecretsUsedInArgOrEnv.Format(instruction, name))
	}
}

// ignore is the ignore file of the main context.
type ignore struct {
	matcher *patternmatcher.PatternMatcher
	all     bool // it excludes everything
}

// newIgnore returns nil where no check is possible: with exceptions a directory may be excluded and a file in it not.
func newIgnore(patterns []string) (*ignore, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, fmt.Errorf("parse the ignore file: %w", err)
	}
	if m.Exclusions() {
		return nil, nil
	}
	ig := &ignore{matcher: m}
	for _, p := range m.Patterns() {
		ig.all = ig.all || slices.Contains([]string{"*", "**", "**/*"}, p.String())
	}
	return ig, nil
}

// checkIgnored reports sources that the ignore file excludes.
func (st *state) checkIgnored(verb string, sources []string, c instructions.Command) {
	if st.file.ignore == nil {
		return
	}
	for _, src := range sources {
		src = path.Clean(src)
		if (src == "." || src == "/") && !st.file.ignore.all {
			continue
		}
		if ok, err := st.file.ignore.matcher.MatchesOrParentMatches(src); err == nil && ok {
			st.lint.Run(&linter.RuleCopyIgnoredFile, c.Location(), linter.RuleCopyIgnoredFile.Format(verb, src))
		}
	}
}

// ruleNames are the checks that skip= and experimental= may name.
var ruleNames = []string{
	linter.RuleStageNameCasing.Name, linter.RuleFromAsCasing.Name, linter.RuleNoEmptyContinuation.Name,
	linter.RuleConsistentInstructionCasing.Name, linter.RuleDuplicateStageName.Name, linter.RuleReservedStageName.Name,
	linter.RuleJSONArgsRecommended.Name, linter.RuleMaintainerDeprecated.Name, linter.RuleUndefinedArgInFrom.Name,
	linter.RuleWorkdirRelativePath.Name, linter.RuleUndefinedVar.Name, linter.RuleMultipleInstructionsDisallowed.Name,
	linter.RuleLegacyKeyValueFormat.Name, linter.RuleInvalidBaseImagePlatform.Name, linter.RuleRedundantTargetPlatform.Name,
	linter.RuleSecretsUsedInArgOrEnv.Name, linter.RuleInvalidDefaultArgInFrom.Name,
	linter.RuleFromPlatformFlagConstDisallowed.Name, linter.RuleCopyIgnoredFile.Name,
	linter.RuleInvalidDefinitionDescription.Name, linter.RuleExposeProtoCasing.Name, linter.RuleExposeInvalidFormat.Name,
}

func (f *File) noteRules(rules []string) {
	for _, r := range rules {
		if r == "" || slices.Contains(ruleNames, r) {
			continue
		}
		err := suggest.WrapError(fmt.Errorf("there is no build check %s", r), r, ruleNames, true)
		f.Notes = append(f.Notes, err.Error())
	}
}

// note remarks on build arguments that nothing declares: most often they are misspelt.
func (f *File) note(metaArgs []instructions.ArgCommand, stages []instructions.Stage) {
	declared := slices.Clone(f.global.Keys())
	for _, c := range metaArgs {
		for _, a := range c.Args {
			declared = append(declared, a.Key)
		}
	}
	for _, s := range stages {
		for _, c := range s.Commands {
			if c, ok := c.(*instructions.ArgCommand); ok {
				for _, a := range c.Args {
					declared = append(declared, a.Key)
				}
			}
		}
	}
	for _, k := range sortedKeys(f.args.Build) {
		if slices.Contains(declared, k) || k == epochArg || strings.HasPrefix(k, "BUILDKIT_") || isProxy(k) {
			continue
		}
		err := suggest.WrapError(fmt.Errorf("build argument %s is given, but no ARG declares it", k), k, declared, true)
		f.Notes = append(f.Notes, err.Error())
	}
}

func isProxy(name string) bool {
	return slices.Contains([]string{"http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"}, strings.ToLower(name))
}
