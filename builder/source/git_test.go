package source

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/cgi"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
)

// gitServer serves the repositories of a directory by http, those below /dumb/ as plain files.
type gitServer struct {
	t    testing.TB
	dir  string
	url  string
	auth atomic.Value // string: what clients must send; "" is nothing
}

// commitTime is the time of every commit.
const commitTime = 1577836800

func newGitServer(t testing.TB) *gitServer {
	t.Helper()
	git, err := exec.LookPath("git")
	if err != nil {
		t.Skip("git is not installed")
	}
	s := &gitServer{t: t, dir: t.TempDir()}
	s.auth.Store("")
	backend := &cgi.Handler{Path: git, Args: []string{"http-backend"}, Stderr: io.Discard, Env: []string{
		"GIT_PROJECT_ROOT=" + s.dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
	}}
	files := http.StripPrefix("/dumb/", http.FileServer(http.Dir(s.dir)))
	s.url = serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch auth := s.auth.Load(); {
		case auth != "" && r.Header.Get("Authorization") != auth:
			w.Header().Set("WWW-Authenticate", "Basic")
			http.Error(w, "who are you", http.StatusUnauthorized)
		case strings.HasPrefix(r.URL.Path, "/dumb/"):
			files.ServeHTTP(w, r)
		default:
			if v := r.Header.Get("Git-Protocol"); v != "" {
				backend := *backend
				backend.Env = append(backend.Env[:len(backend.Env):len(backend.Env)], "GIT_PROTOCOL="+v)
				backend.ServeHTTP(w, r)
				return
			}
			backend.ServeHTTP(w, r)
		}
	})
	return s
}

// git runs git in the directory dir of the server.
func (s *gitServer) git(dir string, args ...string) string {
	s.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = filepath.Join(s.dir, dir)
	date := strconv.Itoa(commitTime) + " +0000"
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@h",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@h", "GIT_AUTHOR_DATE=" + date, "GIT_COMMITTER_DATE=" + date,
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// ids are the commits and tags of the repository that repo makes.
type ids struct{ one, two, side, tag string }

// repo makes name.git: main with two commits, the annotated tag v1 and the plain tag light at the first, a branch
// side, and a branch and a tag called both.
func (s *gitServer) repo(name string) (id ids) {
	s.t.Helper()
	work := name + ".work"
	must(s.t, os.MkdirAll(filepath.Join(s.dir, work), 0o755))
	s.git(work, "init", "-q", "-b", "main")
	write(s.t, filepath.Join(s.dir, work), map[string]string{"file": "one", "sub/deep/s": "s", "tool": "#!/bin/sh", "link": "-> file", "sub/up": "-> ../file"})
	must(s.t, os.Chmod(filepath.Join(s.dir, work, "tool"), 0o755))
	id.one = s.commit(work, "one")
	s.git(work, "tag", "-a", "-m", "v1", "v1")
	s.git(work, "tag", "light")
	s.git(work, "tag", "both")
	id.tag = s.git(work, "rev-parse", "v1")
	write(s.t, filepath.Join(s.dir, work), map[string]string{"file": "two"})
	id.two = s.commit(work, "two")
	s.git(work, "checkout", "-q", "-b", "side")
	write(s.t, filepath.Join(s.dir, work), map[string]string{"file": "side"})
	id.side = s.commit(work, "side")
	s.git(work, "branch", "both")
	s.git(work, "branch", "master")
	s.git(work, "checkout", "-q", "main")
	s.bare(work, name)
	return id
}

func (s *gitServer) commit(work, message string) string {
	s.t.Helper()
	s.git(work, "add", "-A")
	s.git(work, "commit", "-q", "-m", message)
	return s.git(work, "rev-parse", "HEAD")
}

func (s *gitServer) bare(work, name string) {
	s.t.Helper()
	s.git(".", "clone", "-q", "--bare", work, name+".git")
	s.git(name+".git", "update-server-info")
}

func (s *gitServer) fetch(ref, checksum string, keep *bool, o Options) (Fetched, error) {
	s.t.Helper()
	o.Temp = s.t.TempDir()
	f, err := Fetch(context.Background(), s.url+ref, checksum, keep, o)
	left, _ := os.ReadDir(o.Temp)
	if err != nil {
		if len(left) > 0 {
			s.t.Errorf("left in the temporary directory: %v", left)
		}
		return f, err
	}
	s.t.Cleanup(func() {
		must(s.t, f.Close())
		if left, _ := os.ReadDir(o.Temp); len(left) > 0 {
			s.t.Errorf("left in the temporary directory after Close: %v", left)
		}
	})
	return f, nil
}

func TestGitRefs(t *testing.T) {
	s := newGitServer(t)
	id := s.repo("r")
	for i, c := range []struct{ ref, checksum, file, identity string }{
		{"", "", "two", id.two},
		{"#main", "", "two", id.two},
		{"#side", "", "side", id.side},
		{"#master", "", "side", id.side},
		{"#refs/heads/side", "", "side", id.side},
		{"#heads/side", "", "side", id.side},
		{"#v1", "", "one", id.one},
		{"#light", "", "one", id.one},
		{"#refs/tags/v1", "", "one", id.one},
		{"#both", "", "side", id.side},
		{"?tag=both", "", "one", id.one},
		{"?branch=both", "", "side", id.side},
		{"?ref=side", "", "side", id.side},
		{"#" + id.one, "", "one", id.one},
		{"#" + id.tag, "", "one", id.one},
		{"#main", id.two, "two", id.two},
		{"#main", id.two[:7], "two", id.two},
		{"#v1", id.tag, "one", id.one},
		{"#v1", id.one[:12], "one", id.one},
		{"?ref=v1&checksum=" + id.one, "", "one", id.one},
		{"?ref=v1&commit=" + id.one[:8], id.one[:8], "one", id.one},
		{"?branch=main&checksum=" + id.one + "&fetch-by-commit=true", "", "one", id.one},
		{"?checksum=" + id.side + "&fetch-by-commit=1", "", "side", id.side},
		{"?submodules=false", "", "two", id.two + "(skip-submodules)"},
		{"?mtime=commit", "", "two", id.two + "(mtime=commit)"},
	} {
		for _, at := range []string{"/r.git", "/dumb/r.git"} {
			if at != "/r.git" && i%4 != 0 { // they differ in how refs are found and commits fetched only
				continue
			}
			f, err := s.fetch(at+c.ref, c.checksum, nil, Options{})
			if err != nil {
				t.Errorf("Fetch(%s%s, %q) = %v", at, c.ref, c.checksum, err)
				continue
			}
			if got := read(t, f.FS, "file"); got != c.file || f.Identity != c.identity || f.Name != "" {
				t.Errorf("Fetch(%s%s, %q): file holds %q, identity %s, want %q, %s", at, c.ref, c.checksum, got, f.Identity, c.file, c.identity)
			}
		}
	}
}

func TestGitErrors(t *testing.T) {
	s := newGitServer(t)
	id := s.repo("r")
	yes := true
	for _, c := range []struct {
		ref, checksum string
		keep          *bool
		want          string
	}{
		{"/r.git#nosuchref", "", nil, "does not contain ref nosuchref"},
		{"/none.git", "", nil, "git ls-remote"},
		{"/r.git#" + strings.Repeat("1", 40), "", nil, "11111"},
		{"/r.git#main", "0123456", nil, "checksum mismatch: want 0123456"},
		{"/r.git#v1", id.two, nil, "checksum mismatch: want " + id.two},
		{"/r.git#" + id.one, id.two, nil, "checksum mismatch"},
		{"/r.git#main", "sha256:abc", nil, "hexadecimal"},
		{"/r.git?checksum=" + id.one, id.two, nil, "checksum mismatch"},
		{"/r.git?keep-git-dir=false", "", &yes, "keep-git-dir"},
		{"/r.git?nonsense=1", "", nil, "nonsense"},
		{"/r.git?ref=a#b", "", nil, "conflicts"},
		{"/r.git?branch=main&fetch-by-commit=1", "", nil, "fetch-by-commit"},
		{"/r.git?ref=--upload-pack=/bin/sh", "", nil, "invalid ref"},
		{"/r.git?ref=a:b", "", nil, "invalid ref"},
		{"/r.git#main:nowhere", "", nil, "nowhere"},
		{"/r.git#main:file", "", nil, "not a directory"},
		{"/r.git#main:sub/up", "", nil, "not a directory"},
	} {
		_, err := s.fetch(c.ref, c.checksum, c.keep, Options{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Fetch(%s, %q) = %v, want %q", c.ref, c.checksum, err, c.want)
		}
	}
}

func TestGitFiles(t *testing.T) {
	s := newGitServer(t)
	s.repo("r")
	f, err := s.fetch("/r.git?mtime=commit", "", nil, Options{})
	must(t, err)
	if got := names(t, f.FS); got != "file link sub/ sub/deep/ sub/deep/s sub/up tool" {
		t.Errorf("holds %s", got)
	}
	for name, mode := range map[string]uint32{"file": modeRegular | 0o644, "tool": modeRegular | 0o755, "sub": modeDir | 0o755, "link": modeSymlink | 0o777, ".": modeDir | 0o755} {
		if st := statOf(t, f.FS, name); st.Mode != mode || st.UID != 0 || st.GID != 0 || st.Sec != commitTime || st.Nsec != 0 {
			t.Errorf("%s = %+v, want mode %o", name, st, mode)
		}
	}
	if f.Modified == nil || *f.Modified != commitTime {
		t.Errorf("time %v, want %d", f.Modified, commitTime)
	}
	sub, err := s.fetch("/r.git#main:sub", "", nil, Options{})
	must(t, err)
	if got := names(t, sub.FS); got != "deep/ deep/s up" || !strings.HasSuffix(sub.Identity, ":sub") {
		t.Errorf("sub holds %s, identity %s", got, sub.Identity)
	}
	if _, err := sub.FS.Open("up"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open(up) = %v, want not exist: it leads out of the subdirectory", err)
	}
	if st := statOf(t, sub.FS, "deep/s"); st.Sec == commitTime {
		t.Error("without mtime=commit a file has the time of the commit")
	}
}

func TestGitKeep(t *testing.T) {
	s := newGitServer(t)
	id := s.repo("r")
	yes := true
	s.auth.Store("Basic " + base64.StdEncoding.EncodeToString([]byte("u:hunter2")))
	with := strings.Replace(s.url, "http://", "http://u:hunter2@", 1)
	for _, ref := range []string{"", "#v1", "#" + id.one, "#side", "#master"} {
		f, err := Fetch(context.Background(), with+"/r.git"+ref, "", &yes, Options{Temp: t.TempDir()})
		must(t, err)
		defer f.Close()
		config := read(t, f.FS, ".git/config")
		if strings.Contains(config, "hunter2") || !strings.Contains(config, "/r.git") || strings.Contains(config, "worktree") {
			t.Errorf("%s: .git/config is %s", ref, config)
		}
		for _, name := range []string{".git/FETCH_HEAD", ".git/hooks", ".git/logs/HEAD"} {
			if b, err := fs.ReadFile(f.FS, name); err == nil && len(b) > 0 {
				t.Errorf("%s: %s holds %q", ref, name, b)
			}
		}
		if !strings.Contains(f.Identity, ".git") {
			t.Errorf("identity %s", f.Identity)
		}
		if st := statOf(t, f.FS, ".git/HEAD"); st.Mode != modeRegular|0o644 {
			t.Errorf(".git/HEAD has mode %o", st.Mode)
		}
		dir := f.FS.(*dirFS).root.Name()
		out, err := exec.Command("git", "-c", "safe.directory=*", "-C", dir, "status", "--porcelain").CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: git status: %v, %s", ref, err, out)
		}
	}
	f, err := Fetch(context.Background(), with+"/r.git#main:sub", "", &yes, Options{Temp: t.TempDir()})
	must(t, err)
	defer f.Close()
	if got := names(t, f.FS); got != "deep/ deep/s up" {
		t.Errorf("a subdirectory with .git kept holds %s", got)
	}
}

func TestOpenGit(t *testing.T) {
	s := newGitServer(t)
	id := s.repo("r")
	var epoch int64 = 5
	for _, c := range []struct {
		ref      string
		o        Options
		identity string
		commit   bool // files have its time
	}{
		{"#v1:sub", Options{}, id.one + ":sub", false},
		{"#v1:sub", Options{Epoch: &epoch}, id.one + ":sub(mtime=commit)", true},
		{"?mtime=checkout&tag=v1&subdir=sub", Options{Epoch: &epoch}, id.one + ":sub", false},
	} {
		c.o.Temp = t.TempDir()
		src, err := Open(context.Background(), s.url+"/r.git"+c.ref, c.o)
		must(t, err)
		defer src.Close()
		if src.Local || src.Root != "" || src.Dockerfile != nil || src.Identity != c.identity || *src.Modified != commitTime {
			t.Errorf("Open(%s) = %+v, want identity %s", c.ref, src, c.identity)
		}
		if st := statOf(t, src.FS, "deep/s"); (st.Sec == commitTime) != c.commit {
			t.Errorf("Open(%s): deep/s is of %d", c.ref, st.Sec)
		}
	}
	src, err := Open(context.Background(), s.url+"/r.git", Options{KeepGitDir: true, Temp: t.TempDir()})
	must(t, err)
	defer src.Close()
	if _, err := fs.Stat(src.FS, ".git/HEAD"); err != nil {
		t.Errorf("KeepGitDir: %v", err)
	}
	_, err = Open(context.Background(), s.url+"/r.git?nonsense=1", Options{})
	wantError(t, err, "nonsense")
}

func TestGitSubmodules(t *testing.T) {
	s := newGitServer(t)
	s.repo("inner")
	s.module("middle", "inner", "../inner.git")
	s.module("outer", "middle", "../middle.git")
	s.auth.Store("Basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:t0ken")))
	o := Options{Secret: func(id string) ([]byte, bool) { return []byte("t0ken\n"), id == "GIT_AUTH_TOKEN" }}
	f, err := s.fetch("/outer.git", "", nil, o)
	must(t, err)
	if got := read(t, f.FS, "middle/inner/file"); got != "two" {
		t.Errorf("middle/inner/file holds %q", got)
	}
	if got := names(t, f.FS); strings.Contains(got, ".git ") || strings.Contains(got, ".git/") {
		t.Errorf("holds %s", got)
	}
	f, err = s.fetch("/outer.git?submodules=0", "", nil, o)
	must(t, err)
	if got := names(t, f.FS); got != ".gitmodules middle/" {
		t.Errorf("without submodules: %s", got)
	}
}

// module makes name.git with the submodule sub from url.
func (s *gitServer) module(name, sub, url string) {
	s.t.Helper()
	work := name + ".work"
	must(s.t, os.MkdirAll(filepath.Join(s.dir, work), 0o755))
	s.git(work, "init", "-q", "-b", "main")
	s.git(work, "clone", "-q", filepath.Join(s.dir, sub+".git"), sub)
	write(s.t, filepath.Join(s.dir, work), map[string]string{".gitmodules": "[submodule \"" + sub + "\"]\n\tpath = " + sub + "\n\turl = " + url + "\n"})
	s.commit(work, "module")
	s.bare(work, name)
}

func TestGitHostileModule(t *testing.T) {
	s := newGitServer(t)
	s.repo("inner")
	for name, url := range map[string]string{"file": "file://" + s.dir + "/inner.git", "path": s.dir + "/inner.git", "ext": "ext::touch " + s.dir + "/owned"} {
		s.module(name, "inner", url)
		_, err := s.fetch("/"+name+".git", "", nil, Options{})
		wantError(t, err, "not allowed")
	}
	if _, err := os.Stat(filepath.Join(s.dir, "owned")); err == nil {
		t.Error("a submodule ran a program")
	}
}

func TestGitAuth(t *testing.T) {
	s := newGitServer(t)
	s.repo("r")
	token := "Basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:t0ken"))
	host := strings.TrimPrefix(s.url, "http://")
	for _, c := range []struct{ id, value, auth string }{
		{"GIT_AUTH_TOKEN", "t0ken", token},
		{"GIT_AUTH_TOKEN." + host, "t0ken\n", token},
		{"GIT_AUTH_HEADER", "Bearer x", "Bearer x"},
		{"GIT_AUTH_HEADER", "basic " + strings.TrimPrefix(token, "Basic "), token},
		{"GIT_AUTH_HEADER." + host, "Bearer x", "Bearer x"},
	} {
		s.auth.Store(c.auth)
		o := Options{Secret: func(id string) ([]byte, bool) { return []byte(c.value), id == c.id }}
		if _, err := s.fetch("/r.git", "", nil, o); err != nil {
			t.Errorf("with %s: %v", c.id, err)
		}
		if _, err := s.fetch("/dumb/r.git", "", nil, o); err != nil {
			t.Errorf("dumb with %s: %v", c.id, err)
		}
	}
	s.auth.Store("nobody has it")
	_, err := s.fetch("/r.git", "", nil, Options{})
	wantError(t, err, "/r.git", "git ls-remote")
	o := Options{Secret: func(id string) ([]byte, bool) { return []byte("a\nb"), id == "GIT_AUTH_HEADER" }}
	_, err = s.fetch("/r.git", "", nil, o)
	wantError(t, err, "GIT_AUTH_HEADER")
}

// TestGitRedirect sees to it that a host gets what secrets hold for a repository only if that is on it.
func TestGitRedirect(t *testing.T) {
	s := newGitServer(t)
	s.repo("r")
	var leaked atomic.Bool
	elsewhere := serve(t, func(w http.ResponseWriter, r *http.Request) {
		leaked.Store(leaked.Load() || r.Header.Get("Authorization") != "")
		backend, err := url.Parse(s.url)
		must(t, err)
		httputil.NewSingleHostReverseProxy(backend).ServeHTTP(w, r)
	})
	elsewhere = strings.Replace(elsewhere, "127.0.0.1", "localhost", 1)
	here := ""
	here = serve(t, func(w http.ResponseWriter, r *http.Request) {
		path, renamed := strings.CutPrefix(r.URL.Path, "/old/")
		switch _, password, _ := r.BasicAuth(); {
		case password != "t0ken" && !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer "):
			w.Header().Set("WWW-Authenticate", "Basic")
			http.Error(w, "who are you", http.StatusUnauthorized)
		case renamed:
			http.Redirect(w, r, here+"/"+path+"?"+r.URL.RawQuery, http.StatusMovedPermanently)
		case strings.HasPrefix(r.URL.Path, "/new/"):
			backend, err := url.Parse(s.url)
			must(t, err)
			r.URL.Path = strings.TrimPrefix(r.URL.Path, "/new")
			httputil.NewSingleHostReverseProxy(backend).ServeHTTP(w, r)
		default:
			http.Redirect(w, r, elsewhere+r.URL.Path+"?"+r.URL.RawQuery, http.StatusFound)
		}
	})
	fetch := func(path, id, value string) error {
		o := Options{Secret: func(asked string) ([]byte, bool) { return []byte(value), asked == id }}
		f, err := Fetch(t.Context(), here+path, "", nil, o)
		if err == nil {
			f.Close()
		}
		return err
	}
	for _, path := range []string{"/old/new/r.git", "/r.git"} {
		for id, value := range map[string]string{"GIT_AUTH_TOKEN": "t0ken", "GIT_AUTH_HEADER": "Bearer x"} {
			if err := fetch(path, id, value); err != nil {
				t.Errorf("%s with %s: %v", path, id, err)
			}
		}
	}
	if leaked.Load() {
		t.Error("the other host was told a secret")
	}
}

func TestGitSHA256(t *testing.T) {
	s := newGitServer(t)
	must(t, os.Mkdir(filepath.Join(s.dir, "w"), 0o755))
	s.git("w", "init", "-q", "-b", "main", "--object-format=sha256")
	write(t, filepath.Join(s.dir, "w"), map[string]string{"f": "x"})
	id := s.commit("w", "one")
	s.bare("w", "r")
	for _, ref := range []string{"", "#main", "#" + id} {
		f, err := s.fetch("/r.git"+ref, "", nil, Options{})
		must(t, err)
		if f.Identity != id || read(t, f.FS, "f") != "x" {
			t.Errorf("Fetch(%s) is %s, want %s", ref, f.Identity, id)
		}
	}
}

// TestGitCanceled cancels while the server keeps git waiting.
func TestGitCanceled(t *testing.T) {
	newGitServer(t) // skips without git
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { cancel(); <-done })
	temp := t.TempDir()
	_, err := Fetch(ctx, url+"/r.git", "", nil, Options{Temp: temp})
	close(done)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Fetch = %v, want canceled", err)
	}
	if left, _ := os.ReadDir(temp); len(left) > 0 {
		t.Errorf("left in the temporary directory: %v", left)
	}
}

func TestGitMissing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Fetch(context.Background(), "https://127.0.0.1:1/r.git", "", nil, Options{Temp: t.TempDir()})
	wantError(t, err, "need the program git", "r.git")
}

func TestGitEnvironment(t *testing.T) {
	for k, v := range map[string]string{
		"GIT_DIR": "/evil", "GIT_SSH_COMMAND": "evil", "GIT_CONFIG_PARAMETERS": "'a.b'='c'", "https_proxy": "http://p", "GIT_ASKPASS": "evil",
	} {
		t.Setenv(k, v)
	}
	r := &repo{git: "git", gitDir: "/g", tree: "/t", wanted: wanted{remote: "git@h:r"}}
	must(t, r.environ(t.Context(), "/tmp/it's", Options{SSHAuthSock: "/sock"}))
	env := "\n" + strings.Join(r.env, "\n") + "\n"
	for _, want := range []string{"https_proxy=http://p", "GIT_DIR=/g", "SSH_AUTH_SOCK=/sock", "GIT_TERMINAL_PROMPT=0", "HOME=/dev/null"} {
		if !strings.Contains(env, "\n"+want+"\n") {
			t.Errorf("no %s in the environment", want)
		}
	}
	if strings.Contains(env, "evil") || strings.Contains(env, "PARAMETERS") {
		t.Errorf("environment %s", env)
	}
}

func TestWantShortForm(t *testing.T) {
	g, _, err := dfgitutil.ParseGitRef("github.com/o/r#main:a/../../b")
	must(t, err)
	w, err := want(g, "", false)
	must(t, err)
	if w.remote != "https://github.com/o/r" || w.subdir != "b" || w.ref != "main" || !w.submodules {
		t.Errorf("want = %+v", w)
	}
}

// TestGitSSH has a program ssh that runs what is asked for on this machine.
func TestGitSSH(t *testing.T) {
	s := newGitServer(t)
	id := s.repo("r")
	bin := t.TempDir()
	log := filepath.Join(bin, "log")
	script := "#!/bin/sh\nprintf '%s|' \"$SSH_AUTH_SOCK\" \"$@\" >>" + log + "\nfor last; do :; done\nexec sh -c \"$last\"\n"
	must(t, os.WriteFile(filepath.Join(bin, "ssh"), []byte(script), 0o755))
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	f, err := Fetch(context.Background(), "git@h.example:"+s.dir+"/r.git#v1", "", nil, Options{Temp: t.TempDir(), SSHAuthSock: "/agent"})
	must(t, err)
	defer f.Close()
	b, err := os.ReadFile(log)
	must(t, err)
	if f.Identity != id.one || !strings.HasPrefix(string(b), "/agent|-F|/dev/null|-o|BatchMode=yes|") || !strings.Contains(string(b), `known_hosts" ~/.ssh/known_hosts|`) {
		t.Errorf("identity %s, want %s; ssh was called with %s", f.Identity, id.one, b)
	}
}
