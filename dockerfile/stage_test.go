package dockerfile

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// steps parses text and returns the steps of its last stage on a base with a PATH and a CMD.
func steps(t *testing.T, text string, flags ...string) []Step {
	t.Helper()
	args, target := goldenArgs(flags)
	f, err := Parse(strings.NewReader(text), args)
	if err != nil {
		t.Fatalf("Parse(%q): %v", text, err)
	}
	plan, err := f.Plan(target)
	if err != nil {
		t.Fatalf("Plan(%q) of %q: %v", target, text, err)
	}
	var last []Step
	err = f.Walk(plan, args.TargetPlatform, busybox, func(_ *Stage, s []Step) error {
		last = s
		return nil
	})
	if err != nil {
		t.Fatalf("Walk(%q): %v", text, err)
	}
	return last
}

func busybox(*Stage) (Config, error) {
	var c Config
	c.Env, c.Cmd = []string{"PATH=/bin"}, []string{"sh"}
	return c, nil
}

func TestHistory(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"env and label", "ENV A=1 B=\"2 3\"\nLABEL \"a b\"='c d'\n", []string{"ENV A=1 B=2 3", "LABEL a b=c d"}},
		{"run", "RUN true\n", []string{"RUN /bin/sh -c true # buildkit"}},
		{"run exec form", "RUN [\"a\", \"$b\"]\n", []string{"RUN a $b # buildkit"}},
		{"run with args", "ARG A=1 B\nENV A=2\nRUN true\n", []string{"ARG A=1 B", "ENV A=2", "RUN |2 A=2 B= /bin/sh -c true # buildkit"}},
		{"arg given", "ARG A=1\nARG A\n", []string{"ARG A=9", "ARG A=9"}},
		{"args see each other", "ARG X=1 Y=${X}2\n", []string{"ARG X=1 Y=12"}},
		{"copy", "ARG D=d\nCOPY --chown=1:2 --chmod=600 a b $D/\n", []string{"ARG D=d", "COPY --chown=1:2 --chmod=600 a b d/ # buildkit"}},
		{"here-documents", "COPY --link <<x <<y /d/\nx\ny\n", []string{"COPY <<x <<y /d/ # buildkit"}},
		{"workdir", "WORKDIR a/b/../c\nWORKDIR /x/../y\nWORKDIR $NO\n", []string{"WORKDIR /a/c", "WORKDIR /x/../y", "WORKDIR /x/../y"}},
		{"shell", "SHELL [\"/bin/ash\", \"-ec\"]\nCMD a b\nENTRYPOINT [\"x\"]\n",
			[]string{"SHELL [/bin/ash -ec]", `CMD ["/bin/ash" "-ec" "a b"]`, `ENTRYPOINT ["x"]`}},
		{"onbuild has none", "ONBUILD RUN x\nUSER a\n", []string{"", "USER a"}},
		{"expose", "ARG P=\"80 81/UDP\"\nEXPOSE $P 9-11\n", []string{"ARG P=80 81/UDP", "EXPOSE [80/tcp 81/udp 9/tcp 10/tcp 11/tcp]"}},
		{"rest", "VOLUME /a /b\nSTOPSIGNAL SIGQUIT\nMAINTAINER me too\n", []string{"VOLUME [/a /b]", "STOPSIGNAL SIGQUIT", "MAINTAINER me too"}},
		{"healthcheck", "HEALTHCHECK NONE\n", []string{"HEALTHCHECK {Test:[NONE] Interval:0s Timeout:0s StartPeriod:0s StartInterval:0s Retries:0}"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, st := range steps(t, "FROM busybox\n"+c.text, "--build-arg", "A=9") {
				got = append(got, st.History)
			}
			if c.name == "run with args" { // given 9, yet ENV wins
				c.want[0] = "ARG A=9 B"
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("history of %q (-want +got):\n%s", c.text, diff)
			}
		})
	}
}

func TestText(t *testing.T) {
	got := steps(t, `FROM busybox
ENV V=x
run echo "$V" ${NO} \
  two
RUN --mount=type=secret,id=s,env=S echo $S
RUN <<EOF
first
second
EOF
COPY --from=busybox $V /y
WORKDIR $V
cmd echo $V
`)
	want := []string{
		"ENV V=x", `RUN echo "x" ${NO}   two`, "RUN --mount=type=secret,id=s,env=S echo ****", "RUN <<EOF (first...)",
		"COPY --from=busybox x /y", "WORKDIR x", "CMD echo $V",
	}
	for i, st := range got {
		if st.Text != want[i] {
			t.Errorf("step %d: Text = %q, want %q", i, st.Text, want[i])
		}
	}
	if got[1].Start != 3 || got[1].End != 4 || got[3].Start != 6 || got[3].End != 9 {
		t.Errorf("lines of RUN = %d-%d and %d-%d, want 3-4 and 6-9", got[1].Start, got[1].End, got[3].Start, got[3].End)
	}
}

func TestRunKeepsAgentOfImage(t *testing.T) {
	got := steps(t, "FROM busybox\nENV SSH_AUTH_SOCK=mine\nRUN --mount=type=ssh true\n")
	env := got[1].Op.(*Run).Env
	if want := []string{"PATH=/bin", "SSH_AUTH_SOCK=mine"}; !slices.Equal(env, want) {
		t.Errorf("environment %q, want %q", env, want)
	}
}

func TestRun(t *testing.T) {
	got := steps(t, `FROM busybox
ARG A=1
ARG NOVALUE
ENV E=e
WORKDIR /w
USER u:g
RUN --mount=target=m --mount=type=cache,target=c/,sharing=locked --mount=type=tmpfs,target=/t,size=1k --mount=type=secret,id=a/q --mount=type=ssh --network=none true
`, "--build-arg", "HTTP_PROXY=p", "--build-arg", "BUILDKIT_CACHE_MOUNT_NS=ns", "--build-arg", "BUILDKIT_SANDBOX_HOSTNAME=h")
	want := &Run{
		Args:  []string{"/bin/sh", "-c", "true"},
		Env:   []string{"PATH=/bin", "A=1", "E=e", "SSH_AUTH_SOCK=/run/buildkit/ssh_agent.0"},
		Proxy: []string{"HTTP_PROXY=p", "http_proxy=p"}, Dir: "/w", User: "u:g", Network: "none", Hostname: "h",
		Mounts: []Mount{
			{Type: MountBind, Source: "/", Target: "/w/m", ReadOnly: true},
			{Type: MountCache, Source: "/", Target: "/w/c", ID: "ns/c", Sharing: "locked"},
			{Type: MountTmpfs, Target: "/t", Size: 1024},
			{Type: MountSecret, ID: "a/q", Target: "/run/secrets/q", ReadOnly: true},
			{Type: MountSSH, ID: "default", Target: "/run/buildkit/ssh_agent.0", ReadOnly: true},
		},
	}
	if diff := cmp.Diff(want, got[len(got)-1].Op); diff != "" {
		t.Errorf("RUN (-want +got):\n%s", diff)
	}
}

func TestScripts(t *testing.T) {
	for _, c := range []struct {
		text string
		args string
		file string
	}{
		{"RUN <<E\na\nb\nE\n", "/bin/sh -c a\nb\n", ""},
		{"RUN <<-E\n\ta\n\tE\n", "/bin/sh -c a\n", ""},
		{"RUN <<E cat\na\nE\n", "/bin/sh -c <<E cat\na\nE", ""},
		{"RUN <<E\n#!/bin/x\nE\n", "/bin/sh -c /dev/pipes/E", "#!/bin/x\n"},
		{"RUN cat 3<<A && cat <<B\na\nA\nb\nB\n", "/bin/sh -c cat 3<<A && cat <<B\na\nA\nb\nB", ""},
	} {
		op := steps(t, "FROM busybox\nENV a=x\n"+c.text)[1].Op.(*Run)
		if got := strings.Join(op.Args, " "); got != c.args {
			t.Errorf("%q: Args = %q, want %q", c.text, got, c.args)
		}
		if c.file != "" && (len(op.Files) != 1 || string(op.Files[0].Data) != c.file) {
			t.Errorf("%q: Files = %v, want %q", c.text, op.Files, c.file)
		}
	}
}

func TestCopy(t *testing.T) {
	path := func(p string) Source { return Source{Path: p} }
	for _, c := range []struct {
		text string
		dest string
		srcs []Source
	}{
		{"COPY a ../b /c/ x", "/w/x", []Source{path("/a"), path("/b"), path("/c")}},
		{"COPY a .", "/w/", []Source{path("/a")}},
		{"COPY a ./x/", "/w/x/", []Source{path("/a")}},
		{"COPY a /x/.", "/x/", []Source{path("/a")}},
		{"COPY a /x/../y", "/y", []Source{path("/a")}},
		{"COPY a* /", "/", []Source{path("/a*")}},
		{"COPY --link --chown=me --chmod=600 a /", "/", []Source{path("/a")}}, // a mode undoes --link, so names can be found
		{"COPY --parents a/./b/c d/e /x/", "/x/", []Source{{Path: "/a/b/c", Pivot: "/a"}, {Path: "/d/e", Pivot: "/"}}},
		{"ADD http://h/a/f.txt?x http://h /x/", "/x/", []Source{
			{URL: "http://h/a/f.txt?x", Name: "f.txt"}, {URL: "http://h", Name: "__unnamed__"}}},
		{"ADD https://h/r.git#v1:sub /x", "/x", []Source{{URL: "https://h/r.git#v1:sub", Git: true}}},
		{"COPY <<a <<'b' /x/\n$V\\$\na\n$V\nb", "/x/", []Source{
			{Inline: &Inline{Name: "a", Data: []byte("v$\n")}}, {Inline: &Inline{Name: "b", Data: []byte("$V\n")}}}},
	} {
		all := steps(t, "FROM busybox\nENV V=v\nWORKDIR /w\n"+c.text+"\n")
		op := all[len(all)-1].Op.(*Copy)
		if op.Dest != c.dest {
			t.Errorf("%s: Dest = %q, want %q", c.text, op.Dest, c.dest)
		}
		if diff := cmp.Diff(c.srcs, op.Sources); diff != "" {
			t.Errorf("%s: Sources (-want +got):\n%s", c.text, diff)
		}
	}
}

func TestScopes(t *testing.T) {
	const env = "\nENV R=$A/$B\n"
	for _, c := range []struct{ name, text, want string }{
		{"global is not in a stage", "ARG A=1\nFROM busybox" + env, "/"},
		{"bare ARG takes it in", "ARG A=1\nFROM busybox\nARG A" + env, "1/"},
		{"stage's default wins over global", "ARG A=1\nFROM busybox\nARG A=2" + env, "2/"},
		{"given wins", "FROM busybox\nARG B=1" + env, "/given"},
		{"undeclared is not seen", "FROM busybox" + env, "/"},
		{"ENV after ARG", "FROM busybox\nARG B=1\nENV B=e" + env, "/e"},
		{"ARG after ENV", "FROM busybox\nENV B=e\nARG B=1" + env, "/given"},
		{"inherited by a stage", "FROM busybox AS x\nARG A=1\nFROM x" + env, "1/"},
		{"config wins in a stage below", "FROM busybox AS x\nENV A=e\nARG A=a\nFROM x" + env, "e/"},
		{"predefined needs ARG", "FROM busybox\nENV A=$TARGETARCH\nARG TARGETARCH\nENV B=$TARGETARCH" + env, "/amd64"},
		{"target stage", "FROM busybox AS tgt\nARG TARGETSTAGE\nENV A=$TARGETSTAGE" + env, "tgt/"},
		{"target stage unnamed", "FROM busybox\nARG TARGETSTAGE\nENV A=$TARGETSTAGE" + env, "default/"},
	} {
		all := steps(t, c.text, "--build-arg", "B=given")
		got := all[len(all)-1].Config.Env
		if want := "R=" + c.want; got[len(got)-1] != want {
			t.Errorf("%s: %q, want %q", c.name, got[len(got)-1], want)
		}
	}
}

func TestConfig(t *testing.T) {
	all := steps(t, "FROM busybox\nENV A=1 B=2\nENV A=3 C=$A\nCMD [\"k\"]\nENTRYPOINT [\"e\"]\nLABEL x=y\n")
	c := all[len(all)-1].Config
	if diff := cmp.Diff([]string{"PATH=/bin", "A=3", "B=2", "C=1"}, c.Env); diff != "" {
		t.Errorf("Env (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"PATH=/bin", "A=1", "B=2"}, all[0].Config.Env); diff != "" {
		t.Errorf("Env of the first step changed later (-want +got):\n%s", diff)
	}
	if !slices.Equal(c.Cmd, []string{"k"}) {
		t.Errorf("Cmd = %q, want k: it was set in this stage", c.Cmd)
	}
	all = steps(t, "FROM busybox AS a\nCMD [\"k\"]\nFROM a\nENTRYPOINT [\"e\"]\n")
	if cmd := all[0].Config.Cmd; cmd != nil {
		t.Errorf("Cmd = %q, want none: ENTRYPOINT clears an inherited one", cmd)
	}
}

func TestStartAndEnd(t *testing.T) {
	args, _ := goldenArgs(nil)
	args.Labels = map[string]string{"l": "given"}
	f, err := Parse(strings.NewReader("FROM scratch AS a\nLABEL l=file\nFROM a\n"), args)
	if err != nil {
		t.Fatal(err)
	}
	first, err := f.Stages[0].Steps(Config{}, args.TargetPlatform)
	if err != nil {
		t.Fatal(err)
	}
	c := f.Stages[0].End(Config{}, first)
	if c.WorkingDir != "/" || !slices.Equal(c.Env, []string{"PATH=" + defaultPath}) || c.Labels["l"] != "file" {
		t.Errorf("stage from scratch ends with %+v", c.DockerOCIImageConfig)
	}
	c.OnBuild = []string{"RUN x"}
	last := f.Stages[1].End(c, nil)
	if last.OnBuild != nil || last.Labels["l"] != "given" || c.Labels["l"] != "file" {
		t.Errorf("target without steps ends with %+v, its base with %v", last.DockerOCIImageConfig, c.Labels)
	}
}

func TestTriggers(t *testing.T) {
	text := "FROM busybox AS x\nFROM busybox AS b\nONBUILD COPY --from=x /q /q2\nONBUILD ENV A=1\nFROM b AS c\nRUN true\nFROM c\n"
	args, _ := goldenArgs(nil)
	f, err := Parse(strings.NewReader(text), args)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(names(f.Stages[2].Needs)); got != "[b x]" {
		t.Errorf("Needs of c = %s, want [b x]", got)
	}
	var got []string
	err = f.Walk(f.Stages, args.TargetPlatform, busybox, func(s *Stage, steps []Step) error {
		for _, st := range steps {
			got = append(got, fmt.Sprintf("%s:%d:%s", s.Name, st.Start, st.Text))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"b:3:ONBUILD COPY --from=x /q /q2", "b:4:ONBUILD ENV A=1",
		"c:5:ONBUILD COPY --from=x /q /q2", "c:5:ONBUILD ENV A=1", "c:6:RUN true",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
}

func names(stages []*Stage) []string {
	var out []string
	for _, s := range stages {
		out = append(out, s.label())
	}
	return out
}

func TestStepsSideBySide(t *testing.T) {
	f := parse(t, "FROM busybox\nARG A=1\nENV B=$A C=$NO\nRUN <<E\n#!x\nE\nCOPY <<E /x\n$A\nE\nEXPOSE $A\nLABEL a=$B\nHEALTHCHECK CMD x\n")
	want, err := f.Stages[0].Steps(Config{}, f.args.TargetPlatform)
	if err != nil {
		t.Fatal(err)
	}
	got := make([][]Step, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() { got[i], _ = f.Stages[0].Steps(Config{}, f.args.TargetPlatform) })
	}
	wg.Wait()
	for _, g := range got {
		if diff := cmp.Diff(string(mustJSON(t, want)), string(mustJSON(t, g))); diff != "" {
			t.Errorf("steps computed side by side differ:\n%s", diff)
		}
	}
}
