// Command toybox is a tiny base image's only program: a shell and the few commands that examples and tests need, so
// that these build without any other image. It is no POSIX shell: what it does not know, it refuses.
//
// Start at [main]: the name it is called by says which command to be. shell.go is the shell, applets.go the rest.
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

// stdio is what a command reads and writes.
type stdio struct {
	in       io.Reader
	out, err io.Writer
}

func main() {
	s := stdio{os.Stdin, os.Stdout, os.Stderr}
	args := os.Args
	args[0] = filepath.Base(args[0])
	if args[0] == "toybox" {
		args = args[1:]
	}
	if len(args) == 0 {
		fmt.Fprintf(s.err, "usage: toybox COMMAND…, one of %v\n", names())
		os.Exit(2)
	}
	os.Exit(call(args, s))
}

// call runs one command, and 127 if there is none of that name.
func call(args []string, s stdio) int {
	a, ok := applets()[args[0]]
	if !ok {
		fmt.Fprintf(s.err, "toybox: %s: not found\n", args[0])
		return 127
	}
	return a(args[1:], s)
}

// applet does one command and returns its exit status.
type applet func(args []string, s stdio) int

func applets() map[string]applet {
	return map[string]applet{
		"install": install, "sh": sh, "true": exitWith(0), "false": exitWith(1), "echo": echo, "cat": each(cat),
		"cp": cp, "mv": mv, "ln": ln, "mkdir": mkdir, "rm": rm, "ls": ls, "touch": each(touch), "chmod": chmod,
		"chown": chown, "pwd": pwd, "env": env, "id": id, "sleep": sleep, "seq": seq, "stat": each(stat),
		"sha256sum": each(sha256sum), "test": test, "hostname": hostname, "kill": kill, "fill": fill,
	}
}

func names() []string {
	var out []string
	for n := range applets() {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// install makes a link to toybox for every command, in a directory.
func install(args []string, s stdio) int {
	if len(args) != 1 {
		return fail(s, "install", fmt.Errorf("want one directory"))
	}
	for _, n := range names() {
		if err := os.Symlink("toybox", filepath.Join(args[0], n)); err != nil && !os.IsExist(err) {
			return fail(s, "install", err)
		}
	}
	return 0
}

func fail(s stdio, name string, err error) int {
	fmt.Fprintf(s.err, "%s: %v\n", name, err)
	return 1
}
