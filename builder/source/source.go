// Package source turns the name of a build context into a file system: a directory, "-" (a tar or a Dockerfile on
// standard input), an http URL of either, or a git repository. It also fetches what ADD names by URL.
//
// Every file system here is an [io/fs.FS] that also has ReadDir, ReadLink and Lstat, safe for concurrent use. Names are
// clean and relative, any bytes but NUL; links on the way are followed inside the root and never out of it. Lstat and
// ReadLink take the last name as it is, Open follows it. FileInfo.Sys is a [*rootfs.Stat] with the owner that reaches
// an image: 0:0 for directories and git, the archive's for tars.
//
// It never writes outside [Options].Temp and Keep, runs nothing but git and never runs what a repository brings along (hooks,
// filters, helpers). A tar is not unpacked on disk: its tree is held in memory and its bytes in one file, so no name or
// link in it can touch anything, and owners and devices need no privilege.
//
// Start at [Open]. dir.go serves a directory, tree.go a tree in memory, tar.go reads archives into it, http.go and
// git.go fetch, vcs.go knows checkouts, keep.go remembers downloads, ignore.go hides what .dockerignore excludes, file.go holds what all of them
// give for files.
package source

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	"github.com/opencontainers/go-digest"
)

// Source is an opened build context.
type Source struct {
	FS         fs.FS  // also fs.ReadDirFS and fs.ReadLinkFS; nil for an empty context
	Root       string // absolute path of a local directory, links resolved; "" for everything else
	Dockerfile []byte // what was read, if it was a lone Dockerfile; nil otherwise
	Local      bool   // a local directory: ignore files apply
	Identity   string // of what was fetched: digest of the bytes, or commit with what was taken of it; "" for Local
	Commit     string // of a git repository; "" for everything else
	Modified   *int64 // when the content is from, seconds since 1970: Last-Modified, commit time, newest file of a tar; nil if unknown
	Close      func() error
}

// Fetched is the content of a URL.
type Fetched struct {
	FS       fs.FS
	Name     string // base name of the one file in FS; "" for a tree
	Identity string // digest of the bytes, or commit with what was taken of it
	Commit   string // of a git repository; "" for everything else
	Modified *int64 // Last-Modified or commit time, seconds since 1970; nil if unknown
	Close    func() error
}

// Options says where to put things and how to get at them. The zero value works for what needs no credentials.
type Options struct {
	Stdin       io.Reader                      // read for "-"
	Temp        string                         // existing directory for downloads and checkouts; "" is the system's
	Keep        string                         // existing directory where downloads by http stay for the next time; "" keeps none
	Repaired    func(what string)              // told of a kept download that is damaged; nil tells nobody
	KeepGitDir  bool                           // keep .git in a git context (BUILDKIT_CONTEXT_KEEP_GIT_DIR)
	Secret      func(id string) ([]byte, bool) // GIT_AUTH_TOKEN, HTTP_AUTH_TOKEN_host and their like; nil knows none
	SSHAuthSock string                         // ssh agent for git over ssh; "" is none
	Epoch       *int64                         // SOURCE_DATE_EPOCH: if set, files of a git context get the commit's time
	Transport   http.RoundTripper              // nil is net/http's default, with proxies from the environment
	UserAgent   string                         // for http; "" is net/http's

	retry backoff // for tests; the zero value is the usual pace
}

// maxDockerfile bounds what is taken for a Dockerfile: text from a stranger is held in memory.
const maxDockerfile = 16 << 20

// Open opens the build context ref: an existing directory, "-" for o.Stdin, or the URL of a tar, a Dockerfile or a git
// repository. The caller closes the Source.
func Open(ctx context.Context, ref string, o Options) (*Source, error) {
	if ref == "-" {
		return openStdin(ctx, o)
	}
	if fi, err := os.Stat(ref); err == nil && fi.IsDir() {
		return openLocal(ref)
	}
	repo, isGit, err := dfgitutil.ParseGitRef(ref)
	if isGit && err != nil {
		return nil, fmt.Errorf("open %s: %w", redact(ref), err)
	}
	if isGit {
		return openGit(ctx, repo, o)
	}
	if isHTTP(ref) {
		return openHTTP(ctx, ref, o)
	}
	return nil, notThere(ref)
}

// Fetch fetches the http or git URL of an ADD. checksum, if not "", is what the content must have: "sha256:…",
// "sha384:…" or "sha512:…" for http, a commit or its beginning for git. keepGit, if not nil, says whether .git stays.
// The caller closes the Fetched.
func Fetch(ctx context.Context, ref, checksum string, keepGit *bool, o Options) (Fetched, error) {
	repo, isGit, err := dfgitutil.ParseGitRef(ref)
	if isGit && err != nil {
		return Fetched{}, fmt.Errorf("fetch %s: %w", redact(ref), err)
	}
	if isGit && !repo.IndistinguishableFromLocal {
		return fetchGit(ctx, repo, checksum, keepGit, o)
	}
	if isHTTP(ref) {
		return fetchHTTP(ctx, ref, checksum, o)
	}
	return Fetched{}, fmt.Errorf("fetch %s: neither an http nor a git URL", redact(ref))
}

// IsURL reports whether [Fetch] takes ref; everything else names a file of the build context.
func IsURL(ref string) bool {
	repo, isGit, err := dfgitutil.ParseGitRef(ref)
	if isGit {
		return err != nil || !repo.IndistinguishableFromLocal
	}
	return isHTTP(ref)
}

func isHTTP(ref string) bool {
	return strings.HasPrefix(ref, "http://") || strings.HasPrefix(ref, "https://")
}

// notThere words the error for a context that is no directory and no URL.
func notThere(ref string) error {
	_, err := os.Stat(ref)
	switch {
	case err == nil:
		return fmt.Errorf("open context %s: not a directory", ref)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("open context %s: no such directory, and not a URL: %w", ref, fs.ErrNotExist)
	}
	return fmt.Errorf("open context: %w", err)
}

func openLocal(ref string) (*Source, error) {
	abs, err := filepath.Abs(ref)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return nil, fmt.Errorf("open context %s: %w", ref, err)
	}
	d, err := openDirFS(abs, rootOwned)
	if err != nil {
		return nil, fmt.Errorf("open context %s: %w", ref, err)
	}
	return &Source{FS: d, Root: abs, Local: true, Close: d.Close}, nil
}

func openStdin(ctx context.Context, o Options) (*Source, error) {
	if o.Stdin == nil {
		return nil, errors.New("open context -: no standard input")
	}
	h := digest.SHA256.Hash()
	r := bufio.NewReaderSize(io.TeeReader(o.Stdin, h), 64<<10)
	if head, err := peek(r); err == nil && len(head) == 0 {
		return nil, errors.New("read context from standard input: it is empty")
	}
	s, err := openStream(ctx, r, o)
	if err != nil {
		return nil, fmt.Errorf("read context from standard input: %w", err)
	}
	s.Identity = digest.NewDigest(digest.SHA256, h).String()
	return s, nil
}

// openStream makes a source of all of r: a tar, or a Dockerfile.
func openStream(ctx context.Context, r *bufio.Reader, o Options) (*Source, error) {
	head, err := peek(r)
	if err != nil {
		return nil, err
	}
	if !isArchive(head) {
		text, err := io.ReadAll(io.LimitReader(r, maxDockerfile+1))
		if err != nil {
			return nil, err
		}
		if len(text) > maxDockerfile {
			return nil, fmt.Errorf("neither an archive nor a Dockerfile: more than %d MiB of text", maxDockerfile>>20)
		}
		return &Source{Dockerfile: text, Close: func() error { return nil }}, nil
	}
	t, err := readTar(ctx, r, o.Temp)
	if err != nil {
		return nil, err
	}
	if err := drain(r); err != nil { // what stands behind the end of a compressed archive
		return nil, errors.Join(err, t.Close())
	}
	return &Source{FS: t, Modified: t.newest(), Close: t.Close}, nil
}

// redact hides the password of a URL, so that it can be shown.
func redact(ref string) string {
	u, err := url.Parse(ref)
	if err != nil { // of a password with odd characters as well
		scheme, rest, _ := strings.Cut(ref, "://")
		if i := strings.LastIndexByte(rest, '@'); i >= 0 {
			return scheme + "://xxxxx" + rest[i:]
		}
		return ref
	}
	if u.User == nil { // as it was written
		return ref
	}
	return u.Redacted()
}
