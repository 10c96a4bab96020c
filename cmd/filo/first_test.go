package main

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"testing"
)

// TestFirst sees that package sandbox initializes early: it ends a child's way through the program there, and whatever
// comes before it is paid by each build that runs something, and by each RUN in a chroot.
func TestFirst(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "version")
	cmd.Env = append(os.Environ(), isFilo+"=1", "GODEBUG=inittrace=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var order []string
	for _, m := range regexp.MustCompile(`(?m)^init (\S+) @`).FindAllSubmatch(out, -1) {
		order = append(order, string(m[1]))
	}
	sandbox := slices.Index(order, "filo/builder/sandbox")
	if sandbox < 0 {
		t.Fatalf("package sandbox has nothing to initialize:\n%s", out)
	}
	for _, late := range []string{"path/filepath", "regexp", "net/netip", "github.com/opencontainers/go-digest"} {
		if i := slices.Index(order, late); i >= 0 && i < sandbox {
			t.Errorf("%s initializes before package sandbox; does that import it, or something like it?", late)
		}
	}
}
