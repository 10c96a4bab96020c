package source

import (
	"context"
	"os/exec"
	"strings"
)

// Checkout returns the remote and the commit of the git checkout that a local directory is in; "" for what there is not,
// or if there is no program git. Nobody verified it: whether files were changed since is not looked at. Only git's own
// files are read; nothing that the repository brings along is run.
func Checkout(ctx context.Context, dir string) (remote, commit string) {
	git, err := exec.LookPath("git")
	if err != nil {
		return "", ""
	}
	ask := func(args ...string) string {
		out, err := exec.CommandContext(ctx, git, append([]string{"-C", dir, "-c", "core.fsmonitor=false"}, args...)...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	if commit = ask("rev-parse", "--verify", "HEAD"); !isCommit(commit) {
		return "", ""
	}
	return ask("config", "--get", "remote.origin.url"), commit
}
