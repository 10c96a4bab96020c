package nofile_test

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"filo/builder/sandbox/nofile"
)

const askedEnv = "NOFILE_TEST"

// TestLimit starts this program with another limit than its parent has, and below the hard one, so that package os raises it.
func TestLimit(t *testing.T) {
	if os.Getenv(askedEnv) != "" {
		soft, _, _ := nofile.Limit()
		var now syscall.Rlimit
		syscall.Getrlimit(syscall.RLIMIT_NOFILE, &now)
		fmt.Printf("limit %d, raised %v\n", soft, now.Cur > soft)
		os.Exit(0)
	}
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	low := syscall.Rlimit{Cur: 78, Max: lim.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	defer syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim)
	cmd := exec.Command(os.Args[0], "-test.run=^TestLimit$")
	cmd.Env = append(os.Environ(), askedEnv+"=1")
	out, err := cmd.CombinedOutput()
	if want := fmt.Sprintf("limit 78, raised %v\n", lim.Max > 78); err != nil || string(out) != want {
		t.Errorf("got %q, %v, want %q", out, err, want)
	}
}
