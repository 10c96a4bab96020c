package main

import (
	"bufio"
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

// TestKillAnywhere kills builds with a signal that cannot be caught, at random instants. The same build is right
// afterwards, what was reported as built stays, and nothing of the dead is left: no process, mount, cgroup or file.
func TestKillAnywhere(t *testing.T) {
	needGround(t)
	k := &kills{t: t, host: startRegistry(t), dir: t.TempDir(), state: filepath.Join(t.TempDir(), "state"), built: map[string]string{}}
	t.Cleanup(func() { sweepState(k.state); sweepState(filepath.Join(k.dir, "reference")) })
	n := rounds(t, 12)
	for i := range n {
		k.round(i)
	}
	k.whole()
	k.nothingLeft()
	t.Logf("%d builds killed, %d before they were done; %d images, none wrong or lost; nothing left", n, k.early, len(k.built))
}

type kills struct {
	t                *testing.T
	host, dir, state string
	took             time.Duration
	early            int
	pids             []int
	built            map[string]string // ID by name
}

// killMark is in the environment of all steps, and of nothing else on the machine.
func killMark() string { return fmt.Sprint("KILL_MARK=", os.Getpid()) }

func (k *kills) round(i int) {
	k.t.Helper()
	text := strings.Replace(fmt.Sprintf(powerDockerfile, "toybox", i), "\n", "\nENV "+killMark()+"\n", 1)
	for name, data := range map[string]string{"Dockerfile": text, "f": fmt.Sprint("file ", i)} {
		if err := os.WriteFile(filepath.Join(k.dir, name), []byte(data), 0o644); err != nil {
			k.t.Fatal(err)
		}
	}
	name := fmt.Sprintf("kept/%d", i)
	want, log := k.finish(k.build(filepath.Join(k.dir, "reference"), name))
	if want == "" {
		k.t.Fatal(log)
	}
	cmd := k.build(k.state, name)
	if err := cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	time.Sleep(rand.N(k.took + time.Millisecond))
	cmd.Process.Kill()
	if cmd.Wait() != nil {
		k.early++
	}
	k.pids = append(k.pids, cmd.Process.Pid)
	awaitNone(k.t, killMark())
	begin := time.Now()
	got, log := k.finish(k.build(k.state, name))
	k.took = (time.Since(begin) + k.took) / 2 // a build is faster the more was done before it was killed
	if got != want {
		k.t.Fatalf("%s: built %q after a killed build, want %s\n%s", name, got, want, log)
	}
	k.built[name] = got
	if left, err := os.ReadDir(filepath.Join(k.state, "tmp")); err != nil || len(left) > 0 {
		k.t.Errorf("round %d: left in tmp: %v, %v", i, left, err)
	}
	if i%25 == 0 {
		k.whole()
	}
}

func (k *kills) build(state, name string) *exec.Cmd {
	cmd := filo(state, "build", "-q", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-t", name, k.dir)
	cmd.Env = append(cmd.Env, "FILO_REGISTRY_MIRRORS=docker.io="+k.host)
	cmd.Stdout, cmd.Stderr = &bytes.Buffer{}, &bytes.Buffer{}
	return cmd
}

func (k *kills) finish(cmd *exec.Cmd) (id, log string) {
	err := cmd.Run()
	k.pids = append(k.pids, cmd.Process.Pid)
	return strings.TrimSpace(cmd.Stdout.(*bytes.Buffer).String()), fmt.Sprint(cmd.Stderr, err)
}

// whole looks at all images that were reported as built.
func (k *kills) whole() {
	k.t.Helper()
	found := (&powerCuts{t: k.t}).images(k.state)
	for name, id := range k.built {
		if found[name] != id {
			k.t.Errorf("%s is %q, reported as built was %s", name, found[name], id)
		}
	}
}

// nothingLeft looks for mounts and cgroups.
func (k *kills) nothingLeft() {
	k.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), k.state) {
		k.t.Errorf("mounts are left: %v\n%s", err, mounts)
	}
	for _, pid := range k.pids {
		for _, depth := range []string{"", "/*", "/*/*", "/*/*/*"} {
			if left, _ := filepath.Glob(fmt.Sprintf("/sys/fs/cgroup%s/filo-%d-*", depth, pid)); len(left) > 0 {
				k.t.Errorf("cgroups are left: %v", left)
			}
		}
	}
}

// awaitNone waits until no process has text in its environment.
func awaitNone(t *testing.T, text string) {
	t.Helper()
	for range 500 {
		found := false
		all, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, p := range all {
			b, err := os.ReadFile(p)
			found = found || err == nil && strings.Contains(string(b), text)
		}
		if !found {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("a process of the killed build is still there")
}
