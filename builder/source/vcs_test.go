package source

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestCheckout(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("no program git")
	}
	dir := t.TempDir()
	t.Setenv("GIT_CEILING_DIRECTORIES", filepath.Dir(dir))
	find := func(in string, dirty bool) Checkout { return FindCheckout(t.Context(), in, dirty) }
	if got := find(dir, true); got != (Checkout{}) {
		t.Errorf("of no repository: %+v", got)
	}
	git := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %q: %v\n%s", args, err, out)
		}
	}
	git("init", "-q")
	if got := find(dir, true); got != (Checkout{}) {
		t.Errorf("of an empty repository: %+v", got)
	}
	git("commit", "-q", "--allow-empty", "-m", "x")
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	clean := find(sub, true)
	top, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	if clean.Remote != "" || !isCommit(clean.Commit) || clean.Top != top {
		t.Errorf("without a remote: %+v", clean)
	}
	if err := os.WriteFile(filepath.Join(sub, "new"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := find(sub, true); got.Commit != clean.Commit+"-dirty" {
		t.Errorf("with a new file: %+v", got)
	}
	if got := find(sub, false); got.Commit != clean.Commit {
		t.Errorf("with a new file, unasked: %+v", got)
	}
	git("remote", "add", "origin", "")
	for remote, want := range map[string]string{
		"https://h/x.git": "https://h/x.git", "https://me:secret@h/x.git": "https://h/x.git",
		"https://me:se%cret@h/x.git": "", "git@h:x.git": "git@h:x.git", "/srv/x.git": "/srv/x.git",
	} {
		git("remote", "set-url", "origin", remote)
		if got := find(sub, false); got.Remote != want {
			t.Errorf("remote %s: %q, want %q", remote, got.Remote, want)
		}
	}
}
