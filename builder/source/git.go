package source

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"

	"filo/layer/rootfs"
)

// wanted is what is to be fetched of a repository.
type wanted struct {
	remote     string // URL or user@host:path
	ref        string // branch, tag, refs/… or commit; "" for the default branch
	subdir     string // clean, "" for all
	checksum   string // commit, or how it begins; "" for any
	byCommit   bool   // fetch the checksum, whatever ref points to
	keepGit    bool
	submodules bool
	commitTime bool // files get the time of the commit
}

// fetchedRepo is a checkout.
type fetchedRepo struct {
	fs       *dirFS
	identity string
	commit   string
	time     int64 // of the commit
	close    func() error
}

// hexID is a commit id or the beginning of one.
var hexID = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^[0-9a-f]+$`)
})

// isCommit reports whether ref is a whole SHA-1 or SHA-256 id.
func isCommit(ref string) bool {
	return (len(ref) == 40 || len(ref) == 64) && hexID().MatchString(ref)
}

// openGit opens a build context in a git repository.
func openGit(ctx context.Context, g *dfgitutil.GitRef, o Options) (*Source, error) {
	keep := o.KeepGitDir || g.KeepGitDir != nil && *g.KeepGitDir
	w, err := want(g, "", keep)
	if err != nil {
		return nil, fmt.Errorf("open context %s: %w", redact(g.Remote), err)
	}
	w.commitTime = w.commitTime || g.MTime == "" && o.Epoch != nil
	r, err := fetchRepo(ctx, w, o)
	if err != nil {
		return nil, fmt.Errorf("open context %s: %w", redact(g.Remote), err)
	}
	return &Source{FS: r.fs, Identity: r.identity, Commit: r.commit, Modified: &r.time, Close: r.close}, nil
}

// fetchGit fetches a git repository for ADD.
func fetchGit(ctx context.Context, g *dfgitutil.GitRef, checksum string, keepGit *bool, o Options) (Fetched, error) {
	if keepGit != nil && g.KeepGitDir != nil && *keepGit != *g.KeepGitDir {
		return Fetched{}, fmt.Errorf("fetch %s: --keep-git-dir=%t contradicts keep-git-dir=%t in the URL", redact(g.Remote), *keepGit, *g.KeepGitDir)
	}
	if keepGit == nil {
		keepGit = g.KeepGitDir
	}
	w, err := want(g, checksum, keepGit != nil && *keepGit)
	if err != nil {
		return Fetched{}, fmt.Errorf("fetch %s: %w", redact(g.Remote), err)
	}
	r, err := fetchRepo(ctx, w, o)
	if err != nil {
		return Fetched{}, fmt.Errorf("fetch %s: %w", redact(g.Remote), err)
	}
	return Fetched{FS: r.fs, Identity: r.identity, Commit: r.commit, Modified: &r.time, Close: r.close}, nil
}

// want checks what a git URL and the flag checksum ask for. The program git gets every part of it as an argument.
func want(g *dfgitutil.GitRef, checksum string, keep bool) (wanted, error) {
	w := wanted{
		remote: g.Remote, ref: g.Ref, checksum: g.Checksum, byCommit: g.FetchByCommit, keepGit: keep,
		subdir:     strings.TrimPrefix(path.Join("/", g.SubDir), "/"),
		submodules: g.Submodules == nil || *g.Submodules,
		commitTime: g.MTime == "commit",
	}
	if g.IndistinguishableFromLocal {
		w.remote = "https://" + w.remote
	}
	if checksum != "" && w.checksum != "" && checksum != w.checksum {
		return w, fmt.Errorf("checksum mismatch: --checksum=%s, the URL has %s", checksum, w.checksum)
	}
	if w.checksum == "" {
		w.checksum = checksum
	}
	w.checksum = strings.ToLower(w.checksum)
	switch {
	case w.checksum != "" && !hexID().MatchString(w.checksum):
		return w, fmt.Errorf("invalid checksum %s: a git checksum is a commit id in hexadecimal digits", w.checksum)
	case strings.HasPrefix(w.ref, "-") || strings.ContainsAny(w.ref, "\x00\n\r\t ~^:?*[\\"):
		return w, fmt.Errorf("invalid ref %q", w.ref)
	case strings.HasPrefix(w.remote, "-"):
		return w, errors.New("invalid URL")
	case w.byCommit && !isCommit(w.ref) && !isCommit(w.checksum):
		return w, errors.New("fetch-by-commit needs the whole commit id, as ref or as checksum")
	case isCommit(w.ref) && !strings.HasPrefix(w.ref, w.checksum):
		return w, fmt.Errorf("checksum mismatch: want %s, the URL names commit %s", w.checksum, w.ref)
	}
	return w, nil
}

// repo is a repository that is being fetched: git runs with its directories.
type repo struct {
	wanted
	place   string // where the remote is: its URL, or where that has moved to
	git     string // the program
	gitDir  string
	tree    string
	env     []string
	secrets []string // to be kept out of errors
}

// fetchRepo fetches w into a new directory below o.Temp and checks it out.
func fetchRepo(ctx context.Context, w wanted, o Options) (_ *fetchedRepo, err error) {
	git, err := exec.LookPath("git")
	if err != nil {
		return nil, fmt.Errorf("git repositories need the program git: %w", err)
	}
	temp, err := os.MkdirTemp(o.Temp, "git-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	r := &repo{wanted: w, place: w.remote, git: git, gitDir: filepath.Join(temp, "git"), tree: filepath.Join(temp, "tree")}
	if w.keepGit && w.subdir == "" {
		r.gitDir = filepath.Join(r.tree, ".git")
	}
	if err := os.Mkdir(r.tree, 0o755); err != nil {
		return nil, err
	}
	if err := r.environ(ctx, temp, o); err != nil {
		return nil, err
	}
	at, err := r.resolve(ctx)
	if err != nil {
		return nil, err
	}
	c, err := r.checkout(ctx, at)
	if err != nil {
		return nil, err
	}
	return r.open(ctx, temp, at, c)
}

// point is where a repository is to be checked out.
type point struct {
	ref    string // full name, "" for a bare commit
	id     string // what ref points to: a commit or an annotated tag
	commit string // the commit of an annotated tag; "" if not known to be another than id
}

// resolve finds out what the ref that is wanted points to now. Of a branch and a tag with one name it takes the branch.
func (r *repo) resolve(ctx context.Context) (point, error) {
	if isCommit(r.ref) {
		return point{id: r.ref}, nil
	}
	if r.byCommit {
		return point{ref: r.fullRef(), id: r.checksum}, nil
	}
	refs, head, err := r.list(ctx)
	if err != nil {
		return point{}, err
	}
	if r.ref == "" {
		if head == "" {
			return point{}, errors.New("the repository does not say what its default branch is")
		}
		return r.match(point{ref: head, id: refs[head]})
	}
	for _, prefix := range []string{"refs/", "refs/heads/", "refs/tags/"} {
		name := prefix + strings.TrimPrefix(r.ref, prefix)
		if id, ok := refs[name]; ok {
			return r.match(point{ref: name, id: id, commit: refs[name+"^{}"]})
		}
	}
	return point{}, fmt.Errorf("the repository does not contain ref %s", r.ref)
}

// fullRef is the name a ref gets that was not looked up: a branch unless it says otherwise.
func (r *repo) fullRef() string {
	if r.ref == "" || strings.HasPrefix(r.ref, "refs/") {
		return r.ref
	}
	return "refs/heads/" + r.ref
}

// match checks the checksum; it may be that of an annotated tag or of its commit.
func (r *repo) match(p point) (point, error) {
	if strings.HasPrefix(p.id, r.checksum) || p.commit != "" && strings.HasPrefix(p.commit, r.checksum) {
		return p, nil
	}
	got := p.id
	if p.commit != "" {
		got += " or " + p.commit
	}
	return p, fmt.Errorf("checksum mismatch: want %s, %s is %s", r.checksum, p.ref, got)
}

// list asks the remote for its refs: their ids by full name, and the name of its default branch.
func (r *repo) list(ctx context.Context) (refs map[string]string, head string, err error) {
	args := []string{"ls-remote", "--symref", "--", r.place}
	if r.ref == "" {
		args = append(args, "HEAD", "refs/heads/*")
	} else {
		args = append(args, r.ref, r.ref+"^{}")
	}
	out, err := r.run(ctx, args...)
	if err != nil {
		return nil, "", err
	}
	refs = map[string]string{}
	for line := range strings.Lines(out) {
		id, name, ok := strings.Cut(strings.TrimSpace(line), "\t")
		if target, isSym := strings.CutPrefix(id, "ref: "); isSym && name == "HEAD" {
			head = target
		} else if ok && isCommit(id) {
			refs[name] = id
		}
	}
	return refs, r.defaultBranch(refs, head), nil
}

// defaultBranch guesses from the id of HEAD where the server keeps to itself what HEAD is (dumb http).
func (r *repo) defaultBranch(refs map[string]string, head string) string {
	if head != "" || refs["HEAD"] == "" {
		return head
	}
	best := ""
	for name, id := range refs {
		if id != refs["HEAD"] || !strings.HasPrefix(name, "refs/heads/") {
			continue
		}
		if name == "refs/heads/main" || name == "refs/heads/master" {
			return name
		}
		if best == "" || name < best {
			best = name
		}
	}
	return best
}

// commit is a commit that was fetched.
type commit struct {
	id  string
	sec int64 // when it was made
}

// checkout fetches at and puts its files in r.tree.
func (r *repo) checkout(ctx context.Context, at point) (c commit, err error) {
	format := "sha1"
	if len(at.id) == 64 {
		format = "sha256"
	}
	if _, err := r.run(ctx, "init", "--quiet", "--template=", "--initial-branch=master", "--object-format="+format); err != nil {
		return c, err
	}
	if c, err = r.fetch(ctx, at); err != nil {
		return c, err
	}
	if !strings.HasPrefix(at.id, r.checksum) && !strings.HasPrefix(c.id, r.checksum) {
		return c, fmt.Errorf("checksum mismatch: want %s, got %s", r.checksum, c.id)
	}
	if _, err := r.run(ctx, "checkout", "--quiet", "--force", "--detach", c.id); err != nil {
		return c, err
	}
	return c, r.updateSubmodules(ctx)
}

// fetch brings at.id into the repository, and nothing but it where the server can do that.
func (r *repo) fetch(ctx context.Context, at point) (commit, error) {
	source := at.id
	if at.ref != "" && !r.byCommit {
		source = at.ref
	}
	spec := source
	if at.ref != "" {
		spec = "+" + source + ":" + at.ref
	}
	_, err := r.run(ctx, "fetch", "--quiet", "--update-head-ok", "--no-tags", "--depth=1", "--", r.place, spec)
	if err != nil && ctx.Err() == nil && isShallowError(err) {
		_, err = r.run(ctx, "fetch", "--quiet", "--update-head-ok", "--no-tags", "--", r.place, spec)
	}
	if err == nil {
		if c, err := r.commit(ctx, at.id); err == nil || ctx.Err() != nil {
			return c, err
		}
	}
	if ctx.Err() != nil || err != nil && source != at.id {
		return commit{}, err
	}
	// The ref has moved meanwhile, or the server gives no commit by its id: take all and look for it.
	_, allErr := r.run(ctx, "fetch", "--quiet", "--update-head-ok", "--no-tags", "--", r.place, "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
	if allErr != nil {
		return commit{}, errors.Join(err, allErr)
	}
	c, noErr := r.commit(ctx, at.id)
	if noErr != nil {
		return c, fmt.Errorf("the repository does not contain commit %s", at.id)
	}
	return c, nil
}

// commit returns the commit id, or the one that the tag id stands for.
func (r *repo) commit(ctx context.Context, id string) (c commit, err error) {
	out, err := r.run(ctx, "show", "--no-patch", "--no-show-signature", "--format=%H %ct", id+"^{commit}")
	if err != nil {
		return c, err
	}
	_, err = fmt.Sscanf(out, "%s %d", &c.id, &c.sec)
	return c, err
}

// isShallowError reports whether git said that the server knows no --depth.
func isShallowError(err error) bool {
	return strings.Contains(err.Error(), "shallow") || strings.Contains(err.Error(), "--depth")
}

func (r *repo) updateSubmodules(ctx context.Context) error {
	if _, err := os.Lstat(filepath.Join(r.tree, ".gitmodules")); !r.submodules || err != nil {
		return nil
	}
	// Relative URLs of submodules start here.
	if _, err := r.run(ctx, "config", "remote.origin.url", r.place); err != nil {
		return err
	}
	args := []string{"submodule", "--quiet", "update", "--init", "--recursive"}
	_, err := r.run(ctx, append(args, "--depth=1")...)
	if err != nil && ctx.Err() == nil && isShallowError(err) {
		_, err = r.run(ctx, args...)
	}
	return err
}

// open makes a file system of the checkout.
func (r *repo) open(ctx context.Context, temp string, at point, c commit) (*fetchedRepo, error) {
	if err := r.tidy(ctx); err != nil {
		return nil, err
	}
	if err := r.checkSubdir(); err != nil {
		return nil, err
	}
	as := gitFile
	if r.commitTime {
		as = func(st rootfs.Stat) rootfs.Stat {
			st = gitFile(st)
			st.Sec, st.Nsec = c.sec, 0
			return st
		}
	}
	d, err := openDirFS(filepath.Join(r.tree, r.subdir), as)
	if err != nil {
		return nil, err
	}
	return &fetchedRepo{fs: d, identity: r.identity(at, c.id), commit: c.id, time: c.sec, close: removing(temp, d.Close)}, nil
}

// gitFile reports a file as git means it: root's, and with the modes that the umask 022 gives.
func gitFile(st rootfs.Stat) rootfs.Stat {
	st.UID, st.GID = 0, 0
	if st.Mode&modeType != modeSymlink {
		owner := st.Mode & 0o700
		st.Mode = st.Mode&modeType | owner | owner>>3&0o050 | owner>>6&0o005
	}
	return st
}

// identity names what was checked out, for keys.
func (r *repo) identity(at point, commit string) string {
	id := commit
	if r.keepGit && r.subdir == "" {
		id = at.id + ".git"
		if at.ref != "" {
			id += "#" + at.ref
		}
	}
	if r.subdir != "" {
		id += ":" + r.subdir
	}
	if !r.submodules {
		id += "(skip-submodules)"
	}
	if r.commitTime {
		id += "(mtime=commit)"
	}
	return id
}

// tidy removes what git needed on the way: with .git the credentials and traces of this fetch, else all of it.
func (r *repo) tidy(ctx context.Context) error {
	if r.keepGit && r.subdir == "" {
		if _, err := r.run(ctx, "config", "remote.origin.url", redact(r.remote)); err != nil {
			return err
		}
		if _, err := r.run(ctx, "reflog", "expire", "--all", "--expire=now"); err != nil {
			return err
		}
		err := os.Remove(filepath.Join(r.gitDir, "FETCH_HEAD"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if err := os.RemoveAll(r.gitDir); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(r.tree, ".gitmodules")); !r.submodules || err != nil {
		return nil
	}
	// A submodule has a file .git that says where its repository is: a place that is no more.
	return filepath.WalkDir(r.tree, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == ".git" {
			return os.RemoveAll(p)
		}
		return err
	})
}

// checkSubdir sees to it that the way to the subdirectory goes through directories of the repository alone.
func (r *repo) checkSubdir() error {
	if r.subdir == "" {
		return nil
	}
	root, err := rootfs.Open(r.tree)
	if err != nil {
		return err
	}
	defer root.Close()
	at := ""
	for part := range strings.SplitSeq(r.subdir, "/") {
		at = path.Join(at, part)
		st, err := root.Lstat(at)
		if err != nil {
			return fmt.Errorf("subdirectory %s: %w", r.subdir, err)
		}
		if st.Mode&modeType != modeDir {
			return fmt.Errorf("subdirectory %s: %s is not a directory", r.subdir, at)
		}
	}
	return nil
}

// stopTime is how long git and what it started may take to end once they are told to.
const stopTime = 5 * time.Second

// run runs git and returns what it prints.
func (r *repo) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, r.git, args...)
	var stdout, stderr bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = r.tree, r.env, &stdout, &stderr
	cmd.Cancel = func() error { return stop(cmd.Process) }
	cmd.WaitDelay = stopTime
	err := cmd.Run()
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		return "", fmt.Errorf("git %s: %w: %s", args[0], err, r.hide(strings.TrimSpace(stderr.String())))
	}
	return stdout.String(), nil
}

// stop ends git and the helpers it has started: they would wait for a server that does not answer.
func stop(git *os.Process) error {
	for _, pid := range children(git.Pid) {
		if p, err := os.FindProcess(pid); err == nil {
			_ = p.Kill() // gone is as good
		}
	}
	return git.Signal(os.Interrupt) // it removes its locks
}

// children returns the processes below pid, the deepest first.
func children(pid int) (all []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid)) // a kernel without it has the delay
	for _, s := range strings.Fields(string(b)) {
		child, err := strconv.Atoi(s)
		if err != nil {
			continue
		}
		all = append(append(all, children(child)...), child)
	}
	return all
}

// hide takes credentials out of what git says.
func (r *repo) hide(text string) string {
	text = strings.ReplaceAll(text, r.place, redact(r.place))
	for _, s := range r.secrets {
		text = strings.ReplaceAll(text, s, "xxxxx")
	}
	return text
}

// settings overrule what a repository brings along and what git would find on the machine.
var settings = [][2]string{
	{"core.hooksPath", os.DevNull},
	{"core.fsmonitor", "false"},
	{"core.attributesFile", os.DevNull},
	{"core.autocrlf", "false"},
	{"core.symlinks", "true"},
	{"credential.helper", ""},
	{"fetch.recurseSubmodules", "false"},
	{"submodule.recurse", "false"},
	{"gc.auto", "0"},
	{"maintenance.auto", "false"},
	{"advice.detachedHead", "false"},
	{"safe.directory", "*"}, // the directories are ours, whatever a user namespace makes of their owner
}

// environ sets r.env: nothing of this process's environment but the way to programs, proxies and certificates.
// Settings go there as well, since credentials are among them and arguments can be read by every user.
func (r *repo) environ(ctx context.Context, temp string, o Options) error {
	for _, v := range exec.Command(r.git).Environ() {
		name, _, _ := strings.Cut(v, "=")
		if passed[strings.ToUpper(name)] {
			r.env = append(r.env, v)
		}
	}
	r.env = append(r.env,
		"HOME="+os.DevNull, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL="+os.DevNull, "GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0", "GIT_ALLOW_PROTOCOL=http:https:git:ssh", "GIT_SSH_VARIANT=ssh", "LC_ALL=C",
		"GIT_DIR="+r.gitDir, "GIT_WORK_TREE="+r.tree,
		"GIT_SSH_COMMAND="+sshCommand(filepath.Join(temp, "known_hosts")),
	)
	if o.SSHAuthSock != "" {
		r.env = append(r.env, "SSH_AUTH_SOCK="+o.SSHAuthSock)
	}
	auth, err := r.signIn(ctx, o)
	if err != nil {
		return err
	}
	all := slices.Concat(settings, auth)
	r.env = append(r.env, "GIT_CONFIG_COUNT="+strconv.Itoa(len(all)))
	for i, kv := range all {
		r.env = append(r.env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, kv[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, kv[1]))
	}
	return nil
}

// passed are the variables that git gets from this process, lower-case spellings included.
var passed = map[string]bool{
	"PATH": true, "HTTP_PROXY": true, "HTTPS_PROXY": true, "NO_PROXY": true, "ALL_PROXY": true,
	"SSL_CERT_FILE": true, "SSL_CERT_DIR": true, "GIT_SSL_CAINFO": true, "GIT_SSL_CAPATH": true, "GIT_EXEC_PATH": true,
}

// sshCommand makes ssh use the agent alone and ask nothing. The first file takes the keys of hosts not seen before;
// a host whose key is not the one that the user knows is refused.
func sshCommand(knownHosts string) string {
	files := `"` + strings.ReplaceAll(knownHosts, "%", "%%") + `" ~/.ssh/known_hosts`
	return "ssh -F " + os.DevNull + " -o BatchMode=yes -o IdentityFile=" + os.DevNull +
		" -o StrictHostKeyChecking=accept-new -o 'UserKnownHostsFile=" + strings.ReplaceAll(files, "'", `'\''`) + "'"
}

// helper is what git asks for a user and password. It is asked for the repository's own host alone, so that a redirect
// takes them nowhere else, as it would a header.
const helper = `!f() { test "$1" != get || printf 'username=%s\npassword=%s\n' "$FILO_GIT_USER" "$FILO_GIT_PASSWORD"; }; f`

// signIn returns the settings by which git signs in with what secrets hold for the repository, and sets r.place.
func (r *repo) signIn(ctx context.Context, o Options) ([][2]string, error) {
	header, err := r.authorization(o)
	if header == "" || err != nil {
		return nil, err
	}
	u, err := url.Parse(r.remote)
	if err != nil {
		return nil, errors.New("invalid URL")
	}
	if now := moved(ctx, r.remote, header, o); now != nil {
		if isHome(u, now) {
			now.User, u = u.User, now
		}
		r.place = now.String()
	}
	host := u.Scheme + "://" + u.Host + "/"
	user, password, ok := (&http.Request{Header: http.Header{"Authorization": {header}}}).BasicAuth()
	if !ok {
		return [][2]string{{"http." + host + ".extraHeader", "Authorization: " + header}, {"http." + host + ".followRedirects", "false"}}, nil
	}
	r.secrets = append(r.secrets, password)
	r.env = append(r.env, "FILO_GIT_USER="+user, "FILO_GIT_PASSWORD="+password)
	return [][2]string{{"credential." + host + ".helper", helper}}, nil
}

// moved returns where a repository is now if its server redirects to another place, else nil. git would take a header along
// to it, and heeds a redirect only if it need not sign in before.
func moved(ctx context.Context, remote, header string, o Options) *url.URL {
	const refs = "/info/refs"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(remote, "/")+refs+"?service=git-upload-pack", nil)
	if err != nil {
		return nil
	}
	req.Header.Set("Authorization", header)
	resp, err := newClient(o).Do(req)
	if err != nil {
		return nil // git will say what is wrong
	}
	resp.Body.Close()
	last := resp.Request.URL
	path, ok := strings.CutSuffix(last.Path, refs)
	if last == req.URL || !ok {
		return nil
	}
	return &url.URL{Scheme: last.Scheme, Host: last.Host, Path: path}
}

// authorization returns the http header that secrets hold for the repository, "" for none. The host's own secret wins.
func (r *repo) authorization(o Options) (string, error) {
	u, err := url.Parse(r.remote)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return "", nil
	}
	if p, ok := u.User.Password(); ok && p != "" {
		r.secrets = append(r.secrets, p)
	}
	for _, id := range []string{"GIT_AUTH_HEADER." + u.Host, "GIT_AUTH_TOKEN." + u.Host, "GIT_AUTH_HEADER", "GIT_AUTH_TOKEN"} {
		value, ok := o.secret(id)
		if !ok {
			continue
		}
		if strings.ContainsAny(value, "\r\n\x00") {
			return "", fmt.Errorf("secret %s: more than one line", id)
		}
		r.secrets = append(r.secrets, value)
		if strings.HasPrefix(id, "GIT_AUTH_TOKEN") {
			value = "basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+value))
			r.secrets = append(r.secrets, value)
		}
		return value, nil
	}
	return "", nil
}
