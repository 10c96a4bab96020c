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
	if remote, commit := Checkout(t.Context(), dir); remote != "" || commit != "" {
		t.Errorf("of no repository: %q, %q", remote, commit)
	}
	git := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %q: %v\n%s", args, err, out)
		}
	}
	git("init", "-q")
	if remote, commit := Checkout(t.Context(), dir); remote != "" || commit != "" {
		t.Errorf("of an empty repository: %q, %q", remote, commit)
	}
	git("commit", "-q", "--allow-empty", "-m", "x")
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if remote, commit := Checkout(t.Context(), sub); remote != "" || !isCommit(commit) {
		t.Errorf("without a remote: %q, %q", remote, commit)
	}
	git("remote", "add", "origin", "https://h/x.git")
	if remote, _ := Checkout(t.Context(), sub); remote != "https://h/x.git" {
		t.Errorf("remote: %q", remote)
	}
}
