package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestClock builds while the clock jumps, and a file changes so that only its change time tells. No build is stale, an
// unchanged one is cached whatever the clock said before, and pruning by age takes no image.
func TestClock(t *testing.T) {
	needGround(t)
	dir, context := t.TempDir(), t.TempDir()
	state, file := filepath.Join(dir, "state"), filepath.Join(context, "f")
	t.Cleanup(func() { sweepState(state) })
	if err := os.WriteFile(filepath.Join(context, "Dockerfile"), []byte("FROM scratch\nCOPY f /\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	filo := func(off time.Duration, args ...string) string {
		t.Helper()
		cmd := filo(state, args...)
		cmd.Env = append(cmd.Env, clockEnv+"="+off.String())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("at %v: %v: %v\n%s", off, args, err, out)
		}
		return string(out)
	}
	const year = 365 * 24 * time.Hour
	old := time.Now().Add(-time.Hour)
	for i, off := range []time.Duration{0, -year, 10 * year, time.Hour, 0, -time.Minute, 20 * year, 0} {
		want := fmt.Sprintf("content %04d", i)
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, old, old); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			log := filo(off, "build", "--progress", "plain", "-t", fmt.Sprint("kept/", i), "--load", "-o", filepath.Join(dir, "out"), context)
			if got, err := os.ReadFile(filepath.Join(dir, "out", "f")); string(got) != want {
				t.Fatalf("at %v: built %q, %v, want %q\n%s", off, got, err, want, log)
			}
		}
		log := filo(0, "build", "--progress", "plain", "-t", fmt.Sprint("kept/", i), context)
		if !strings.Contains(log, "1 of 1 step cached") {
			t.Errorf("after a build at %v nothing is cached\n%s", off, log)
		}
		filo(off, "prune", "--unused-for", "24h")
	}
	images := filo(0, "images")
	for i := range 8 {
		if !strings.Contains(images, fmt.Sprint("kept/", i)) {
			t.Errorf("kept/%d is gone\n%s", i, images)
		}
	}
}
