package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"filo/builder"
	"filo/builder/sandbox"
	"filo/cmd/filo/progress"
)

// parseFlags reads the flags of build as the command line does.
func parseFlags(t *testing.T, args ...string) *buildFlags {
	t.Helper()
	f := &buildFlags{}
	fs := pflag.NewFlagSet("build", pflag.ContinueOnError)
	f.register(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return f
}

// variables is an environment.
func variables(kv ...string) lookup {
	return func(name string) (string, bool) {
		for i := 0; i < len(kv); i += 2 {
			if kv[i] == name {
				return kv[i+1], true
			}
		}
		return "", false
	}
}

// Proxies of Docker's configuration are build arguments, as with buildx; --build-arg says otherwise.
func TestProxiesOfDocker(t *testing.T) {
	home := t.TempDir()
	text := `{"proxies":{"default":{"httpProxy":"http://p:1","noProxy":"local"},"tcp://other":{"httpProxy":"http://q:1"}}}`
	if err := os.Mkdir(filepath.Join(home, ".docker"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".docker", "config.json"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"HTTP_PROXY": "http://p:1", "http_proxy": "http://p:1", "NO_PROXY": "mine", "no_proxy": "local"}
	for _, env := range []lookup{variables("HOME", home), variables("HOME", "/", "DOCKER_CONFIG", filepath.Join(home, ".docker"))} {
		req, err := parseFlags(t, "--build-arg", "NO_PROXY=mine").request(env)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, req.Args); diff != "" {
			t.Errorf("args (-want +got):\n%s", diff)
		}
	}
	if _, err := parseFlags(t).request(variables(policyVariable, "rules.json")); err == nil || !strings.Contains(err.Error(), "rules.json") {
		t.Errorf("a source policy gives %v, want an error that names it", err)
	}
}

func TestRequest(t *testing.T) {
	env := variables("FROMENV", "e", "SOURCE_DATE_EPOCH", "7")
	f := parseFlags(t, "--target", "t", "--build-arg", "A=1=2", "--build-arg", "FROMENV", "--build-arg", "UNSET", "--build-arg", "EMPTY=",
		"--label", "l=m", "--label", "bare", "--platform", "linux/arm64/v8,linux/amd64", "--platform", "linux/arm64",
		"--no-cache-filter", "a,b", "--no-cache-filter", "c", "--network", "host", "--add-host", "a:10.0.0.1", "--add-host", "b=[::1]",
		"--add-host", "up:host-gateway", "--shm-size", "2m", "--ulimit", "nofile=10:20", "--allow", "security.insecure", "--pull", "--verify")
	req, err := f.request(env)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"A": "1=2", "FROMENV": "e", "EMPTY": "", "SOURCE_DATE_EPOCH": "7"}, req.Args); diff != "" {
		t.Errorf("args (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]string{"l": "m", "bare": ""}, req.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	var got []string
	for _, p := range req.Platforms {
		got = append(got, platforms.FormatAll(p))
	}
	if want := []string{"linux/arm64", "linux/amd64"}; !slices.Equal(got, want) {
		t.Errorf("platforms %v, want %v", got, want)
	}
	if want := []string{"a", "b", "c"}; !slices.Equal(req.NoCacheFilter, want) {
		t.Errorf("no-cache filter %v, want %v", req.NoCacheFilter, want)
	}
	if want := []string{"a:10.0.0.1", "b:::1", "up:127.0.0.1"}; !slices.Equal(req.Hosts, want) {
		t.Errorf("hosts %v, want %v", req.Hosts, want)
	}
	if want := []string{"security.insecure", "network.host"}; !slices.Equal(req.Allow, want) || req.Network != "host" {
		t.Errorf("network %q allows %v, want %v", req.Network, req.Allow, want)
	}
	if want := []sandbox.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}}; !slices.Equal(req.Ulimits, want) || req.ShmSize != 2<<20 {
		t.Errorf("ulimits %v, shm %d", req.Ulimits, req.ShmSize)
	}
	if req.Target != "t" || !req.Pull || !req.Verify || req.NoCache || req.Epoch == nil || *req.Epoch != 7 {
		t.Errorf("request %+v", req)
	}
}

func TestRequestRefuses(t *testing.T) {
	tests := []struct{ flag, want string }{
		{"--build-arg==x", "NAME=VALUE"},
		{"--label==x", "KEY=VALUE"},
		{"--platform=linux/amd64/v9/x", "platform"},
		{"--add-host=a", "NAME:IP"},
		{"--add-host=a:b", "IP address"},
		{"--add-host=a b:1.2.3.4", "host name"},
		{"--network=mine", "default, host or none"},
		{"--shm-size=big", "shm-size"},
		{"--ulimit=nofile", "ulimit"},
		{"--allow=all", "network.host or security.insecure"},
		{"--secret=src=x", "no id"},
		{"--secret=id=x,mode=1", "unknown key"},
		{"--secret=id=x,type=vault", "file or env"},
		{"--secret=id=x,src=/no/such/file", "no such file"},
		{"--secret=id=x,src=/", "is a directory"},
		{"--ssh=default", "SSH_AUTH_SOCK"},
		{"--ssh=a=/no/such/file", "no such file"},
		{"--ssh=a=/etc/passwd", "ssh"},
		{"--tag=x/UPPER", "lowercase"},
		{"--tag=a@sha256:" + strings.Repeat("0", 64), "digest"},
		{"--build-context=k", "NAME=VALUE"},
	}
	for _, tt := range tests {
		_, err := parseFlags(t, tt.flag).request(variables())
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want one that says %q", tt.flag, err, tt.want)
		}
	}
	for _, ok := range []string{"--provenance=false", "--sbom=false", "--attest=type=provenance,disabled=true", "--ssh=k=" + writeKey(t)} {
		if _, err := parseFlags(t, ok).request(variables()); err != nil {
			t.Errorf("%s: %v", ok, err)
		}
	}
}

func TestSecret(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for _, name := range []string{"file", "BOTH"} {
		if err := os.WriteFile(name, []byte("from file"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := variables("VAR", "from env", "BOTH", "from env")
	tests := []struct{ spec, id, want string }{
		{"id=a,src=file", "a", "from file"},
		{"id=a,source=" + filepath.Join(dir, "file"), "a", "from file"},
		{"type=file,id=a,src=file", "a", "from file"},
		{"id=a,env=VAR", "a", "from env"},
		{"type=env,id=a,src=VAR", "a", "from env"},
		{"id=VAR", "VAR", "from env"},
		{"id=BOTH", "BOTH", "from env"},
		{"id=BOTH,type=file", "BOTH", "from file"},
		{"id=file", "file", "from file"},
		{"id=a,env=UNSET", "a", ""},
	}
	for _, tt := range tests {
		all, err := secrets([]string{tt.spec}, env)
		if err != nil {
			t.Errorf("%s: %v", tt.spec, err)
			continue
		}
		s, ok := all[tt.id]
		if ok != (tt.want != "") {
			t.Errorf("%s: secret is there: %v", tt.spec, ok)
		}
		if !ok {
			continue
		}
		if b, err := s(); string(b) != tt.want || err != nil {
			t.Errorf("%s: %q, %v, want %q", tt.spec, b, err, tt.want)
		}
	}
	if err := os.WriteFile("big", make([]byte, secretLimit+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := secrets([]string{"id=big,src=big"}, env); err == nil {
		t.Error("a secret over the limit is accepted")
	}
	all, err := secrets([]string{"id=endless,src=/dev/zero"}, env)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := all["endless"](); err == nil {
		t.Errorf("%d bytes of a secret without a size are accepted", len(b))
	}
}

func TestOutputs(t *testing.T) {
	tests := []struct {
		args []string
		want []string
	}{
		{nil, nil},
		{[]string{"-t", "a"}, []string{"image"}},
		{[]string{"--iidfile", "f"}, []string{"image"}},
		{[]string{"-t", "a", "-o", "out"}, []string{"local out"}},
		{[]string{"-o", "-"}, []string{"tar -"}},
		{[]string{"-t", "a", "--push"}, []string{"registry"}},
		{[]string{"-t", "a", "--push", "-o", "type=oci,dest=x"}, []string{"oci x", "registry"}},
		{[]string{"-t", "a", "--push", "-o", "type=image"}, []string{"image push=true"}},
		{[]string{"-t", "a", "--push", "-o", "type=registry"}, []string{"registry"}},
		{[]string{"-t", "a", "--load", "-o", "type=oci,dest=x"}, []string{"oci x", "image store=true"}},
	}
	for _, tt := range tests {
		f := parseFlags(t, tt.args...)
		all, err := f.results.parse(1, false, false, io.Discard)
		if err != nil {
			t.Errorf("%q: %v", tt.args, err)
			continue
		}
		var got []string
		for _, o := range all {
			s := strings.TrimSpace(o.Type + " " + o.Dest)
			for _, k := range []string{"push", "store"} {
				if v := o.Attrs[k]; v != "" {
					s += " " + k + "=" + v
				}
			}
			got = append(got, s)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%q: outputs %q, want %q", tt.args, got, tt.want)
		}
	}
	if _, err := parseFlags(t, "--push").results.parse(1, false, false, io.Discard); err == nil || !strings.Contains(err.Error(), "tag is needed") {
		t.Errorf("--push without a tag: %v", err)
	}
}

func TestMode(t *testing.T) {
	env := variables("BUILDKIT_PROGRESS", "rawjson")
	tests := []struct {
		f    showFlags
		env  lookup
		want progress.Mode
	}{
		{showFlags{}, variables(), progress.Auto},
		{showFlags{}, env, progress.RawJSON},
		{showFlags{progress: "plain"}, env, progress.Plain},
		{showFlags{quiet: true}, env, progress.Quiet},
		{showFlags{quiet: true, progress: "none"}, env, progress.Quiet},
		{showFlags{logTime: true}, variables(), progress.Plain},
		{showFlags{logTime: true, progress: "plain"}, env, progress.Plain},
		{showFlags{logTime: true, progress: "ci"}, env, progress.CI},
	}
	for _, tt := range tests {
		if got, err := tt.f.mode(tt.env); got != tt.want || err != nil {
			t.Errorf("%+v: %q, %v, want %q", tt.f, got, err, tt.want)
		}
	}
	for _, f := range []showFlags{{progress: "fancy"}, {quiet: true, progress: "plain"}, {quiet: true, logTime: true}, {logTime: true, progress: "tty"}} {
		if _, err := f.mode(variables()); err == nil {
			t.Errorf("%+v: no error", f)
		}
	}
}

func TestStateDirectory(t *testing.T) {
	tests := []struct {
		name string
		app  app
		g    sandbox.Ground
		want string
	}{
		{"flag", app{stateDir: "/s", world: world{env: variables("FILO_ROOT", "/f"), root: true}}, sandbox.Ground{}, "/s"},
		{"variable", app{world: world{env: variables("FILO_ROOT", "/f"), root: true}}, sandbox.Ground{}, "/f"},
		{"root", app{world: world{env: variables("HOME", "/h"), root: true}}, sandbox.Ground{Name: "root"}, "/var/lib/filo"},
		{"rootless looks like root", app{world: world{env: variables("HOME", "/h"), root: true}}, sandbox.Ground{Name: rootless}, "/h/.local/share/filo"},
		{"user", app{world: world{env: variables("HOME", "/h", "XDG_DATA_HOME", "/x")}}, sandbox.Ground{}, "/x/filo"},
		{"relative XDG_DATA_HOME", app{world: world{env: variables("HOME", "/h", "XDG_DATA_HOME", "x")}}, sandbox.Ground{}, "/h/.local/share/filo"},
	}
	for _, tt := range tests {
		if got, err := tt.app.dir(tt.g); got != tt.want || err != nil {
			t.Errorf("%s: %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
	if _, err := (&app{world: world{env: variables()}}).dir(sandbox.Ground{}); err == nil {
		t.Error("no HOME: no error")
	}
}

// writeFileOf returns the name of a file with a text.
func writeFileOf(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestRequestIsWhole sees that every flag of build has an effect: on the request, on the outputs, or an error or a
// warning.
func TestRequestIsWhole(t *testing.T) {
	values := map[string]string{
		"file": "f", "target": "t", "build-arg": "A=1", "label": "a=b", "platform": "linux/arm64", "build-context": "k=.", "call": "check",
		"check": "true", "tag": "a", "output": "x", "push": "true", "load": "true", "annotation": "a=b", "iidfile": "f", "metadata-file": "f",
		"network": "none", "add-host": "a:1.2.3.4", "secret": "id=x,env=HOME", "ssh": "k=" + writeKey(t), "shm-size": "1m", "ulimit": "nofile=1",
		"allow": "network.host", "jobs": "2", "progress": "plain", "no-cache-filter": "s",
		"memory": "64m", "cpus": "1", "cpu-period": "5000", "cpu-quota": "5000", "cpu-shares": "5", "cpuset-cpus": "0", "cpuset-mems": "0",
		"pids-limit": "9", "resource": "memory=64m", "dns": "1.2.3.4", "step-timeout": "10m", "build-arg-file": writeFileOf(t, "B=2"),
	}
	plain, err := parseFlags(t).request(variables("HOME", "h"))
	if err != nil {
		t.Fatal(err)
	}
	fs := pflag.NewFlagSet("build", pflag.ContinueOnError)
	(&buildFlags{}).register(fs)
	readElsewhere := []string{"attest", "provenance", "sbom", "keep-storage", "cache-from", "cache-to", "file", "build-context", "call", "check", "tag", "output", "push", "load", "annotation", "iidfile", "metadata-file", "jobs", "explain", "progress", "log-time", "timings", "trace", "quiet", "ignorefile"}
	fs.VisitAll(func(flag *pflag.Flag) {
		v, ok := values[flag.Name]
		if !ok {
			v = "true"
		}
		f := parseFlags(t, "--"+flag.Name+"="+v)
		req, err := f.request(variables("HOME", "h"))
		same := cmp.Equal(plain, req, cmp.FilterPath(func(p cmp.Path) bool {
			return p.Last().String() == ".Explain"
		}, cmp.Ignore()), cmp.Comparer(func(a, b builder.Secret) bool { return true }), cmp.Comparer(func(a, b builder.Agent) bool { return true }),
			cmp.Comparer(func(a, b builder.Opener) bool { return true }))
		if err == nil && same && len(f.ignored.warnings()) == 0 && !slices.Contains(readElsewhere, flag.Name) {
			t.Errorf("--%s=%s changes nothing", flag.Name, v)
		}
	})
}
