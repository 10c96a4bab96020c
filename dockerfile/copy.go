package dockerfile

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/opencontainers/go-digest"
)

func (st *state) copy(c *instructions.CopyCommand, froms []Ref, step *Step) error {
	op := &Copy{
		From: froms[0], Chown: c.Chown, Chmod: c.Chmod, Link: c.Link, Parents: c.Parents, Exclude: c.ExcludePatterns,
	}
	step.Text = st.title(st.file.lex(), c.String(), st.vars)
	if err := st.transfer(op, c.SourcesAndDest, step); err != nil {
		return err
	}
	if c.From == "" {
		st.checkIgnored("Copy", c.SourcePaths, c)
	}
	return nil
}

func (st *state) add(c *instructions.AddCommand, step *Step) error {
	op := &Copy{
		Add: true, Chown: c.Chown, Chmod: c.Chmod, Link: c.Link, Exclude: c.ExcludePatterns, Unpack: c.Unpack,
		Checksum: c.Checksum, KeepGitDir: c.KeepGitDir,
	}
	step.Text = st.title(st.file.lex(), c.String(), st.vars)
	if err := st.transfer(op, c.SourcesAndDest, step); err != nil {
		return err
	}
	var local []string
	for _, s := range op.Sources {
		if s.Path != "" {
			local = append(local, strings.TrimPrefix(s.Path, "/"))
		}
	}
	st.checkIgnored("Add", local, c)
	return nil
}

// transfer does what COPY and ADD have in common.
func (st *state) transfer(op *Copy, what instructions.SourcesAndDest, step *Step) error {
	if err := checkMode(op.Chmod); err != nil {
		return err
	}
	op.Link = op.Link && op.Chmod == "" // a mode goes to files that --link would not see
	if op.Link && !numericOwner(op.Chown) {
		return fmt.Errorf("--chown=%s: user and group names can't be resolved when used with --link, use numeric uid[:gid] instead", op.Chown)
	}
	op.Dest = st.destination(what.DestPath)
	text := "COPY"
	if op.Add {
		text = "ADD"
	}
	for _, flag := range [][2]string{{"--chown=", op.Chown}, {"--chmod=", op.Chmod}} {
		if flag[1] != "" {
			text += " " + flag[0] + flag[1]
		}
	}
	if op.Parents {
		text = strings.Replace(text, "COPY", "COPY --parents", 1)
	}
	for _, p := range what.SourcePaths {
		text += " " + p
		src, err := source(p, op)
		if err != nil {
			return err
		}
		op.Sources = append(op.Sources, src)
	}
	for _, doc := range what.SourceContents {
		text += " <<" + doc.Path
		if doc.Path == "." || doc.Path == ".." || strings.Contains(doc.Path, "/") {
			return fmt.Errorf("the name %q of a here-document cannot be a file name", doc.Path)
		}
		op.Sources = append(op.Sources, Source{Inline: &Inline{Name: doc.Path, Data: []byte(doc.Data)}})
	}
	if err := checkChecksum(op); err != nil {
		return err
	}
	step.Op, step.History = op, text+" "+what.DestPath+" # buildkit"
	return nil
}

// destination returns the absolute form of where to copy to; a slash at the end stays.
func (st *state) destination(p string) string {
	dir := p == "" || p == "." || strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.")
	if !path.IsAbs(p) {
		p = path.Join("/", st.config.WorkingDir, p)
	}
	if p = path.Clean(p); dir && p != "/" {
		p += "/"
	}
	return p
}

// source tells apart files, web addresses and git repositories.
func source(text string, op *Copy) (Source, error) {
	git, isGit, err := dfgitutil.ParseGitRef(text)
	if err != nil && isGit {
		return Source{}, err
	}
	if err == nil && !git.IndistinguishableFromLocal {
		if !op.Add {
			return Source{}, errors.New("source can't be a git ref for COPY")
		}
		return Source{URL: text, Git: true}, mergeGit(op, git)
	}
	if strings.HasPrefix(text, "http://") || strings.HasPrefix(text, "https://") {
		if !op.Add {
			return Source{}, errors.New("source can't be a URL for COPY")
		}
		return Source{URL: text, Name: urlName(text)}, nil
	}
	if !op.Parents {
		return Source{Path: path.Join("/", text)}, nil
	}
	pivot, rest, ok := strings.Cut(text, "/./")
	if !ok {
		pivot, rest = "/", text
	}
	pivot = path.Join("/", pivot)
	return Source{Path: path.Join(pivot, path.Join("/", rest)), Pivot: pivot}, nil
}

// mergeGit checks the flags of ADD against what the address of the repository says.
func mergeGit(op *Copy, git *dfgitutil.GitRef) error {
	if op.KeepGitDir != nil && git.KeepGitDir != nil && *op.KeepGitDir != *git.KeepGitDir {
		return errors.New("inconsistent keep-git-dir configuration")
	}
	if op.Checksum != "" && git.Checksum != "" && op.Checksum != git.Checksum {
		return fmt.Errorf("checksum mismatch %q != %q", op.Checksum, git.Checksum)
	}
	return nil
}

func urlName(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return unnamed
	}
	switch base := path.Base(u.Path); base {
	case ".", "..", "/":
		return unnamed
	default:
		return base
	}
}

const unnamed = "__unnamed__"

func checkChecksum(op *Copy) error {
	if op.Checksum == "" {
		return nil
	}
	if len(op.Sources) != 1 {
		return errors.New("checksum can't be specified for multiple sources")
	}
	src := op.Sources[0]
	if src.URL == "" {
		return errors.New("checksum requires HTTP(S) or Git sources")
	}
	if src.Git {
		return nil
	}
	if _, err := digest.Parse(op.Checksum); err != nil {
		return fmt.Errorf("checksum %q: %w", op.Checksum, err)
	}
	return nil
}

var symbolicMode = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^[ugoa]*([-+=]([rwxXst]*|[ugo]))+(,[ugoa]*([-+=]([rwxXst]*|[ugo]))+)*$`)
})

// checkMode checks the value of --chmod: octal or symbolic.
func checkMode(text string) error {
	if text == "" {
		return nil
	}
	if n, err := strconv.ParseUint(text, 8, 32); err == nil && n <= 0o7777 {
		return nil
	}
	if symbolicMode().MatchString(text) {
		return nil
	}
	if strings.Trim(text, "0123456789") == "" {
		return fmt.Errorf("invalid chmod parameter: '%v'. it should be octal string and between 0 and 07777", text)
	}
	return fmt.Errorf("invalid chmod parameter: '%v'. it should be an octal or a symbolic mode", text)
}

// numericOwner says whether a --chown names no user or group that would have to be looked up.
func numericOwner(text string) bool {
	for _, part := range strings.SplitN(text, ":", 2) {
		if part == "" || part == "root" {
			continue
		}
		if n, err := strconv.ParseInt(part, 10, 32); err != nil || n < 0 {
			return false
		}
	}
	return true
}
