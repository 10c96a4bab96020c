package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// fuzzTries is how many inputs each target gets. A number and no time: a loaded machine takes longer and finds the same.
const fuzzTries = "3000x"

// TestFuzz runs the fuzz targets of all packages for a while, as `make fuzz` does for longer. It needs a minute or two, so
// it runs only where FILO_E2E is set; the seeds run everywhere.
func TestFuzz(t *testing.T) {
	if os.Getenv("FILO_E2E") == "" {
		t.Skip("FILO_E2E is not set")
	}
	list, err := exec.Command("go", "test", "-list", "^Fuzz", "../../...").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, list)
	}
	var targets []string
	ran := 0
	for line := range strings.Lines(string(list)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 1 && strings.HasPrefix(fields[0], "Fuzz"):
			targets = append(targets, fields[0])
		case len(fields) > 1 && fields[0] == "ok":
			for _, target := range targets {
				out, err := exec.Command("go", "test", "-run", "^$", "-fuzz", "^"+target+"$", "-fuzztime", fuzzTries, fields[1]).CombinedOutput()
				if err != nil {
					t.Errorf("%s %s: %v\n%s", fields[1], target, err, out)
				}
				ran++
			}
			targets = nil
		}
	}
	if ran < 10 {
		t.Errorf("%d targets found\n%s", ran, list)
	}
	t.Logf("%d targets, %s each", ran, fuzzTries)
}
