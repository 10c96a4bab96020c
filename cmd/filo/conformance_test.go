package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestConformance builds the cases that BuildKit has built, if they are there: beside the project, or where
// FILO_CONFORMANCE says.
func TestConformance(t *testing.T) {
	dir := os.Getenv("FILO_CONFORMANCE")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "conformance")
	}
	if _, err := os.Stat(filepath.Join(dir, "conform.py")); err != nil {
		t.Skipf("no cases: %v", err)
	}
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	if os.Geteuid() != 0 {
		t.Skip("the cases make devices and foreign owners: only root can")
	}
	needGround(t)
	busybox, err := exec.LookPath("busybox")
	for _, program := range []string{"python3", "zstd", "git"} {
		if _, e := exec.LookPath(program); e != nil {
			err = e
		}
	}
	if err != nil {
		t.Skip(err)
	}
	host := startRegistry(t)
	if out, err := exec.Command("python3", filepath.Join(dir, "conform.py"), "bases", "--registry", host, "--busybox", busybox).CombinedOutput(); err != nil {
		t.Fatalf("push the bases: %v\n%s", err, out)
	}
	cmd := exec.Command("python3", filepath.Join(dir, "conform.py"), "run", "--candidate", "filo", "--registry", host, "--jobs", "2", "--show", "3", filepath.Join(dir, "open"))
	cmd.Env = append(os.Environ(), isFilo+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !regexp.MustCompile(`(?m)^[1-9]\d* passed, 0 failed$`).Match(out) {
		t.Errorf("conformance: %v\n%s", err, regexp.MustCompile(`(?m)^ok .*\n`).ReplaceAll(out, nil))
	}
}
