package main

import (
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"
)

// terminalSize returns how to find out the size of the terminal that w is, nil if it is none.
func terminalSize(w io.Writer) func() (width, height int) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return func() (int, int) {
		width, height, err := term.GetSize(int(f.Fd()))
		if err != nil || width <= 0 || height <= 0 {
			return 80, 24
		}
		return width, height
	}
}

// data returns standard output as a place for data, nil if it is a terminal.
func (w world) data() io.Writer {
	if terminalSize(w.stdout) != nil {
		return nil
	}
	return w.stdout
}

// ticker calls f again and again until the returned function is called, which waits for a running f.
func ticker(every time.Duration, f func()) func() {
	t := time.NewTicker(every)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-t.C:
				f()
			case <-stop:
				return
			}
		}
	}()
	return sync.OnceFunc(func() {
		t.Stop()
		close(stop)
		<-done
	})
}
