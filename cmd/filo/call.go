package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/util/suggest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/image"
	"filo/dockerfile"
)

// call is what --call asks for.
type call struct {
	method string
	json   bool
}

// method is a question that --call may ask.
type method struct {
	Name        string `json:"name"`
	Version     string `json:"version"`
	Description string `json:"description"`
}

// methods are what --call knows, with BuildKit's versions of its answers.
var methods = []method{
	{"outline", "1.0.0", "list build arguments, secrets, ssh agents and caches of the target"},
	{"targets", "1.0.0", "list the targets of the Dockerfile"},
	{"lint", "1.0.0", "check the Dockerfile"},
}

// parseCall reads --call and --check.
func (f *whatFlags) parseCall() (call, error) {
	name, rest, more := strings.Cut(f.call, ",")
	if f.check {
		name = "check"
	}
	c := call{method: name}
	switch name {
	case "", "build":
		c.method = "build"
	case "check", "lint":
		c.method = "check"
	case "outline", "targets", "subrequests.describe":
	default:
		known := []string{"build", "check", "outline", "targets", "subrequests.describe"}
		err := fmt.Errorf("--call=%s: not supported, must be one of %s", name, strings.Join(known, ", "))
		return c, suggest.WrapError(err, name, known, true)
	}
	switch {
	case !more, rest == "format=text":
	case rest == "format=json":
		c.json = true
	default:
		return c, fmt.Errorf("--call %q: want format=text or format=json", rest)
	}
	return c, nil
}

// errFound says that a check found something; the findings have been shown.
var errFound = errors.New("the check found something")

// call answers a question about the Dockerfile instead of building it. The answer goes to standard output.
func (j *job) call(ctx context.Context, c call) error {
	var out bytes.Buffer
	var err error
	if c.method == "subrequests.describe" {
		err = describe(&out, c.json)
	} else {
		err = j.ask(ctx, &out, c)
	}
	j.display.Close()
	_, werr := io.Copy(j.stdout, &out) // with an error: what was found before it
	return errors.Join(err, werr)
}

func describe(w io.Writer, asJSON bool) error {
	if asJSON {
		return printJSON(w, methods)
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "NAME\tVERSION\tDESCRIPTION")
	for _, m := range methods {
		fmt.Fprintf(t, "%s\t%s\t%s\n", m.Name, m.Version, m.Description)
	}
	return t.Flush()
}

// ask reads the Dockerfile for the first platform and answers.
func (j *job) ask(ctx context.Context, w io.Writer, c call) error {
	p := platforms.Normalize(platforms.DefaultSpec())
	build := p
	if len(j.req.Platforms) > 0 {
		p = j.req.Platforms[0]
	}
	var names []string
	for n := range j.req.Named {
		names = append(names, n)
	}
	f, err := dockerfile.Parse(bytes.NewReader(j.req.File), dockerfile.Args{
		Name: j.req.FileName, Build: j.req.Args, Labels: j.req.Labels, Target: j.req.Target, Epoch: j.req.Epoch,
		BuildPlatform: build, TargetPlatform: p, Contexts: names, Ignore: j.req.Ignore,
	})
	if err != nil {
		var where *dockerfile.Error
		var found []dockerfile.Warning
		if errors.As(err, &where) {
			found = where.Warnings
		}
		return j.broken(w, c, found, err)
	}
	if c.method == "targets" {
		return j.targets(w, f, c.json)
	}
	stages, err := f.Plan(j.req.Target)
	if err != nil {
		return j.broken(w, c, f.Warnings, err)
	}
	var wrong []dockerfile.Warning
	base := j.bases(ctx, p, &wrong)
	if c.method == "outline" {
		o, err := f.Outline(stages, p, base)
		if err != nil {
			return err
		}
		return j.outline(w, o, c.json)
	}
	if j.req.Target == "" { // everything is looked at, also what a build would leave out
		stages = f.Stages
	}
	found, err := f.Check(stages, p, base)
	found = append(wrong, found...)
	if err != nil {
		return j.broken(w, c, found, err)
	}
	return j.findings(w, found, c.json)
}

// bases returns how to get the config of a base image, each one once. Images for another platform are added to wrong.
func (j *job) bases(ctx context.Context, p ocispec.Platform, wrong *[]dockerfile.Warning) func(*dockerfile.Stage) (dockerfile.Config, error) {
	known := map[string]dockerfile.Config{}
	return func(s *dockerfile.Stage) (dockerfile.Config, error) {
		want := p
		if s.Platform != nil {
			want = *s.Platform
		}
		key := s.Base.Name + " " + platforms.FormatAll(want)
		if c, ok := known[key]; ok {
			return c, nil
		}
		img, err := j.base(ctx, s.Base.Name, want)
		if err != nil || img == nil {
			return dockerfile.Config{}, err
		}
		*wrong = append(*wrong, s.CheckPlatform(want, image.Platform(img.Config))...)
		known[key] = dockerfile.Config{DockerOCIImageConfig: img.Config.Config, Author: img.Config.Author}
		return known[key], nil
	}
}

// base reads the image of a name; nil if it is a context without one.
func (j *job) base(ctx context.Context, name string, p ocispec.Platform) (img *image.Image, err error) {
	if n, ok := j.req.Named[name]; ok {
		if n.Image == nil {
			return nil, nil
		}
		return n.Image(ctx, p)
	}
	mode := image.PullCurrent
	if j.req.Pull {
		mode = image.PullAlways
	}
	err = j.task("[internal] load metadata for "+name, func(func(string)) error {
		img, err = image.Pull(ctx, j.store, j.registry, name, p, mode)
		return err
	})
	return img, err
}

// The shapes of BuildKit's answers.
type (
	lintResult struct {
		Warnings []lintWarning `json:"warnings"`
		Sources  []sourceInfo  `json:"sources"`
		Error    *buildError   `json:"buildError,omitempty"`
	}
	lintWarning struct {
		Rule        string   `json:"ruleName"`
		Description string   `json:"description,omitempty"`
		URL         string   `json:"url,omitempty"`
		Detail      string   `json:"detail,omitempty"`
		Location    location `json:"location"`
	}
	buildError struct {
		Message  string   `json:"message"`
		Location location `json:"location"`
	}
	sourceInfo struct {
		Filename string `json:"filename"`
		Language string `json:"language,omitempty"`
		Data     []byte `json:"data"`
	}
	location struct {
		SourceIndex int         `json:"sourceIndex"`
		Ranges      []lineRange `json:"ranges"`
	}
	lineRange struct {
		Start linePos `json:"start"`
		End   linePos `json:"end"`
	}
	linePos struct {
		Line int `json:"line"`
	}
)

func at(ranges []dockerfile.Range) location {
	l := location{Ranges: []lineRange{}}
	for _, r := range ranges {
		l.Ranges = append(l.Ranges, lineRange{linePos{r.Start}, linePos{r.End}})
	}
	return l
}

func (j *job) sources() []sourceInfo {
	return []sourceInfo{{Filename: j.req.FileName, Language: "Dockerfile", Data: j.req.File}}
}

// broken answers with what was found before err. An answer in JSON holds the error too; otherwise it is shown like any
// other.
func (j *job) broken(w io.Writer, c call, found []dockerfile.Warning, err error) error {
	if c.method != "check" {
		return err
	}
	if !c.json {
		j.printWarnings(w, found)
		return err
	}
	e := &buildError{Message: err.Error(), Location: at(nil)}
	var where *dockerfile.Error
	if errors.As(err, &where) {
		e.Location = at(where.Ranges)
	}
	if err := printJSON(w, lintResult{Warnings: lintWarnings(found), Sources: j.sources(), Error: e}); err != nil {
		return err
	}
	return errFound
}

func lintWarnings(found []dockerfile.Warning) []lintWarning {
	out := []lintWarning{}
	for _, f := range found {
		out = append(out, lintWarning{f.Rule, f.Detail, f.URL, f.Message, at(f.Ranges)})
	}
	return out
}

// findings prints what a check found.
func (j *job) findings(w io.Writer, found []dockerfile.Warning, asJSON bool) error {
	if asJSON {
		if err := printJSON(w, lintResult{Warnings: lintWarnings(found), Sources: j.sources()}); err != nil {
			return err
		}
	} else {
		j.printFindings(w, found)
	}
	if len(found) > 0 {
		return errFound
	}
	return nil
}

func (j *job) printWarnings(w io.Writer, found []dockerfile.Warning) {
	lines := strings.Split(string(j.req.File), "\n")
	for _, f := range found {
		url := ""
		if f.URL != "" {
			url = " - " + f.URL
		}
		fmt.Fprintf(w, "\nWARNING: %s%s\n%s\n%s", f.Rule, url, f.Message, dockerfile.Excerpt(j.req.FileName, lines, f.Ranges))
	}
}

func (j *job) printFindings(w io.Writer, found []dockerfile.Warning) {
	j.printWarnings(w, found)
	switch len(found) {
	case 0:
		fmt.Fprintln(w, "Check complete, no warnings found.")
	case 1:
		fmt.Fprintln(w, "\nCheck complete, 1 warning has been found!")
	default:
		fmt.Fprintf(w, "\nCheck complete, %d warnings have been found!\n", len(found))
	}
}

// outline prints what a target can be given.
func (j *job) outline(w io.Writer, o dockerfile.Outline, asJSON bool) error {
	if asJSON {
		return printJSON(w, j.outlineJSON(o))
	}
	t := tabwriter.NewWriter(w, 0, 0, 4, ' ', 0)
	if o.Name != "" || o.Description != "" {
		fmt.Fprintf(t, "TARGET:\t%s\n", o.Name)
		if o.Description != "" {
			fmt.Fprintf(t, "DESCRIPTION:\t%s\n", o.Description)
		}
		fmt.Fprintln(t)
	}
	if len(o.Args) > 0 {
		fmt.Fprintln(t, "BUILD ARG\tVALUE\tDESCRIPTION")
		for _, a := range o.Args {
			fmt.Fprintf(t, "%s\t%s\t%s\n", a.Name, value(a), a.Description)
		}
		fmt.Fprintln(t)
	}
	for _, list := range []struct {
		title string
		all   []dockerfile.Input
	}{{"SECRET", o.Secrets}, {"SSH", o.SSH}, {"CACHE", o.Caches}} {
		if len(list.all) == 0 {
			continue
		}
		fmt.Fprintf(t, "%s\tREQUIRED\n", list.title)
		for _, in := range list.all {
			required := ""
			if in.Required {
				required = "true"
			}
			fmt.Fprintf(t, "%s\t%s\n", in.ID, required)
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

func value(a dockerfile.Argument) string {
	if a.Value == nil {
		return ""
	}
	return *a.Value
}

// outlineInput is a build argument, secret, agent or cache in JSON.
type outlineInput struct {
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	Value       *string  `json:"value,omitempty"`
	Required    bool     `json:"required,omitempty"`
	Location    location `json:"location"`
}

func (j *job) outlineJSON(o dockerfile.Outline) any {
	inputs := func(in []dockerfile.Input) []outlineInput {
		var out []outlineInput
		for _, i := range in {
			out = append(out, outlineInput{Name: i.ID, Required: i.Required, Location: at([]dockerfile.Range{{Start: i.Line, End: i.Line}})})
		}
		return out
	}
	var args []outlineInput
	for _, a := range o.Args {
		args = append(args, outlineInput{Name: a.Name, Description: a.Description, Value: a.Value, Location: at([]dockerfile.Range{{Start: a.Line, End: a.Line}})})
	}
	return struct {
		Name        string         `json:"name,omitempty"`
		Description string         `json:"description,omitempty"`
		Args        []outlineInput `json:"args,omitempty"`
		Secrets     []outlineInput `json:"secrets,omitempty"`
		SSH         []outlineInput `json:"ssh,omitempty"`
		Cache       []outlineInput `json:"cache,omitempty"`
		Sources     [][]byte       `json:"sources"`
	}{o.Name, o.Description, args, inputs(o.Secrets), inputs(o.SSH), inputs(o.Caches), [][]byte{j.req.File}}
}

// targetRow is a stage that can be built.
type targetRow struct {
	Name        string   `json:"name,omitempty"`
	Description string   `json:"description,omitempty"`
	Default     bool     `json:"default,omitempty"`
	Base        string   `json:"base,omitempty"`
	Platform    string   `json:"platform,omitempty"`
	Location    location `json:"location"`
}

// targets prints the stages that --target knows: those with a name, and the last one.
func (j *job) targets(w io.Writer, f *dockerfile.File, asJSON bool) error {
	var rows []targetRow
	for i, s := range f.Stages {
		last := i == len(f.Stages)-1
		if s.Name == "" && !last {
			continue
		}
		r := targetRow{Name: s.Name, Description: s.Description, Default: last, Base: s.Written.Base, Platform: s.Written.Platform, Location: at([]dockerfile.Range{{Start: s.Line, End: s.Line}})}
		rows = append(rows, r)
	}
	if asJSON {
		return printJSON(w, struct {
			Targets []targetRow `json:"targets"`
			Sources [][]byte    `json:"sources"`
		}{rows, [][]byte{j.req.File}})
	}
	t := tabwriter.NewWriter(w, 0, 0, 4, ' ', 0)
	fmt.Fprintln(t, "TARGET\tDESCRIPTION")
	for _, r := range rows {
		name := r.Name
		if r.Default {
			name = strings.TrimSpace(name + " (default)")
		}
		fmt.Fprintf(t, "%s\t%s\n", name, r.Description)
	}
	return t.Flush()
}
