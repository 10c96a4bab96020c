package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/docker/go-units"

	"filo/builder"
	"filo/builder/source"
)

// dockerfileLimit bounds a Dockerfile: it is held in memory.
const dockerfileLimit = 16 << 20

// read opens the build context ref and everything else that the request is made of.
func (j *job) read(ctx context.Context, ref string) error {
	o := source.Options{
		Temp: j.store.TempDir(), UserAgent: "filo/" + version(), Epoch: j.req.Epoch, Secret: j.secret,
		KeepGitDir: truthy(j.req.Args["BUILDKIT_CONTEXT_KEEP_GIT_DIR"]), SSHAuthSock: j.getenv("SSH_AUTH_SOCK"),
		Keep: filepath.Join(j.store.Dir(), "sources", "http"), Repaired: j.repairs.add,
	}
	file := j.flags.what.file
	if ref == "-" || file == "-" {
		stdin := until(ctx, j.stdin)
		j.closers = append(j.closers, stdin.Close)
		o.Stdin = stdin
	}
	src, err := source.Open(ctx, ref, o)
	if err != nil {
		return err
	}
	j.closers = append(j.closers, src.Close)
	d, err := j.readDockerfile(ctx, src, ref, o)
	if err != nil {
		return err
	}
	j.req.File, j.req.FileName = d.text, path.Base(d.name)
	j.req.Context, j.req.Root, j.req.Modified = src.FS, src.Root, src.Modified
	j.origin.file = d.name
	j.origin.here = src.Local || ref == "-" || d.path != "" || file == "-" || source.IsURL(file)
	j.origin.opened("", ref, src)
	j.checkout(ctx, src.Root, d.path)
	if src.Local {
		if j.req.Context, err = j.ignore(src.FS, d); err != nil {
			return err
		}
	}
	if len(j.req.SSH) == 0 {
		o.SSHAuthSock = "" // a Dockerfile may use the agent only if --ssh says so
	}
	j.req.Open = func(ctx context.Context, url, checksum string, keepGit *bool) (builder.Fetched, error) {
		f, err := source.Fetch(ctx, url, checksum, keepGit, o)
		return builder.Fetched{FS: f.FS, Name: f.Name, Identity: f.Identity, Commit: f.Commit, Modified: f.Modified, Close: f.Close}, err
	}
	return j.readNamed(ctx, o)
}

// secret gives the source room what it needs to sign in: GIT_AUTH_TOKEN and its like.
func (j *job) secret(id string) ([]byte, bool) {
	s, ok := j.req.Secrets[id]
	if !ok {
		return nil, false
	}
	b, err := s()
	return b, err == nil
}

// dockerfileText is a Dockerfile that was read.
type dockerfileText struct {
	text []byte
	name string
	path string // of a local file; "" if it came from somewhere else
}

// readDockerfile finds the Dockerfile: what -f says, or the context's own.
func (j *job) readDockerfile(ctx context.Context, src *source.Source, ref string, o source.Options) (d dockerfileText, err error) {
	file := j.flags.what.file
	name := file
	if name == "" || name == "-" {
		name = "Dockerfile"
	}
	err = j.task("[internal] load build definition from "+path.Base(name), func(say func(string)) error {
		switch {
		case src.Dockerfile != nil && file != "" && (ref == "-" || file != defaultNames[0]): // scripts give --file always
			err = errors.New("ambiguous Dockerfile: the context is one, and --file names another")
		case src.Dockerfile != nil:
			d = dockerfileText{text: src.Dockerfile, name: "Dockerfile"}
		case file == "-":
			d.name = "Dockerfile"
			d.text, err = readAll(o.Stdin)
		case source.IsURL(file):
			d, err = fetchDockerfile(ctx, file, o)
		case src.Local:
			d, err = localDockerfile(ctx, file, ref)
		default:
			d, err = remoteDockerfile(ctx, file, src, ref == "-")
		}
		if err == nil {
			say("transferring dockerfile: " + units.HumanSize(float64(len(d.text))) + " done")
		}
		return err
	})
	return d, err
}

func readAll(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, dockerfileLimit+1))
	if len(b) > dockerfileLimit {
		return nil, errors.New("read Dockerfile: larger than " + units.BytesSize(dockerfileLimit))
	}
	return b, err
}

func fetchDockerfile(ctx context.Context, url string, o source.Options) (dockerfileText, error) {
	f, err := source.Fetch(ctx, url, "", nil, o)
	if err != nil {
		return dockerfileText{}, err
	}
	defer f.Close()
	if f.Name == "" {
		return dockerfileText{}, fmt.Errorf("read Dockerfile %s: it is a repository, not a file", url)
	}
	return readFrom(f.FS, f.Name)
}

// readFrom reads the Dockerfile name of a file system.
func readFrom(fsys fs.FS, name string) (dockerfileText, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return dockerfileText{}, err
	}
	defer f.Close()
	text, err := readAll(f)
	return dockerfileText{text: text, name: name}, err
}

// defaultNames are the names of a Dockerfile where --file gives none, in the order of trying.
var defaultNames = [...]string{"Dockerfile", "dockerfile", "Containerfile"}

// localDockerfile reads --file, relative to the working directory, or the Dockerfile of a local context.
func localDockerfile(ctx context.Context, file, dir string) (dockerfileText, error) {
	if file != "" {
		return openDockerfile(ctx, file)
	}
	for _, name := range defaultNames {
		d, err := openDockerfile(ctx, filepath.Join(dir, name))
		if !errors.Is(err, fs.ErrNotExist) {
			return d, err
		}
	}
	return dockerfileText{}, notFound(filepath.Join(dir, defaultNames[0]))
}

func openDockerfile(ctx context.Context, name string) (dockerfileText, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return dockerfileText{}, notFound(name)
	}
	if err != nil {
		return dockerfileText{}, err
	}
	defer f.Close()
	defer context.AfterFunc(ctx, func() { f.Close() })() // it may be a pipe that nobody writes to
	text, err := readAll(f)
	return dockerfileText{text: text, name: filepath.Base(name), path: name}, canceled(ctx, err)
}

// notFound is the error of a Dockerfile that is not there, with a name that differs only in case if there is one.
func notFound(name string) error {
	similar := ""
	entries, _ := os.ReadDir(filepath.Dir(name))
	for _, e := range entries {
		if strings.EqualFold(e.Name(), filepath.Base(name)) && e.Name() != filepath.Base(name) {
			similar = fmt.Sprintf(" (did you mean %s?)", e.Name())
		}
	}
	return fmt.Errorf("open Dockerfile %s: no such file%s%w", name, similar, silently{fs.ErrNotExist})
}

// silently wraps an error whose text has been said already.
type silently struct{ error }

func (silently) Error() string   { return "" }
func (s silently) Unwrap() error { return s.error }

// remoteDockerfile reads --file or the Dockerfile of a context that is no local directory. A local file of that name
// comes first, but for a tar on standard input.
func remoteDockerfile(ctx context.Context, file string, src *source.Source, stdin bool) (dockerfileText, error) {
	if file != "" && !stdin {
		if d, err := openDockerfile(ctx, file); err == nil {
			return d, nil
		}
	}
	if src.FS == nil {
		return dockerfileText{}, errors.New("open Dockerfile: the context is empty")
	}
	if file != "" {
		d, err := readFrom(src.FS, path.Clean(strings.TrimPrefix(file, "/")))
		if err != nil {
			err = fmt.Errorf("open Dockerfile %s in the context: %w", file, err)
		}
		return d, err
	}
	for _, name := range defaultNames {
		if d, err := readFrom(src.FS, name); !errors.Is(err, fs.ErrNotExist) {
			return d, err
		}
	}
	return dockerfileText{}, errors.New("open Dockerfile: the context has none; --file names it")
}

// ignore hides what the ignore file excludes: the one beside the Dockerfile that is named like it, else the context's.
func (j *job) ignore(fsys fs.FS, d dockerfileText) (fs.FS, error) {
	var patterns []string
	err := j.task("[internal] load .dockerignore", func(say func(string)) (err error) {
		size := 0
		if file := j.flags.what.ignore; file != "" {
			patterns, size, err = readIgnoreFile(file)
		} else {
			patterns, size, err = readIgnore(fsys, d.path)
		}
		say("transferring context: " + units.HumanSize(float64(size)) + " done")
		return err
	})
	if err != nil {
		return nil, err
	}
	j.req.Ignore = patterns
	return source.Ignore(fsys, patterns)
}

// ignoreNames are the names of the ignore file of a context, in the order of trying.
var ignoreNames = [...]string{".dockerignore", ".containerignore"}

func readIgnore(fsys fs.FS, dockerfile string) ([]string, int, error) {
	var text []byte
	err := fs.ErrNotExist
	if dockerfile != "" {
		text, err = os.ReadFile(dockerfile + ".dockerignore")
	}
	for _, name := range ignoreNames {
		if errors.Is(err, fs.ErrNotExist) {
			text, err = fs.ReadFile(fsys, name)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	return parseIgnore(text)
}

func readIgnoreFile(name string) ([]string, int, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, 0, fmt.Errorf("--ignorefile: %w", err)
	}
	return parseIgnore(text)
}

func parseIgnore(text []byte) ([]string, int, error) {
	patterns, err := source.ReadIgnore(strings.NewReader(string(text)))
	return patterns, len(text), err
}
