package main

import (
	"context"
	"io"
)

// until returns what r holds, as long as ctx lasts. A read of r that waits then is left to itself, since nothing ends it:
// on standard input it ends with the process. Close gives r up.
func until(ctx context.Context, r io.Reader) io.ReadCloser {
	out, in := io.Pipe()
	context.AfterFunc(ctx, func() { in.CloseWithError(context.Cause(ctx)) })
	go func() {
		_, err := io.Copy(in, r)
		in.CloseWithError(err)
	}()
	return out
}
