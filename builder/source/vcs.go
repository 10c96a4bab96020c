package source

import (
	"context"
	"net/url"
	"os/exec"
	"strings"
)

// Checkout is the git checkout that a local directory is in; a field is "" for what there is not. Nobody verified it.
type Checkout struct {
	Remote string // a URL, without the name and password that may stand in it
	Commit string // followed by -dirty if files were changed since and that was asked for
	Top    string // directory
}

// FindCheckout returns the checkout that dir is in, and nothing if there is none or no program git. Only git's own files
// are read and nothing that the repository brings along is run, unless dirty asks whether files were changed since: then
// git looks at them as its configuration says, with filters that are programs.
func FindCheckout(ctx context.Context, dir string, dirty bool) Checkout {
	git, err := exec.LookPath("git")
	if err != nil {
		return Checkout{}
	}
	ask := func(args ...string) string {
		out, err := exec.CommandContext(ctx, git, append([]string{"-C", dir, "-c", "core.fsmonitor=false"}, args...)...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	c := Checkout{Commit: ask("rev-parse", "--verify", "HEAD")}
	if !isCommit(c.Commit) {
		return Checkout{}
	}
	if dirty && ask("--no-optional-locks", "status", "--porcelain", "--ignored=no") != "" {
		c.Commit += "-dirty"
	}
	c.Remote = Anonymous(ask("config", "--get", "remote.origin.url"))
	c.Top = ask("rev-parse", "--show-toplevel")
	return c
}

// Anonymous is a URL, or what else names a source, without the name and password that may stand in it; "" if they cannot be
// told from the rest.
func Anonymous(remote string) string {
	if !strings.Contains(remote, "://") { // a path, or host:path
		return remote
	}
	u, err := url.Parse(remote)
	if err != nil {
		return ""
	}
	u.User = nil
	return u.String()
}
