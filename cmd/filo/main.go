// Command filo turns a Dockerfile into an OCI image.
//
// It reads arguments, environment and standard input, wires the rooms together, and is the one place that prints:
// progress and errors on standard error, data on standard output. It holds no build logic.
//
// Start at [run], which main, tests and scripts enter alike. root.go has the commands and what they share, one file
// a command has the rest; flags.go and request.go turn the flags of build into a request; report.go shows an error.
// Exit status: 0 done, 1 failed, 2 wrong usage, 128+n ended by signal n.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"
)

func main() {
	postponeCollection()
	os.Exit(run(os.Args[1:], machine()))
}

// firstCollection is how many bytes Go may use before it looks for garbage the first time. Most builds that find all steps
// in the cache end before, and are a tenth faster for it.
const firstCollection = 48 << 20

// postponeCollection lets Go look for garbage late the first time and as ever from then on, unless the environment has a
// will of its own.
func postponeCollection() {
	for _, name := range []string{"GOGC", "GOMEMLIMIT"} {
		if _, ok := os.LookupEnv(name); ok {
			return
		}
	}
	percent, limit := debug.SetGCPercent(-1), debug.SetMemoryLimit(firstCollection)
	runtime.AddCleanup(new([16]byte), func(int) {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	}, 0)
}

// machine is the world as it is.
func machine() world {
	return world{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		env: os.LookupEnv, root: os.Geteuid() == 0, now: time.Now,
	}
}

// Exit statuses.
const (
	exitFailed   = 1
	exitUsage    = 2
	exitSignaled = 128
)

// run runs one command of filo and returns its exit status.
func run(args []string, w world) int {
	ctx, stop := untilSignal(context.Background())
	defer stop()
	a := &app{world: w, repairs: &repairs{}, pulls: &pulls{}}
	err := cmp.Or(a.command(args).ExecuteContext(ctx), a.misused)
	fmt.Fprint(w.stderr, a.repairs.line())
	if err == nil {
		return 0
	}
	a.report(err)
	var sig *signaled
	var usage *usageError
	switch {
	case errors.As(context.Cause(ctx), &sig):
		return exitSignaled + int(sig.signal)
	case errors.As(err, &usage):
		return exitUsage
	}
	return exitFailed
}

// signaled is the cause of a context that a signal ended.
type signaled struct{ signal syscall.Signal }

func (s *signaled) Error() string { return "stopped by signal: " + s.signal.String() }

// untilSignal returns a context that the first SIGINT, SIGTERM or SIGHUP ends; the second one ends the process as if
// nobody listened, and so does one that comes before anything is done.
func untilSignal(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP) // takes 0.3 ms
		select {
		case s := <-c:
			signal.Stop(c)
			cancel(&signaled{s.(syscall.Signal)})
		case <-ctx.Done():
			signal.Stop(c)
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-done
	}
}
