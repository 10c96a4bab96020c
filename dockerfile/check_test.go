package dockerfile

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// found returns rule and line of all that the build checks find, of all stages.
func found(t *testing.T, text string, flags ...string) []Warning {
	t.Helper()
	f := parse(t, text, flags...)
	ws, err := f.Check(f.Stages, f.args.TargetPlatform, busybox)
	if err != nil {
		t.Fatalf("Check(%q): %v", text, err)
	}
	return ws
}

func TestCheck(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"FROM busybox\n", ""},
		{"FROM busybox AS Up\n", "StageNameCasing:1"},
		{"FROM busybox as b\n", "FromAsCasing:1"},
		{"from busybox as b\n", ""},
		{"FROM busybox\nRUN a \\\n\n b\n", "NoEmptyContinuation:4"},
		{"FROM busybox\nRUN a \\\n# c\n b\n", ""},
		{"FROM busybox\nRUN a\nrun b\n", "ConsistentInstructionCasing:3"},
		{"from busybox\nrun a\n", ""},
		{"FROM busybox AS a\nFROM busybox AS A\n", "StageNameCasing:2 DuplicateStageName:2"},
		{"FROM busybox AS context\n", "ReservedStageName:1"},
		{"FROM busybox\nENTRYPOINT a b\n", "JSONArgsRecommended:2"},
		{"FROM busybox\nSHELL [\"/bin/sh\",\"-c\"]\nCMD a b\n", ""},
		{"FROM busybox AS a\nSHELL [\"/bin/sh\",\"-c\"]\nFROM a\nCMD a b\n", ""},
		{"FROM busybox\nMAINTAINER x\n", "MaintainerDeprecated:2"},
		{"ARG VERSION=latest\nFROM busybox${VERSIO}\n", "UndefinedArgInFrom:2"},
		{"ARG V\nFROM busybox$V\n", ""},
		{"FROM busybox${q:-}\n", ""},
		{"FROM busybox\nENV A=$PAHT\n", "UndefinedVar:2"},
		{"FROM busybox\nENV A=${q:-1}${r+x}\n", ""},
		{"FROM busybox\nENV A=${q:-1}$q\n", "UndefinedVar:2"},
		{"FROM busybox\nARG q\nENV A=$q\n", ""},
		{"FROM busybox\nWORKDIR a\nWORKDIR b\n", "WorkdirRelativePath:2"},
		{"FROM busybox AS a\nWORKDIR /a\nFROM a\nWORKDIR b\n", ""},
		{"FROM busybox\nCMD [\"a\"]\nCMD [\"b\"]\n", "MultipleInstructionsDisallowed:2"},
		{"FROM busybox\nENV A b\nLABEL c d\n", "LegacyKeyValueFormat:2 LegacyKeyValueFormat:3"},
		{"FROM --platform=$TARGETPLATFORM busybox\n", "RedundantTargetPlatform:1"},
		{"FROM --platform=linux/amd64 busybox AS b\n", "FromPlatformFlagConstDisallowed:1"},
		{"FROM --platform=linux/amd64 busybox AS b_amd64\n", ""},
		{"FROM busybox\nENV DB_PASSWORD=x\nARG apikey\n", "SecretsUsedInArgOrEnv:2 SecretsUsedInArgOrEnv:3"},
		{"FROM busybox\nENV PUBLIC_KEY=x KEYBOARD=y TOKEN_FILE=z\n", ""},
		{"ARG T\nFROM busybox:${T}\n", "InvalidDefaultArgInFrom:2"},
		{"FROM busybox\nEXPOSE 80/TCP\n", "ExposeProtoCasing:2"},
		{"FROM busybox\nEXPOSE 127.0.0.1:80:80\n", "ExposeInvalidFormat:2"},
		{"FROM busybox\nCOPY a.md x /\nCOPY --from=busybox a.md /\n", "CopyIgnoredFile:2"},
		{"# check=experimental=all\n# wrong words\nARG A=1\nFROM busybox\n", "InvalidDefinitionDescription:3"},
		{"# check=skip=StageNameCasing\nFROM busybox AS Up\n", ""},
		{"# check=skip=all\nFROM busybox AS Up\nMAINTAINER x\n", ""},
		{"FROM busybox\n# check=skip=JSONArgsRecommended\nCMD a b\nENTRYPOINT a\n", "JSONArgsRecommended:4"},
		{"FROM busybox AS b\nONBUILD CMD a b\nFROM b\n", "JSONArgsRecommended:3"},
	} {
		args, _ := goldenArgs([]string{"--build-arg", "T=latest"})
		args.Ignore = []string{"*.md"}
		f, err := Parse(strings.NewReader(c.text), args)
		if err != nil {
			t.Errorf("Parse(%q): %v", c.text, err)
			continue
		}
		ws, err := f.Check(f.Stages, args.TargetPlatform, busybox)
		if err != nil {
			t.Errorf("Check(%q): %v", c.text, err)
		}
		var got []string
		for _, w := range ws {
			got = append(got, fmt.Sprintf("%s:%d", w.Rule, w.Ranges[0].Start))
		}
		if diff := cmp.Diff(c.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%q (-want +got):\n%s", c.text, diff)
		}
	}
}

func TestWarningText(t *testing.T) {
	ws := found(t, "FROM busybox\nENV A=$PAHT\n")
	want := Warning{
		Rule: "UndefinedVar", Message: "Usage of undefined variable '$PAHT' (did you mean $PATH?)",
		Detail: "Variables should be defined before their use", Severity: SeverityWarning, Ranges: []Range{{2, 2}},
		URL: "https://docs.docker.com/go/dockerfile/rule/undefined-var/",
	}
	if len(ws) != 1 {
		t.Fatalf("warnings: %v", ws)
	}
	if diff := cmp.Diff(want, ws[0]); diff != "" {
		t.Errorf("warning (-want +got):\n%s", diff)
	}
}

func TestViolation(t *testing.T) {
	f := parse(t, "# check=error=true\nFROM busybox AS Up\n")
	err := f.Violation(f.Warnings)
	if err == nil || err.Error() != "lint violation found for rules: StageNameCasing" || f.Warnings[0].Severity != SeverityError {
		t.Errorf("Violation = %v of %v", err, f.Warnings)
	}
	f = parse(t, "# check=error=true\nFROM busybox AS Up\n", "--build-arg", "BUILDKIT_DOCKERFILE_CHECK=skip=all")
	if f.FailOnWarnings() || len(f.Warnings) > 0 {
		t.Errorf("the build argument does not replace the directive: %v", f.Warnings)
	}
}

func TestCheckPlatform(t *testing.T) {
	s := parse(t, "FROM busybox\n").Stages[0]
	arm := ocispec.Platform{OS: "linux", Architecture: "arm64"}
	amd := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	if ws := s.CheckPlatform(amd, amd); len(ws) != 0 {
		t.Errorf("CheckPlatform of one platform = %v", ws)
	}
	want := `Base image busybox was pulled with platform "linux/arm64", expected "linux/amd64" for current build`
	if ws := s.CheckPlatform(amd, arm); len(ws) != 1 || ws[0].Message != want {
		t.Errorf("CheckPlatform = %v, want %s", ws, want)
	}
}

func TestNotes(t *testing.T) {
	f := parse(t, "# syntax=docker/dockerfile:1\n# check=skip=StageNameCassing\nFROM busybox\nARG VERSION\n",
		"--build-arg", "VERSIO=1", "--build-arg", "https_proxy=x", "--build-arg", "TARGETARCH=arm")
	want := []string{
		"there is no build check StageNameCassing (did you mean StageNameCasing?)",
		"build argument VERSIO is given, but no ARG declares it (did you mean VERSION?)",
	}
	if diff := cmp.Diff(want, f.Notes); diff != "" {
		t.Errorf("Notes (-want +got):\n%s", diff)
	}
	if f = parse(t, "FROM busybox\nONBUILD COPPY a b\n"); len(f.Notes) != 1 || !strings.Contains(f.Notes[0], "COPPY") {
		t.Errorf("Notes of a trigger that is no instruction = %q", f.Notes)
	}
	if f = parse(t, "# syntax=my/frontend:1\nFROM busybox\n"); len(f.Notes) != 1 {
		t.Errorf("Notes of an unknown syntax = %q", f.Notes)
	}
}

func TestOutline(t *testing.T) {
	f := parse(t, `# V the version
ARG V=1
ARG UNUSED
FROM busybox:$V AS base
ARG X=x
# final what ships
FROM base AS final
# U of no use
ARG U=2
ARG V
RUN --mount=type=secret,id=tok,required --mount=type=ssh --mount=type=cache,target=/c true
`, "--build-arg", "U=77")
	plan, err := f.Plan("")
	if err != nil {
		t.Fatal(err)
	}
	o, err := f.Outline(plan, f.args.TargetPlatform, busybox)
	if err != nil {
		t.Fatal(err)
	}
	var args []string
	for _, a := range o.Args {
		args = append(args, fmt.Sprintf("%s=%s (%s) %d", a.Name, *a.Value, a.Description, a.Line))
	}
	if diff := cmp.Diff([]string{"V=1 (the version) 2", "X=x () 5", "U=77 (of no use) 9"}, args); diff != "" {
		t.Errorf("Args (-want +got):\n%s", diff)
	}
	got := fmt.Sprint(o.Name, o.Description, o.Secrets, o.SSH, o.Caches)
	if want := "finalwhat ships[{tok true 11}] [{default false 11}] [{/c false 11}]"; got != want {
		t.Errorf("outline = %s, want %s", got, want)
	}
}

func TestWarningsBeforeError(t *testing.T) {
	_, err := Parse(strings.NewReader("ARG T\nFROM busybox:$T\n"), Args{Name: "Dockerfile"})
	var e *Error
	if !errors.As(err, &e) || len(e.Warnings) != 1 || e.Warnings[0].Rule != "InvalidDefaultArgInFrom" {
		t.Errorf("got error %#v, want one with the warning of the invalid base name", err)
	}
	f := parse(t, "ARG T=v1\nFROM --platform=$BUILDPLATFORM busybox:$T\n")
	if got, want := f.Stages[0].Written, (Written{"busybox:$T", "$BUILDPLATFORM"}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}
