package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const damageDockerfile = `FROM toybox
RUN echo data > /data && echo more > /more
COPY f /f
RUN cat /data /f /more > /out && echo %s >> /out
`

// TestDamage changes one byte in each file of the state directory, one at a time. The next build, cached or with another
// last step, makes the same image as without.
func TestDamage(t *testing.T) {
	needGround(t)
	host, dir := startRegistry(t), t.TempDir()
	gold, state := filepath.Join(dir, "gold"), filepath.Join(dir, "state")
	t.Cleanup(func() { sweepState(gold); sweepState(state) })
	for name, text := range map[string]string{"a/f": "file\n", "b/f": "file\n", "a/Dockerfile": fmt.Sprintf(damageDockerfile, "a"), "b/Dockerfile": fmt.Sprintf(damageDockerfile, "b")} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	build := func(state, context string) (string, error) {
		out := filepath.Join(dir, "out")
		os.RemoveAll(out)
		cmd := filo(state, "build", "--progress", "plain", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-t", "kept/"+context,
			"-o", "type=oci,tar=false,dest="+out, filepath.Join(dir, context))
		cmd.Env = append(cmd.Env, "FILO_REGISTRY_MIRRORS=docker.io="+host)
		if log, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%w\n%s", err, log)
		}
		return wholeLayout(out)
	}
	want := map[string]string{}
	var err error
	if want["b"], err = build(filepath.Join(dir, "other"), "b"); err != nil {
		t.Fatal(err)
	}
	sweepState(filepath.Join(dir, "other"))
	if want["a"], err = build(gold, "a"); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can copy a state with its owners")
	}
	n := 0
	err = filepath.WalkDir(gold, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, _ := filepath.Rel(gold, p)
		for _, context := range []string{"a", "b"} {
			os.RemoveAll(state)
			if out, err := exec.Command("cp", "-a", gold, state).CombinedOutput(); err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
			if !flip(t, filepath.Join(state, rel), n) {
				return nil
			}
			n++
			if got, err := build(state, context); err != nil || got != want[context] {
				t.Errorf("%s changed, then built %s: %s, %v, want %s", rel, context, got, err, want[context])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d damaged states", n)
}

// flip changes one bit of a file in place.
func flip(t *testing.T, name string, n int) bool {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) == 0 {
		return false
	}
	at := n * 7919 % len(data)
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{data[at] ^ 1<<(n%8)}, int64(at)); err != nil {
		t.Fatal(err)
	}
	return true
}

// wholeLayout returns the digest of the one image of a layout, all blobs of which are right.
func wholeLayout(dir string) (string, error) {
	index, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		return "", err
	}
	var i struct{ Manifests []struct{ Digest string } }
	if err := json.Unmarshal(index, &i); err != nil || len(i.Manifests) != 1 {
		return "", fmt.Errorf("%s: %w", index, err)
	}
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil {
		return "", err
	}
	for _, b := range blobs {
		data, err := os.ReadFile(b)
		if err != nil {
			return "", err
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256(data)); !strings.HasSuffix(b, sum) {
			return "", fmt.Errorf("%s holds %s", b, sum)
		}
	}
	return i.Manifests[0].Digest, nil
}
