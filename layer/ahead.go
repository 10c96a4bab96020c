package layer

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"runtime"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// File is an entry and where its content is.
type File struct {
	Entry
	Open func() (io.ReadCloser, error) // of a Regular one that is not empty; called side by side with that of others

	content []byte // all of it, if it was read already, and Digest is that of it
}

// Small files are read some at a time, by goroutines, before the [Writer] needs them: to open, read and hash one takes
// longer than to put it in a tar.
const (
	smallFile  = 64 << 10
	batchFiles = 64
	batchBytes = 256 << 10
)

// AddAll adds files one after the other as [Writer.Add] does, and reads some of them ahead.
func (w *Writer) AddAll(files iter.Seq[File]) error {
	a := ahead{w: w}
	err := a.addAll(files)
	return errors.Join(err, a.readers.Wait())
}

// ahead is what is read before its turn.
type ahead struct {
	w       *Writer
	readers errgroup.Group
	next    *batch   // is being filled
	queue   []*batch // are being read, or wait for their turn
	spare   [][]byte // buffers of batches that are done
}

// batch is files that follow each other.
type batch struct {
	files []File
	size  int     // of the small ones
	ready []ready // by index in files
	done  chan struct{}
	buf   []byte
}

// ready is a small file that was read. It stands for itself where [Writer.Add] takes a reader, which needs not hash it again.
type ready struct {
	io.Reader // none
	data      []byte
	sum       digest.Digest
	err       error
}

func (a *ahead) addAll(files iter.Seq[File]) error {
	for f := range files {
		if a.next == nil {
			a.next = &batch{}
		}
		a.next.files = append(a.next.files, f)
		if f.isSmall() && f.content == nil {
			a.next.size += int(f.Size) + 1
		}
		if len(a.next.files) < batchFiles && a.next.size < batchBytes {
			continue
		}
		a.start()
		if len(a.queue) > runtime.GOMAXPROCS(0) {
			if err := a.first(); err != nil {
				return err
			}
		}
	}
	if a.next != nil {
		a.start()
	}
	for len(a.queue) > 0 {
		if err := a.first(); err != nil {
			return err
		}
	}
	return nil
}

func (f File) isSmall() bool { return f.Type == Regular && f.Size > 0 && f.Size <= smallFile }

// start begins to read the batch that was filled.
func (a *ahead) start() {
	b := a.next
	b.done, a.next, a.queue = make(chan struct{}), nil, append(a.queue, b)
	if n := len(a.spare); n > 0 {
		b.buf, a.spare = a.spare[n-1], a.spare[:n-1]
	}
	if cap(b.buf) < b.size {
		b.buf = make([]byte, max(b.size, batchBytes+smallFile+1))
	}
	a.readers.Go(func() error {
		defer close(b.done)
		b.read()
		return nil // each file has its own error
	})
}

func (b *batch) read() {
	b.ready = make([]ready, len(b.files))
	buf := b.buf
	for i, f := range b.files {
		if !f.isSmall() {
			continue
		}
		r := &b.ready[i]
		if f.content != nil {
			r.data, r.sum = f.content, f.Digest
			continue
		}
		r.data, r.err = f.read(buf[:f.Size+1])
		r.sum = digestOf(r.data)
		buf = buf[f.Size+1:]
	}
}

// digestOf is [digest.FromBytes] without package fmt, which takes longer to write a digest than it takes to compute one.
func digestOf(b []byte) digest.Digest {
	const prefix = "sha256:"
	s := sha256.Sum256(b)
	var text [len(prefix) + 2*len(s)]byte
	hex.Encode(text[copy(text[:], prefix):], s[:])
	return digest.Digest(text[:])
}

// read reads the whole file into buf, which has one byte more than it.
func (f File) read(buf []byte) ([]byte, error) {
	r, err := f.Open()
	if err != nil {
		return nil, err
	}
	n, err := io.ReadFull(r, buf)
	switch {
	case err == nil:
		err = fmt.Errorf("%w: longer than %d bytes", ErrChanged, f.Size)
	case err != io.EOF && err != io.ErrUnexpectedEOF:
	case int64(n) < f.Size:
		err = fmt.Errorf("%w: %d bytes shorter than %d", ErrChanged, f.Size-int64(n), f.Size)
	default:
		err = nil
	}
	return buf[:n], errors.Join(err, r.Close())
}

// first adds the files of the batch whose turn it is.
func (a *ahead) first() error {
	b := a.queue[0]
	a.queue = a.queue[1:]
	<-b.done
	for i, f := range b.files {
		if err := a.add(f, &b.ready[i]); err != nil {
			return err
		}
	}
	a.spare = append(a.spare, b.buf)
	return nil
}

func (a *ahead) add(f File, r *ready) error {
	switch {
	case r.err != nil:
		return fmt.Errorf("add %s: %w", f.Path, r.err)
	case f.isSmall():
		return a.w.Add(f.Entry, r)
	case f.Type != Regular || f.Size == 0:
		return a.w.Add(f.Entry, nil)
	}
	content, err := f.Open()
	if err != nil {
		return fmt.Errorf("add %s: %w", f.Path, err)
	}
	return errors.Join(a.w.Add(f.Entry, content), content.Close())
}
