package layer

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Compression says how a blob is compressed.
type Compression struct {
	Algorithm string // Gzip if "", EStargz, Zstd or Uncompressed
	Level     int    // Gzip, EStargz: 1 to 9, Zstd: 1 to 22; 0 is the default
}

// The algorithms of a [Compression].
const (
	Gzip         = "gzip"
	EStargz      = "estargz" // gzip with a table of contents
	Zstd         = "zstd"
	Uncompressed = "uncompressed"
)

// Check says whether algorithm and level exist.
func (c Compression) Check() error {
	_, err := c.normal()
	return err
}

// normal is c with its algorithm and level spelled out.
func (c Compression) normal() (Compression, error) {
	highest := 0
	switch c.Algorithm {
	case "", Gzip, EStargz:
		if c.Algorithm == "" {
			c.Algorithm = Gzip
		}
		highest = 9
		if c.Level == 0 {
			c.Level = 6
		}
	case Zstd:
		highest = 22
		if c.Level == 0 {
			c.Level = 3
		}
	case Uncompressed:
	default:
		return c, fmt.Errorf("compression %q: not one of gzip, estargz, zstd, uncompressed", c.Algorithm)
	}
	if c.Level < 0 || c.Level > highest {
		return c, fmt.Errorf("compression %s: level %d is not between 0 and %d", c.Algorithm, c.Level, highest)
	}
	return c, nil
}

func mediaType(algorithm string) string {
	switch algorithm {
	case Gzip, EStargz:
		return ocispec.MediaTypeImageLayerGzip
	case Zstd:
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}

// algorithmOf reads the media type of a layer, OCI's or Docker's, of the
// distributable or foreign kind, and whether its descriptor tells of a table of
// contents.
func algorithmOf(d ocispec.Descriptor) (string, error) {
	switch {
	case strings.HasPrefix(d.MediaType, "application/vnd.oci.image.layer."),
		strings.HasPrefix(d.MediaType, "application/vnd.docker.image.rootfs."):
	default:
		return "", fmt.Errorf("media type %q: not a layer", d.MediaType)
	}
	_, kind, ok := strings.Cut(d.MediaType, ".tar")
	if ok {
		switch kind {
		case "":
			return Uncompressed, nil
		case "+gzip", ".gzip":
			if isEStargz(d) {
				return EStargz, nil
			}
			return Gzip, nil
		case "+zstd", ".zstd":
			return Zstd, nil
		}
	}
	return "", fmt.Errorf("media type %q: unknown kind of layer", d.MediaType)
}

// gzipBlock must not change, nor depend on the machine: it decides the bytes.
const gzipBlock = 1 << 20

// compressor writes c's form of what is written to it; c is normal. The same
// input gives the same bytes whatever the number of processors.
func (s *Store) compressor(c Compression, w io.Writer) (io.WriteCloser, error) {
	switch c.Algorithm {
	case Gzip:
		return s.gzip(c.Level, w)
	case EStargz:
		return newSeekable(w, c.Level), nil
	case Zstd:
		return zstd.NewWriter(w,
			zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(c.Level)),
			zstd.WithEncoderConcurrency(min(runtime.GOMAXPROCS(0), 4)))
	}
	return nopCloser{w}, nil
}

func (s *Store) gzip(level int, w io.Writer) (io.WriteCloser, error) {
	z, ok := s.gzips[level].Get().(*pgzip.Writer)
	if ok {
		z.Reset(w)
	} else {
		var err error
		if z, err = pgzip.NewWriterLevel(w, level); err != nil {
			return nil, err
		}
	}
	z.ModTime = time.Unix(0, 0) // the zero Time would be written as some seconds
	// Each block in flight costs about 3 MiB.
	return lentGzip{z, &s.gzips[level]}, z.SetConcurrency(gzipBlock, min(runtime.GOMAXPROCS(0), 16))
}

// lentGzip goes back to where it is from when it is closed, which must be once: to make one takes longer than to
// compress a small layer.
type lentGzip struct {
	*pgzip.Writer
	from *sync.Pool
}

func (z lentGzip) Close() error {
	err := z.Writer.Close()
	if err == nil {
		z.from.Put(z.Writer)
	}
	return err
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// maxWindow bounds the memory that a zstd frame can demand; it is what the
// zstd tool needs for its highest level.
const maxWindow = 128 << 20

// decompressor reads the tar in r. It goes by the first bytes, as media types
// in registries are not always true, and no tar begins like a compressed file.
// Decompression runs ahead in a goroutine of its own until Close.
func decompressor(r io.Reader) (tar io.ReadCloser, algorithm string, err error) {
	b := bufio.NewReaderSize(r, 128<<10)
	magic, err := b.Peek(4)
	if err != nil && err != io.EOF {
		return nil, "", err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, "", err
		}
		return newReadAhead(z, func() {}), Gzip, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), skippable(magic):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, "", err
		}
		return newReadAhead(z, z.Close), Zstd, nil
	}
	return io.NopCloser(b), Uncompressed, nil
}

// skippable says whether magic begins a skippable zstd frame; zstd:chunked
// and seekable blobs have such.
func skippable(magic []byte) bool {
	return len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18})
}

// readAhead reads from a reader in a goroutine, a few buffers ahead.
type readAhead struct {
	full   chan aheadChunk
	empty  chan []byte
	stop   chan struct{}
	wait   sync.WaitGroup
	once   sync.Once
	buf    []byte // of the chunk that is being read
	unread []byte
	err    error
}

type aheadChunk struct {
	buf []byte
	n   int
	err error
}

const (
	aheadSize  = 256 << 10
	aheadCount = 4
)

// newReadAhead calls done when the goroutine has ended.
func newReadAhead(r io.Reader, done func()) *readAhead {
	a := &readAhead{
		full:  make(chan aheadChunk, aheadCount),
		empty: make(chan []byte, aheadCount),
		stop:  make(chan struct{}),
	}
	for range aheadCount {
		a.empty <- nil // made when needed: most layers are small
	}
	a.wait.Add(1)
	go func() {
		defer a.wait.Done()
		defer done()
		a.fill(r)
	}()
	return a
}

func (a *readAhead) fill(r io.Reader) {
	for {
		var c aheadChunk
		select {
		case c.buf = <-a.empty:
		case <-a.stop:
			return
		}
		if c.buf == nil {
			c.buf = make([]byte, aheadSize)
		}
		c.n, c.err = io.ReadFull(r, c.buf)
		if c.err == io.ErrUnexpectedEOF && c.n > 0 {
			// Could be ReadFull's or r's own; only r can tell.
			_, c.err = r.Read(c.buf[c.n:])
			if c.err == nil {
				c.err = io.ErrUnexpectedEOF
			}
		}
		a.full <- c
		if c.err != nil {
			return
		}
	}
}

func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.unread) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		if a.buf != nil {
			a.empty <- a.buf
		}
		c := <-a.full
		a.buf, a.unread, a.err = c.buf, c.buf[:c.n], c.err
	}
	n := copy(p, a.unread)
	a.unread = a.unread[n:]
	return n, nil
}

// Close ends the goroutine, once the read it is in returns.
func (a *readAhead) Close() error {
	a.once.Do(func() { close(a.stop) })
	a.wait.Wait()
	return nil
}
