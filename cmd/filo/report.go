package main

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"

	"filo/builder/image"
	"filo/builder/sandbox"
	"filo/dockerfile"
	"filo/layer/registry"
)

// report shows an error, once: the last lines of the step that failed, where it stands in the Dockerfile, what is
// wrong, and what might help.
func (a *app) report(err error) {
	var b strings.Builder
	var sig *signaled
	var usage *usageError
	switch {
	case errors.As(err, &sig):
		fmt.Fprintf(&b, "ERROR: %v\n", sig)
	case errors.As(err, &usage):
		fmt.Fprintln(&b, usage)
	case errors.Is(err, errFound):
	default:
		a.describe(&b, err)
	}
	fmt.Fprint(a.stderr, b.String())
}

// repairs collects what was damaged in the state directory.
type repairs struct {
	mu   sync.Mutex
	what []string
}

func (r *repairs) add(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Contains(r.what, what) {
		r.what = append(r.what, what)
	}
}

// maxRepairs is how many damaged things are called by name; after a power cut there may be hundreds.
const maxRepairs = 4

// line says in one line what was repaired, "" if nothing was.
func (r *repairs) line() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.what)
	if n == 0 {
		return ""
	}
	text := strings.Join(r.what[:min(n, maxRepairs)], ", ")
	if n > maxRepairs {
		text += fmt.Sprintf(" and %d more", n-maxRepairs)
	}
	return "WARNING: repaired the state directory: these were damaged, and are restored or made again when they are needed: " + text + "\n"
}

func (a *app) describe(b *strings.Builder, err error) {
	tail := []string(nil)
	if a.display != nil {
		if name, lines, ok := a.display.Failure(); ok {
			tail = lines
			fmt.Fprintf(b, "------\n > %s:\n%s\n------\n", name, strings.Join(lines, "\n"))
		}
	}
	var where *dockerfile.Error
	if errors.As(err, &where) {
		b.WriteString(where.Excerpt())
	}
	fmt.Fprintf(b, "ERROR: %v\n", err)
	if h := hint(err, tail); h != "" {
		fmt.Fprintf(b, "hint: %s\n", h)
	}
}

const (
	diskFull    = "the disk is full: `filo prune` makes room, --root moves the state directory"
	quotaUsedUp = "the disk quota is used up: `filo prune` makes room, --root moves the state directory"
)

// hint returns what might help against err, "" if there is nothing good to say. tail is what the step said last.
func hint(err error, tail []string) string {
	var where *dockerfile.Error
	if errors.As(err, &where) && where.Hint != "" {
		return where.Hint
	}
	var exit *sandbox.ExitError
	if errors.As(err, &exit) {
		return exitHint(exit, strings.Join(tail, "\n"))
	}
	switch {
	case registry.Is(err, registry.Unauthorized):
		return "log in with `docker login`, or set DOCKER_CONFIG to a directory whose config.json has credentials"
	case registry.Is(err, registry.Denied):
		return "the registry knows who asks and refuses: the account lacks the right, or it is the wrong one (`docker login`, DOCKER_CONFIG)"
	case errors.Is(err, image.ErrDamaged):
		return "build the image again, or pull it; `filo rmi` takes its name away"
	case errors.Is(err, syscall.ENOSPC):
		return diskFull
	case errors.Is(err, syscall.EDQUOT):
		return quotaUsedUp
	case where == nil && (errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission)):
		return "choose a place that you may write to: --root or FILO_ROOT is the state directory, dest= of --output where a result goes"
	}
	return ""
}

// wantsOtherID says whether a step complains as programs do that may not become or name another user.
func wantsOtherID(said string) bool {
	for _, call := range []string{"setgroups", "setegid", "seteuid", "setresuid", "setuid", "setgid", "chown"} {
		if strings.Contains(said, call) && (strings.Contains(said, "nvalid argument") || strings.Contains(said, "not permitted")) {
			return true
		}
	}
	return false
}

// wantsProc says whether a step complains as programs do that miss themselves in /proc.
func wantsProc(said string) bool {
	for _, name := range []string{"/dev/stdout", "/dev/stderr", "/dev/stdin", "/dev/fd/", "/proc/self", "/proc/1", "/proc/mounts"} {
		if strings.Contains(said, name) {
			return true
		}
	}
	return false
}

// missingProgram is what shells say of a program with a path that cannot be executed.
var missingProgram = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?m): \S*/\S+: (not found|No such file or directory|cannot execute: required file not found)$`)
})

// exitHint knows what commands say when something common is missing.
func exitHint(e *sandbox.ExitError, said string) string {
	switch {
	case e.SingleID && wantsOtherID(said):
		return "the step wants another user ID and only one exists here: give this user a range in /etc/subuid and /etc/subgid and install newuidmap (Debian: package uidmap), or run filo as root"
	case e.Ground == "chroot" && wantsProc(said):
		return "steps run in a chroot here, where /proc says nothing of processes: /dev/stdout, /dev/fd, <(…) and /proc/self are missing; `filo info` says what to change in the job for more (>&1 and >&2 work)"
	case e.Code == 127 && (strings.Contains(said, "\r") || strings.Contains(e.Reason, `\r"`)):
		return "a script has Windows line ends (\\r\\n); convert it to \\n"
	case e.Code == 127 && missingProgram().MatchString(said):
		return "if that file is there, what it needs is not: the interpreter that its first line names (Windows line ends, \\r\\n, count as part of the name), or the loader of a dynamically linked program"
	case strings.Contains(e.Reason, "/bin/sh") && (strings.Contains(e.Reason, "no such file") || strings.Contains(e.Reason, "not found")):
		return "this stage has no shell; use the JSON form RUN [\"program\", \"argument\"] or another base"
	case strings.Contains(said, "Unable to locate package"):
		return "run apt-get update in the same RUN, before apt-get install"
	case strings.Contains(e.Reason, "exec format error"):
		return "the program is for another architecture: build on a machine of that architecture, cross-compile in a stage FROM --platform=$BUILDPLATFORM, or let this kernel run it with binfmt_misc (Debian: apt-get install qemu-user-static binfmt-support)"
	case e.Code == 126 && strings.Contains(said, "ermission denied"):
		return "the file may lack its executable bit: COPY --chmod=755"
	case strings.Contains(said, "Temporary failure in name resolution"), strings.Contains(said, "Could not resolve host"):
		return "the step cannot resolve names: see --network and --add-host, or the machine's /etc/resolv.conf"
	case strings.Contains(said, "o space left on device"):
		return diskFull
	case strings.Contains(said, "isk quota exceeded"):
		return quotaUsedUp
	case e.Signal == syscall.SIGKILL && !e.OutOfMemory:
		return "the process was killed: often the machine is out of memory"
	}
	return ""
}
