package main

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestStopReading stops builds that wait for more of a pipe.
func TestStopReading(t *testing.T) {
	needGround(t)
	dir := t.TempDir()
	text := bytes.Repeat([]byte("# much more than a pipe holds\n"), 32<<10)
	var archive bytes.Buffer
	if err := tar.NewWriter(&archive).WriteHeader(&tar.Header{Name: "f", Size: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	archive.Write(text)
	for _, test := range []struct {
		args  string
		input []byte
	}{
		{"-", text}, {"-", archive.Bytes()}, {"--call=check -", text}, {"-f - DIR", text}, {"-f /dev/stdin DIR", text},
	} {
		t.Run(test.args, func(t *testing.T) {
			state := filepath.Join(t.TempDir(), "state")
			cmd := filo(state, append([]string{"build", "--progress", "plain"}, strings.Fields(strings.ReplaceAll(test.args, "DIR", dir))...)...)
			var log bytes.Buffer
			cmd.Stderr = &log
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() }).Stop()
			if _, err := in.Write(test.input); err != nil { // then all but what a pipe holds has been read
				t.Fatal(err)
			}
			cmd.Process.Signal(os.Interrupt)
			cmd.Wait() // closes the pipe when filo has ended
			if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.HasSuffix(log.String(), "ERROR: stopped by signal: interrupt\n") {
				t.Errorf("exit status %d, want 130\n%s", code, &log)
			}
			left, err := os.ReadDir(filepath.Join(state, "tmp"))
			if err != nil || len(left) > 0 {
				t.Errorf("left in tmp: %v, %v", left, err)
			}
		})
	}
}
