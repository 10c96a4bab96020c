package dockerfile

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestPlan(t *testing.T) {
	const text = `ARG BASE=a
FROM busybox AS a
FROM busybox AS unused
RUN --mount=from=a,target=/m true
FROM ${BASE} AS Mid
COPY --from=0 /x /y
FROM scratch
COPY --from=mid / /
RUN --mount=type=cache,from=busybox,target=/c true
`
	for _, c := range []struct{ target, want string }{
		{"", "[a mid stage-3]"}, {"MID", "[a mid]"}, {"unused", "[a unused]"}, {"a", "[a]"},
	} {
		f := parse(t, text)
		plan, err := f.Plan(c.target)
		if err != nil {
			t.Fatalf("Plan(%q): %v", c.target, err)
		}
		if got := fmt.Sprint(names(plan)); got != c.want {
			t.Errorf("Plan(%q) = %s, want %s", c.target, got, c.want)
		}
	}
}

func TestContexts(t *testing.T) {
	const text = `FROM alpine:latest AS a
FROM docker.io/library/alpine AS b
FROM alpine:3 AS c
FROM busybox AS k
RUN true
FROM k AS d
COPY --from=k / /
COPY --from=other / /
COPY --from=alpine / /
`
	f := parse(t, text, "--build-context", "alpine=x", "--build-context", "k=y", "--build-context", "other::linux/amd64=z")
	for i, want := range []Ref{{Name: "alpine"}, {Name: "alpine"}, {Name: "alpine:3"}, {Name: "k"}, {Name: "k"}} {
		if got := f.Stages[i].Base; got != want {
			t.Errorf("Base of stage %d = %v, want %v", i, got, want)
		}
	}
	if plan, err := f.Plan("d"); err != nil || fmt.Sprint(names(plan)) != "[d]" {
		t.Errorf("Plan(d) = %v, %v, want d alone: k is replaced", names(plan), err)
	}
	if s, err := f.Stages[3].Steps(Config{}, f.args.TargetPlatform); err != nil || len(s) != 0 {
		t.Errorf("Steps of a replaced stage = %v, %v, want none", s, err)
	}
	s, err := f.Stages[4].Steps(Config{}, f.args.TargetPlatform)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"k", "other::linux/amd64", "alpine"} {
		if got := s[i].Op.(*Copy).From; got != (Ref{Name: want}) {
			t.Errorf("From of step %d = %v, want %s", i, got, want)
		}
	}
}

func TestTitle(t *testing.T) {
	f := parse(t, "FROM busybox AS a\nFROM x/y:1@sha256:"+strings.Repeat("0", 64)+"\nFROM a\nFROM scratch\n")
	for i, want := range []string{
		"FROM docker.io/library/busybox:latest", "FROM docker.io/x/y:1@sha256:" + strings.Repeat("0", 64), "FROM a", "FROM scratch",
	} {
		if got := f.Stages[i].Title(); got != want {
			t.Errorf("Title of stage %d = %q, want %q", i, got, want)
		}
	}
}

func TestEpoch(t *testing.T) {
	const text = "FROM scratch AS src\nADD https://h/f /\nFROM busybox\nARG SOURCE_DATE_EPOCH\n"
	if f := parse(t, text, "--build-arg", "SOURCE_DATE_EPOCH=99"); f.Epoch == nil || *f.Epoch != 99 || f.EpochFrom != nil {
		t.Errorf("Epoch = %v from %v, want 99", f.Epoch, f.EpochFrom)
	}
	if f := parse(t, text, "--build-arg", "SOURCE_DATE_EPOCH=SRC"); f.Epoch != nil || f.EpochFrom == nil || f.EpochFrom.Stage != f.Stages[0] {
		t.Errorf("Epoch = %v from %v, want the stage src", f.Epoch, f.EpochFrom)
	}
	if f := parse(t, text, "--build-arg", "SOURCE_DATE_EPOCH=context"); f.EpochFrom == nil || *f.EpochFrom != (Ref{}) {
		t.Errorf("EpochFrom = %v, want the main context", f.EpochFrom)
	}
	args, _ := goldenArgs([]string{"--build-arg", "SOURCE_DATE_EPOCH=nothing"})
	if _, err := Parse(strings.NewReader(text), args); err == nil {
		t.Error("SOURCE_DATE_EPOCH=nothing is accepted")
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct{ text, want, line string }{
		{"", "empty", ""},
		{"# only a comment\n", "no instructions", "1"},
		{"ARG A=1\n", "no FROM", ""},
		{"ENV a=1\nFROM x\n", "no build stage", "1"},
		{"FROM busybox\nFOO x\n", "dockerfile parse error on line 2: unknown instruction: FOO (did you mean", "2"},
		{"FROM busybox\nCPOY a b\n", "did you mean COPY?", "2"},
		{"FROM busybox\nCOPY --chwon=1 a b\n", "did you mean chown?", "2"},
		{"FROM busybox\nRUN --mount=type=bnd,target=/m true\n", "did you mean bind?", "2"},
		{"FROM busybox\nRUN --mount=type=bind,target=/m,nope=1 true\n", "unexpected key 'nope'", "2"},
		{"FROM busybox\nRUN --mount=target=/ true\n", "invalid mount target", "2"},
		{"FROM busybox\nRUN --mount=target=/b,mode=0700 true\n", "mode not allowed", "2"},
		{"FROM busybox\nRUN --network=foo true\n", "foo", "2"},
		{"FROM Busybox\n", "lowercase", "1"},
		{"FROM busybox AS 1a\n", "1a", "1"},
		{"FROM ${X}\n", "should not be blank", "1"},
		{"FROM --platform=a/b/c/d busybox\n", "a/b/c/d", "1"},
		{"FROM busybox\nCOPY --from=$X a b\n", "variable expansion is not supported for --from", "2"},
		{"FROM busybox\nCOPY --from=7 a b\n", "invalid stage index 7", "2"},
		{"FROM busybox\nCOPY --chmod=999 a b\n", "octal", "2"},
		{"FROM busybox\nCOPY --chmod=u+q a b\n", "u+q", "2"},
		{"FROM busybox\nCOPY --link --chown=me a b\n", "--chown=me", "2"},
		{"FROM busybox\nCOPY http://h/x /z\n", "URL", "2"},
		{"FROM busybox\nCOPY https://h/x.git /z\n", "git", "2"},
		{"FROM busybox\nADD --checksum=sha256:0 http://h/x /z\n", "checksum", "2"},
		{"FROM busybox\nCOPY f <<E\nx\nE\n", "heredoc as a destination", "2"},
		{"FROM busybox\nRUN <<E\nx\n", "unterminated heredoc", "2"},
		{"FROM busybox\nENV A=${B:?boom9}\n", "boom9", "2"},
		{"FROM busybox\nEXPOSE 99999\n", "99999", "2"},
		{"FROM busybox\nEXPOSE 9-1\n", "backwards", "2"},
		{"FROM busybox\nEXPOSE 1/foo\n", "foo", "2"},
		{"FROM busybox\nSTOPSIGNAL NOPE\n", "NOPE", "2"},
		{"FROM busybox\nONBUILD ONBUILD RUN x\n", "ONBUILD", "2"},
		{"FROM busybox AS b\nONBUILD COPPY a b\nFROM b\n", "did you mean COPY?", "3"},
		{"FROM busybox AS b\nCOPY --from=b / /\n", "circular", "2"},
		{"FROM busybox AS x\nCOPY --from=y / /\nFROM busybox AS y\nCOPY --from=x / /\n", "circular", "2"},
		{"FROM busybox\nCOPY --from=y / /\nFROM busybox AS y\nFROM scratch\nCOPY --from=0 / /\n", "needs to be defined before", "2"},
		{"# escape=x\nFROM busybox\n", "escape", "1"},
		{"# check=foo=bar\nFROM busybox\n", "foo", "1"},
		{"FROM busybox\nENV A=aaaaaaaaaa\nENV A=${A//a/${A//a/${A//a/${A//a/${A//a/${A//a/${A//a/${A//a/$A}}}}}}}}\n", "too large", "3"},
	} {
		err := pureError(c.text)
		var e *Error
		if !errors.As(err, &e) {
			t.Errorf("%q: error %v, want an *Error with %q", c.text, err, c.want)
			continue
		}
		if !strings.Contains(e.Error(), c.want) {
			t.Errorf("%q: error %q lacks %q", c.text, e, c.want)
		}
		if want := strings.TrimSuffix("Dockerfile:"+c.line, ":"); e.Position() != want {
			t.Errorf("%q: position %q, want %q", c.text, e.Position(), want)
		}
	}
}

func TestBomb(t *testing.T) {
	text := "FROM busybox\nENV A=aaaaaaaaaaaaaaaa\n" + strings.Repeat("ENV A=$A$A\n", 60)
	if err := pureError(text); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("doubling a variable 60 times: %v, want an error", err)
	}
	text = "FROM busybox\n" + strings.Repeat("EXPOSE 0-65535\n", 100)
	if err := pureError(text); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("all ports a hundred times: %v, want an error", err)
	}
	text = "FROM busybox\nENV A=aaaaaaaaaaaaaaaa\n" + strings.Repeat("ENV A=$A$A\n", 13) + strings.Repeat("RUN x\n", 3000)
	if err := pureError(text); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a long variable in 3000 steps: %v, want an error", err)
	}
}

func TestUnknownTarget(t *testing.T) {
	f := parse(t, "FROM busybox AS first\nFROM busybox\n")
	for target, want := range map[string]string{"fist": "did you mean first?", "0": `"0" could not be found`} {
		if _, err := f.Plan(target); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Plan(%q): %v, want %s", target, err, want)
		}
	}
}

func TestExcerpt(t *testing.T) {
	err := pureError("FROM busybox\n\nCOPPY a b")
	want := `Dockerfile:3
--------------------
   1 |     FROM busybox
   2 |     
   3 | >>> COPPY a b
--------------------
`
	if got := err.(*Error).Excerpt(); got != want {
		t.Errorf("Excerpt() =\n%s\nwant\n%s", got, want)
	}
	err = pureError("FROM busybox AS x\nRUN --mount=from=y,target=/y \\\n  true\nENV a=1\nENV b=1\nFROM busybox AS y\nCOPY --from=x / /\n")
	want = `Dockerfile:2
--------------------
   1 |     FROM busybox AS x
   2 | >>> RUN --mount=from=y,target=/y \
   3 | >>>   true
   4 |     ENV a=1
   5 |     ENV b=1
   6 |     FROM busybox AS y
   7 | >>> COPY --from=x / /
   8 |     
--------------------
`
	if got := err.(*Error).Excerpt(); got != want {
		t.Errorf("Excerpt() =\n%s\nwant\n%s", got, want)
	}
}

func TestLocate(t *testing.T) {
	f := parse(t, "FROM busybox\nRUN false\n")
	steps, err := f.Stages[0].Steps(Config{}, f.args.TargetPlatform)
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("exit code: 1")
	err = f.Locate(steps[0], cause)
	var e *Error
	if !errors.As(err, &e) || e.Position() != "Dockerfile:2" || !errors.Is(err, cause) || err.Error() != "exit code: 1" {
		t.Errorf("Locate = %#v", err)
	}
	if again := f.Stages[0].Locate(fmt.Errorf("stage: %w", err)); !errors.As(again, &e) || e.Position() != "Dockerfile:2" {
		t.Errorf("a second Locate moved the error to %s", e.Position())
	}
	if f.Locate(steps[0], nil) != nil {
		t.Error("Locate(nil) is an error")
	}
}

func parse(t *testing.T, text string, flags ...string) *File {
	t.Helper()
	args, _ := goldenArgs(flags)
	f, err := Parse(strings.NewReader(text), args)
	if err != nil {
		t.Fatalf("Parse(%q): %v", text, err)
	}
	return f
}

// pureError returns the first error that a text gives without its bases.
func pureError(text string) error {
	args, target := goldenArgs(nil)
	f, err := Parse(strings.NewReader(text), args)
	if err != nil {
		return err
	}
	plan, err := f.Plan(target)
	if err != nil {
		return err
	}
	_, err = f.Check(plan, args.TargetPlatform, busybox)
	return err
}

func TestWorst(t *testing.T) {
	vars := newEnv()
	vars.set("A", strings.Repeat("a", 1000))
	vars.set("B", "b")
	for _, c := range []struct {
		word string
		ok   bool
	}{
		{strings.Repeat("${A//a/bb} ", 100), true},
		{strings.Repeat("x", 1<<20) + "${A//a/b}${A//a/b}${A//a/b}", true},
		{"${A//a/'it'}" + strings.Repeat("x", 1<<20), true},
		{"${A//a/${A//a/$A}}", false},
		{"${A//a/" + strings.Repeat("x", 1<<15) + "}", false},
		{"${A//a/\\}$A${A//a/${A//a/$A}}}", false},
		{"${A//a/'}'${A//a/$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A}}", false},
		{"${A//a/${B:-'}'}${A//a/$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A}}", false},
	} {
		_, err := newLexer('\\').expand(c.word, vars)
		if (err == nil) != c.ok {
			t.Errorf("expand(%.40q): %v, want ok %v", c.word, err, c.ok)
		}
	}
}

func TestArgsEscaped(t *testing.T) {
	for text, want := range map[string]bool{
		"FROM busybox\nCMD x\n":                                  true,
		"FROM busybox\nENTRYPOINT [\"x\"]\n":                     false,
		"FROM busybox\nENTRYPOINT x\n":                           false,
		"FROM busybox AS b\nCMD x\nFROM b\nENTRYPOINT [\"y\"]\n": true,
	} {
		f := parse(t, text)
		var c Config
		for _, s := range f.Stages {
			steps, err := s.Steps(c, f.args.TargetPlatform)
			if err != nil {
				t.Fatal(err)
			}
			c = s.End(c, steps)
		}
		//lint:ignore SA1019 it is part of the config that BuildKit writes
		if c.ArgsEscaped != want {
			t.Errorf("%q: ArgsEscaped is not %v", text, want)
		}
	}
}

// TestPlain holds what is plain against all kinds of lexers.
func TestPlain(t *testing.T) {
	vars := newEnv()
	vars.set("a", "value")
	for c := range rune(0x100) {
		for _, text := range []string{"a" + string(c) + "a", string(c), " " + string(c) + string(c) + " a", string(c) + "<a", "a" + string([]byte{byte(c)})} {
			if !plain(text) {
				continue
			}
			for how := range 32 {
				lex := newLexer([]rune("\\`")[how&1])
				lex.RawQuotes, lex.RawEscapes, lex.SkipUnsetEnv, lex.SkipProcessQuotes = how&2 != 0, how&4 != 0, how&8 != 0, how&16 != 0
				if got, err := lex.expand(text, vars); err != nil || got.Result != text || len(got.Matched)+len(got.Unmatched) > 0 {
					t.Errorf("%q is plain and gives %+v, %v", text, got, err)
				}
			}
		}
	}
	if !plain("RUN echo 0 > /file0") || plain("RUN echo $a") {
		t.Error("plain is not what it was")
	}
}
