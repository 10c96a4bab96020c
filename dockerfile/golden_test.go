package dockerfile

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The conformance cases lie beside the checkout: what BuildKit made of many Dockerfiles. Config and history of an
// image do not depend on running anything, so they are compared here.
const conformance = "../../shared/conformance/open"

type goldenCase struct {
	Name       string
	Args       []string
	Dockerfile string
	Expect     string
	Env        map[string]string
	Contains   []string `json:"error_contains"`
}

type goldenImage struct {
	Config    map[string]any
	CreatedBy []string `json:"created_by"`
	History   []string
	Platform  string
}

func TestGolden(t *testing.T) {
	cases, _ := filepath.Glob(conformance + "/*/*/case.json")
	if len(cases) == 0 {
		t.Skip("no conformance cases at " + conformance)
	}
	compared := 0
	for _, file := range cases {
		dir := filepath.Dir(file)
		name := filepath.Base(filepath.Dir(dir)) + "/" + filepath.Base(dir)
		var c goldenCase
		readJSON(t, file, &c)
		if slices.Contains(c.Args, "--no-cache-filter") || strings.Contains(strings.Join(c.Args, " "), "@DIGEST") {
			continue
		}
		t.Run(name, func(t *testing.T) { compared += compareGolden(t, dir, c) })
	}
	t.Logf("%d images compared", compared)
	if compared < 100 {
		t.Errorf("compared %d images, want at least 100", compared)
	}
}

func compareGolden(t *testing.T, dir string, c goldenCase) int {
	text, err := readDockerfile(dir, c)
	if err != nil {
		t.Skip("no Dockerfile of its own")
	}
	if c.Expect == "error" {
		compareError(t, text, c)
		return 0
	}
	var want struct{ Images []goldenImage }
	readJSON(t, filepath.Join(dir, "golden.json"), &want)
	for _, img := range want.Images {
		args, target := goldenArgs(c.Args)
		if len(want.Images) > 1 || strings.Contains(strings.Join(c.Args, " "), "--platform") {
			args.TargetPlatform = platforms.MustParse(img.Platform)
		}
		got := goldenBuild(t, text, args, target)
		delete(img.Config, "created")
		if v, ok := img.Config["variant"]; ok {
			got.Config["variant"] = v
		}
		if strings.Contains(string(mustJSON(t, img)), "@") {
			continue
		}
		for _, k := range []string{"os", "architecture"} { // the builder's business
			delete(img.Config, k)
			delete(got.Config, k)
		}
		if diff := cmp.Diff(img.Config, got.Config); diff != "" {
			t.Errorf("config (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(img.CreatedBy, got.CreatedBy); diff != "" {
			t.Errorf("created_by (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(img.History, got.History); diff != "" {
			t.Errorf("history (-want +got):\n%s", diff)
		}
	}
	return len(want.Images)
}

// compareError checks the errors that do not need anything to run.
func compareError(t *testing.T, text string, c goldenCase) {
	args, target := goldenArgs(c.Args)
	f, err := Parse(strings.NewReader(text), args)
	if err == nil {
		var plan []*Stage
		if plan, err = f.Plan(target); err == nil {
			_, err = f.Check(plan, args.TargetPlatform, func(s *Stage) (Config, error) { return goldenBase(t, s) })
		}
	}
	if err == nil {
		t.Skip("not an error of the text alone")
	}
	e := err.(*Error)
	for _, want := range c.Contains {
		all := e.Error() + "\n" + e.Excerpt()
		if n, ok := strings.CutPrefix(want, "line:"); ok {
			want = `Dockerfile:` + n
		}
		pattern, ok := strings.CutPrefix(want, "re:")
		if !ok {
			pattern = regexp.QuoteMeta(want)
		}
		if !regexp.MustCompile(pattern).MatchString(all) {
			t.Errorf("error lacks %q:\n%s", want, all)
		}
	}
}

func goldenBuild(t *testing.T, text string, args Args, target string) goldenImage {
	t.Helper()
	f, err := Parse(strings.NewReader(text), args)
	if err != nil {
		t.Fatalf("Parse: %v\n%s", err, err.(*Error).Excerpt())
	}
	plan, err := f.Plan(target)
	if err != nil {
		t.Fatalf("Plan: %v", err)
	}
	history := map[*Stage][]Step{}
	final := map[*Stage]Config{}
	base := func(s *Stage) (Config, error) { return goldenBase(t, s) }
	err = f.Walk(plan, args.TargetPlatform, base, func(s *Stage, steps []Step) error {
		start := final[s.Base.Stage]
		if s.Base.Stage == nil && s.Base.Name != "scratch" {
			start, _ = base(s)
		}
		final[s] = s.End(start, steps)
		history[s] = append(slices.Clone(history[s.Base.Stage]), steps...)
		return nil
	})
	if err != nil {
		t.Fatalf("Walk: %v\n%s", err, err.(*Error).Excerpt())
	}
	last := plan[len(plan)-1]
	root := last
	for root.Base.Stage != nil {
		root = root.Base.Stage
	}
	return goldenForm(t, final[last], history[last], goldenBaseName(root), args.TargetPlatform, root.Platform)
}

// goldenForm is the form in which conform.py keeps an image.
func goldenForm(t *testing.T, c Config, steps []Step, base string, p ocispec.Platform, from *ocispec.Platform) goldenImage {
	var out goldenImage
	inner := map[string]any{}
	if err := json.Unmarshal(mustJSON(t, c.DockerOCIImageConfig), &inner); err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(inner, func(_ string, v any) bool {
		switch v := v.(type) {
		case nil:
			return true
		case string:
			return v == ""
		case bool:
			return !v
		case []any:
			return len(v) == 0
		case map[string]any:
			return len(v) == 0
		}
		return false
	})
	if list, ok := inner["Env"].([]any); ok {
		slices.SortFunc(list, func(a, b any) int { return strings.Compare(a.(string), b.(string)) })
	}
	if c.Author != "" {
		inner["author"] = c.Author
	}
	out.Config = inner
	if b, ok := goldenBases[base]; ok {
		if from != nil {
			p = *from
		}
		if base == "conform/multi" && p.Architecture != "amd64" {
			b.layers = 1
		}
		for i := range b.layers {
			out.CreatedBy = append(out.CreatedBy, fmt.Sprintf("base layer %d of %s", i, base))
			out.History = append(out.History, "base")
		}
		out.CreatedBy = append(out.CreatedBy, "settings of "+base)
		out.History = append(out.History, "settings (no layer)")
	}
	for _, st := range steps {
		if st.History == "" {
			continue
		}
		line := plainHistory(st.History)
		out.CreatedBy = append(out.CreatedBy, line)
		line, _, _ = strings.Cut(line, " ")
		if st.Op == nil {
			line += " (no layer)"
		}
		out.History = append(out.History, line)
	}
	return out
}

var (
	suffix   = regexp.MustCompile(`\s+# \w+$`)
	argsOf   = regexp.MustCompile(`(?s)^(RUN )?\|\d+ .*?(/bin/sh -c |\[?/bin/)`)
	bareRun  = regexp.MustCompile(`^/bin/sh -c `)
	anyFlag  = regexp.MustCompile(` --[a-z-]+(=\S+)?`)
	anyBlank = regexp.MustCompile(`\s+`)
)

func plainHistory(text string) string {
	text = suffix.ReplaceAllString(strings.TrimSpace(text), "")
	text = argsOf.ReplaceAllString(text, "RUN $2")
	text = bareRun.ReplaceAllString(text, "RUN /bin/sh -c ")
	word, _, _ := strings.Cut(text, " ")
	switch word {
	case "HEALTHCHECK", "EXPOSE", "VOLUME", "SHELL", "CMD", "ENTRYPOINT":
		return word
	case "COPY", "ADD":
		text = anyFlag.ReplaceAllString(text, "")
	}
	return strings.TrimSpace(anyBlank.ReplaceAllString(text, " "))
}

type goldenBaseImage struct {
	layers int
	config string
	author string
}

const goldenPath = `"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"`
const goldenPlain = `{"Env":[` + goldenPath + `],"Cmd":["sh"]}`

var goldenBases = map[string]goldenBaseImage{
	"conform/busybox":      {1, goldenPlain, ""},
	"library/conform-tiny": {2, goldenPlain, ""},
	"conform/links":        {2, goldenPlain, ""},
	"conform/layered":      {3, goldenPlain, ""},
	"conform/etc":          {2, goldenPlain, ""},
	"conform/bare":         {1, `{}`, ""},
	"conform/multi":        {2, goldenPlain, ""},
	"conform/armonly":      {1, `{"Env":[` + goldenPath + `]}`, ""},
	"conform/rich": {2, `{"User":"app","WorkingDir":"/srv/app","Entrypoint":["/bin/entry","--flag"],"Cmd":["serve","all"],
		"Env":[` + goldenPath + `,"LANG=C.UTF-8","RICH_EMPTY=","RICH_SPACES=two  words","RICH_PATH=/srv/rich"],
		"ExposedPorts":{"8080/tcp":{},"53/udp":{}},"Volumes":{"/data":{},"/cache dir":{}},
		"Labels":{"org.example.base":"rich","org.example.keep":"yes","empty":""},"StopSignal":"SIGQUIT",
		"Healthcheck":{"Test":["CMD","/bin/true"],"Interval":10000000000,"Retries":4},
		"Shell":["/bin/ash","-e","-c"],"ArgsEscaped":true}`, "conformance <base@example.org>"},
	"conform/onbuild": {1, `{"Env":[` + goldenPath + `],"Cmd":["sh"],"OnBuild":["ENV FROM_TRIGGER=yes",
		"COPY trigger.txt /triggered/","ARG TRIG_ARG=fallback",
		"RUN cat /triggered/trigger.txt > /triggered/copy.txt; echo $TRIG_ARG > /triggered/arg",
		"LABEL onbuild.ran=1","WORKDIR /triggered/wd","USER app"]}`, ""},
	"conform/onbuild-from": {1, `{"Env":[` + goldenPath + `],"Cmd":["sh"],"OnBuild":["COPY --from=assets /asset /from-stage/",
		"RUN --mount=type=bind,from=assets,target=/m /bin/cp /m/asset /from-mount"]}`, ""},
}

// goldenBaseName returns the catalogue's name of what a stage starts from.
func goldenBaseName(s *Stage) string {
	name := strings.TrimPrefix(s.Title(), "FROM ")
	name = strings.TrimPrefix(strings.TrimPrefix(name, "docker.io/"), "127.0.0.1:5000/")
	if s.context {
		name = strings.TrimPrefix(s.Base.Name, "docker-image://")
	}
	name, _, _ = strings.Cut(name, "@")
	name, _, _ = strings.Cut(name, ":")
	return name
}

func goldenBase(t *testing.T, s *Stage) (Config, error) {
	name := goldenBaseName(s)
	b, ok := goldenBases[name]
	if !ok {
		t.Skip("no such base here: " + name)
	}
	if p := s.file.args.TargetPlatform; name == "conform/multi" && s.Platform == nil && p.Architecture != "amd64" {
		only := map[string]string{"arm64": "arm64", "arm": "armv7"}[p.Architecture]
		b.config = `{"Env":[` + goldenPath + `,"ONLY=` + only + `"]}`
	}
	var c Config
	if err := json.Unmarshal([]byte(b.config), &c.DockerOCIImageConfig); err != nil {
		t.Fatalf("base %s: %v", name, err)
	}
	c.Author = b.author
	return c, nil
}

var goldenFill = strings.NewReplacer("@REGISTRY@", "127.0.0.1:5000", "@HTTP@", "http://127.0.0.1:8000")

func goldenArgs(list []string) (Args, string) {
	amd := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	args := Args{Name: "Dockerfile", Build: map[string]string{}, BuildPlatform: amd, TargetPlatform: amd}
	var words []string
	for _, a := range list {
		if flag, value, ok := strings.Cut(a, "="); ok && strings.HasPrefix(a, "--") {
			words = append(words, flag, value)
			continue
		}
		words = append(words, a)
	}
	for i := 0; i+1 < len(words); i++ {
		k, v, _ := strings.Cut(goldenFill.Replace(words[i+1]), "=")
		switch words[i] {
		case "--build-arg":
			args.Build[k] = v
		case "--target":
			args.Target = k
		case "--build-context":
			args.Contexts = append(args.Contexts, k)
		}
	}
	return args, args.Target
}

func readDockerfile(dir string, c goldenCase) (string, error) {
	name := c.Dockerfile
	if name == "" {
		name = "Dockerfile"
	}
	text, err := os.ReadFile(filepath.Join(dir, name))
	return goldenFill.Replace(string(text)), err
}

func readJSON(t *testing.T, file string, into any) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
