package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestKill kills a build in the middle of a step, twice with a signal that cannot be caught and once with one that
// can; the build after it is right and nothing of the dead one is left.
func TestKill(t *testing.T) {
	needGround(t)
	host := startRegistry(t)
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	t.Cleanup(func() { sweepState(state) })
	write := func(run string) {
		text := "FROM toybox\nRUN echo first > /first\nRUN " + run + "\n"
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	build := func(name string) []string {
		return []string{"build", "--progress", "plain", "-o", "type=oci,tar=false,dest=" + filepath.Join(dir, name), dir}
	}
	env := []string{"FILO_REGISTRY_MIRRORS=docker.io=" + host, "DOCKER_CONFIG=" + dir}
	nap := fmt.Sprint(100000 + os.Getpid()) // tells our sleeping process from all others
	for _, end := range []string{"KILL", "KILL", "INT"} {
		write("echo half > /half && echo rea''dy && sleep " + nap)
		cmd := filo(state, build("dead")...)
		cmd.Env = append(cmd.Env, env...)
		out, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			log.WriteString(lines.Text() + "\n")
			if strings.HasSuffix(lines.Text(), " ready") {
				break
			}
		}
		if end == "INT" {
			cmd.Process.Signal(os.Interrupt)
		} else {
			cmd.Process.Kill()
		}
		for lines.Scan() {
			log.WriteString(lines.Text() + "\n")
		}
		err = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); end == "INT" && code != 130 || err == nil {
			t.Fatalf("killed by %s: exit status %d, want 130 for INT\n%s", end, code, &log)
		}
		if _, err := os.Stat(filepath.Join(dir, "dead")); err == nil {
			t.Fatal("a killed build has written its output")
		}
		awaitEnd(t, "sleep\x00"+nap)
	}
	write("test -e /first && ls / && echo done > /second")
	var logs []string
	for _, name := range []string{"one", "two"} {
		cmd := filo(state, build(name)...)
		cmd.Env = append(cmd.Env, env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("build after a killed one: %v\n%s", err, out)
		}
		logs = append(logs, string(out))
	}
	if strings.Contains(logs[0], " half\n") {
		t.Errorf("the step sees what a killed one wrote:\n%s", logs[0])
	}
	if !strings.Contains(logs[1], "2 of 2 steps cached") {
		t.Errorf("the second build after a killed one is not cached:\n%s", logs[1])
	}
	left, err := os.ReadDir(filepath.Join(state, "tmp"))
	if err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

// awaitEnd waits until no process has text in its command line: the kernel ends what a killed parent leaves in its own
// time.
func awaitEnd(t *testing.T, text string) {
	t.Helper()
	for range 500 {
		found := ""
		all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range all {
			if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), text) {
				found = p
			}
		}
		if found == "" {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("a process of the killed build is still there: %q", text)
}
