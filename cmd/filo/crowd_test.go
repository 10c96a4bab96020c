package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const crowdDockerfile = `FROM toybox AS a
RUN echo ran-one && sleep 0.1 && echo one > /one
RUN echo ran-two && cat /one > /two
FROM toybox
RUN echo ran-three && sleep 0.1 && echo three > /three
COPY --from=a /two /
COPY f /
RUN echo ran-four && cat /two /three /f > /all
`

// TestCrowd starts sixteen builds at once on one state directory. Each step is done once in all of them, and all make the
// same image; also while some of them are killed.
func TestCrowd(t *testing.T) {
	needGround(t)
	host, context := startRegistry(t), t.TempDir()
	for name, text := range map[string]string{"Dockerfile": crowdDockerfile, "f": "file\n"} {
		if err := os.WriteFile(filepath.Join(context, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, killed := range []int{0, 5} {
		dir := t.TempDir()
		state := filepath.Join(dir, "state")
		t.Cleanup(func() { sweepState(state) })
		var all []*exec.Cmd
		for i := range 16 {
			cmd := filo(state, "build", "--progress", "plain", "--iidfile", filepath.Join(dir, fmt.Sprint("id", i)), "-t", fmt.Sprint("crowd/", i), context)
			cmd.Env = append(cmd.Env, "FILO_REGISTRY_MIRRORS=docker.io="+host)
			log := &bytes.Buffer{}
			cmd.Stdout, cmd.Stderr = log, log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			all = append(all, cmd)
		}
		for _, cmd := range all[:killed] {
			time.Sleep(rand.N(200 * time.Millisecond))
			cmd.Process.Kill()
		}
		ids, ran := map[string]bool{}, map[string]int{}
		for i, cmd := range all {
			err := cmd.Wait()
			log := fmt.Sprint(cmd.Stderr)
			for _, step := range []string{"one", "two", "three", "four"} {
				ran[step] += strings.Count(log, " ran-"+step+"\n")
			}
			if i < killed {
				continue
			}
			id, idErr := os.ReadFile(filepath.Join(dir, fmt.Sprint("id", i)))
			if err != nil || idErr != nil {
				t.Errorf("build %d: %v, %v\n%s", i, err, idErr, log)
			}
			ids[string(id)] = true
		}
		for step, n := range ran {
			if n < 1 || n > 1+killed {
				t.Errorf("step %s was done %d times, with %d builds killed", step, n, killed)
			}
		}
		found := (&powerCuts{t: t}).images(state)
		if len(ids) != 1 || len(found) < 16-killed {
			t.Errorf("%d different images, %d names of 16 builds of which %d were killed", len(ids), len(found), killed)
		}
		if left, err := os.ReadDir(filepath.Join(state, "tmp")); err != nil || killed == 0 && len(left) > 0 {
			t.Errorf("left in tmp: %v, %v", left, err)
		}
	}
}
